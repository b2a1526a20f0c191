// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package codeset is a set of status codes, for layers that are configured with
// which codes mean what.
package codeset

import (
	"fmt"

	"google.golang.org/grpc/codes"
)

// Set is a set of status codes. The zero Set is empty.
type Set uint32

// Last is the last of gRPC's codes.
const Last = codes.Unauthenticated

// Of returns the set of cs, which must be codes of errors that gRPC knows.
func Of(cs ...codes.Code) (Set, error) {
	var s Set
	for i, c := range cs {
		if c == codes.OK || c > Last {
			return 0, fmt.Errorf("[%d] is %v, must be one of gRPC's codes, %v to %v", i, c, codes.Canceled, Last)
		}
		s |= 1 << c
	}
	return s, nil
}

// Has reports whether c is in the set. Codes that gRPC does not know are not.
func (s Set) Has(c codes.Code) bool { return c <= Last && s>>c&1 != 0 }
