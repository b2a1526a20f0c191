// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package codeset is a set of status codes, for layers whose Config says which codes mean
// what.
package codeset

import (
	"fmt"

	"google.golang.org/grpc/codes"
)

// Set is a set of status codes. The zero Set is empty.
type Set uint32

// Last is the last of gRPC's codes.
const Last = codes.Unauthenticated

// Rule is what the codes in a Set must be.
var Rule = fmt.Sprintf("must be a code from %v to %v", codes.Canceled, Last)

// Of returns the set of cs. bad is the index of the first code that is not an error that
// gRPC knows, or -1.
func Of(cs ...codes.Code) (s Set, bad int) {
	for i, c := range cs {
		if c == codes.OK || c > Last {
			return 0, i
		}
		s |= 1 << c
	}
	return s, -1
}

// Has reports whether c is in the set. Codes that gRPC does not know are not.
func (s Set) Has(c codes.Code) bool { return c <= Last && s>>c&1 != 0 }
