// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	_ "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestWishOf(t *testing.T) {
	st, err := status.New(codes.Unavailable, "").WithDetails(&errdetails.DebugInfo{}, &errdetails.RetryInfo{RetryDelay: durationpb.New(2 * time.Second)})
	if err != nil {
		t.Fatal(err)
	}
	pushback := func(v ...string) metadata.MD { return metadata.MD{pushbackKey: v} }
	for name, tc := range map[string]struct {
		err     error
		trailer metadata.MD
		want    Wish
	}{
		"nothing":         {status.Error(codes.Unavailable, ""), nil, Wish{}},
		"no status":       {errors.New("no status"), metadata.MD{}, Wish{}},
		"RetryInfo":       {st.Err(), nil, Wish{Asked: true, After: 2 * time.Second}},
		"wrapped":         {fmt.Errorf("wrapped: %w", st.Err()), nil, Wish{Asked: true, After: 2 * time.Second}},
		"pushback first":  {st.Err(), pushback("7"), Wish{Asked: true, Exact: true, After: 7 * time.Millisecond}},
		"negative":        {st.Err(), pushback("-1"), Wish{Stop: true}},
		"not a number":    {st.Err(), pushback("1.5"), Wish{Stop: true}},
		"empty":           {st.Err(), pushback(""), Wish{Stop: true}},
		"more than int32": {st.Err(), pushback("2147483648"), Wish{Stop: true}},
		"two":             {st.Err(), pushback("1", "1"), Wish{Stop: true}},
	} {
		if got := WishOf(tc.err, tc.trailer); got != tc.want {
			t.Errorf("%s: WishOf = %+v, want %+v", name, got, tc.want)
		}
	}
}

func TestDeclaredOfUnknownMethod(t *testing.T) {
	for _, m := range []string{"", "/", "/a", "/a/b", "a/b", "/grpc.health.v1.Health/Nothing", "//"} {
		if yes, known := Declared(m); yes || known {
			t.Errorf("Declared(%q) = %v, %v; want false, false", m, yes, known)
		}
	}
}

func TestReply(t *testing.T) {
	if m := Reply("/belfry.testing.v1.TestService/Unary"); m == nil || m.ProtoReflect().Descriptor().Name() != "UnaryResponse" {
		t.Errorf("the response of a method whose code is linked in is %T", m)
	}
	for _, m := range []string{"", "/a/b", "/grpc.health.v1.Health/Nothing"} {
		if got := Reply(m); got != nil {
			t.Errorf("Reply(%q) = %T, want none", m, got)
		}
	}
}
