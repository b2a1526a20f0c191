// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package codeset

import (
	"testing"

	"google.golang.org/grpc/codes"
)

func TestASetHasWhatItIsMadeOf(t *testing.T) {
	s, bad := Of(codes.Unavailable, codes.Canceled, codes.Unauthenticated)
	if bad != -1 {
		t.Fatalf("code %d is bad, want none", bad)
	}
	for c := codes.OK; c < 40; c++ {
		want := c == codes.Unavailable || c == codes.Canceled || c == codes.Unauthenticated
		if got := s.Has(c); got != want {
			t.Errorf("Has(%v) = %v, want %v", c, got, want)
		}
	}
}

// OK and unknown numbers are rejected.
func TestRejectsOKAndUnknownNumbers(t *testing.T) {
	for _, c := range []codes.Code{codes.OK, 17, 1 << 20} {
		if _, bad := Of(codes.Internal, c, codes.OK); bad != 1 {
			t.Errorf("Of(Internal, %v, OK): code %d is bad, want 1", c, bad)
		}
	}
}
