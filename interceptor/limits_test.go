// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"iter"
	"slices"
	"testing"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"

	"github.com/belfry-go/belfry/interceptor"
)

// limited is a layer with limits.
type limited struct {
	interceptor.GateOnly
	name string
	keys []string
}

func (l *limited) NewLayer() (interceptor.Layer, error)             { return l, nil }
func (l *limited) WrapGate(inner interceptor.Gate) interceptor.Gate { return inner }

func (l *limited) Limits() iter.Seq[interceptor.LimitState] {
	return func(yield func(interceptor.LimitState) bool) {
		for _, key := range l.keys {
			if !yield(interceptor.LimitState{Layer: l.name, Key: key}) {
				return
			}
		}
	}
}

func TestLimits(t *testing.T) {
	stack := func(specs ...interceptor.Spec) *interceptor.Stack {
		t.Helper()
		s, err := interceptor.NewStack(specs...)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	all := selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })
	a, b := &limited{name: "a", keys: []string{"1", "2"}}, &limited{name: "b", keys: []string{"3"}}
	one, two := stack(a, b), stack(interceptor.Only(all, a))
	names := func(stacks ...*interceptor.Stack) (got []string) {
		for l := range interceptor.Limits(stacks...) {
			got = append(got, l.Layer+l.Key)
		}
		return got
	}
	for _, tc := range []struct {
		name   string
		stacks []*interceptor.Stack
		want   []string
	}{
		{"none", nil, nil},
		{"of a stack", []*interceptor.Stack{one}, []string{"a1", "a2", "b3"}},
		{"of a layer behind a matcher", []*interceptor.Stack{two}, []string{"a1", "a2"}},
		{"of a layer in two stacks", []*interceptor.Stack{one, two}, []string{"a1", "a2", "b3"}},
	} {
		if got := names(tc.stacks...); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %q, want %q", tc.name, got, tc.want)
		}
	}
	for range interceptor.Limits(one) {
		break // It must not go on.
	}
}
