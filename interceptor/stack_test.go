// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestNewStack(t *testing.T) {
	limit, nop := newLimit("limit", 1), interceptor.NopObserver{}
	for _, tc := range []struct {
		name   string
		layers []interceptor.Spec
		want   string
	}{
		{"nil", []interceptor.Spec{limit, nil}, "layer 1 is nil"},
		{"nil_pointer", []interceptor.Spec{(*limitToy)(nil)}, "layer 0 is nil"},
		{"spec_that_makes_nothing", []interceptor.Spec{specFunc(func() (interceptor.Layer, error) { return nil, nil })}, "layer 0: NewLayer returned nil"},
		{"duplicate", []interceptor.Spec{limit, &timeoutToy{}, limit}, "layer 2 (limit) is the same value as layer 0"},
		{"duplicate_behind_an_only", []interceptor.Spec{limit, interceptor.Only(everything, limit)}, "layer 1 (only(limit)) is the same value as layer 0"},
		{"duplicate_before_an_only", []interceptor.Spec{interceptor.Only(everything, interceptor.Only(everything, limit)), limit}, "layer 1 (limit) is the same value as layer 0"},
		{"shed_alone", []interceptor.Spec{&shedToy{}}, "layer 0 (shed) has nothing inside that can be not ready: put it outside of a limit, as in [shed > concurrency]"},
		{"shed_inside_of_its_limit", []interceptor.Spec{limit, &shedToy{}, &timeoutToy{}, &retryToy{}}, "layer 1 (shed) has nothing inside that can be not ready"},
		{"buffer_inside_of_its_limit", []interceptor.Spec{limit, newBuffer(1), &passToy{}}, "layer 1 (buffer) has nothing inside that can be not ready"},
		{"only_of_such_a_buffer", []interceptor.Spec{limit, interceptor.Only(everything, newBuffer(1))}, "layer 1 (only(buffer)) has nothing inside"},
		{"shed_around_a_buffer_alone", []interceptor.Spec{&shedToy{}, newBuffer(1)}, "layer 0 (shed) has nothing inside"},
		{"only_of_an_observer", []interceptor.Spec{interceptor.Only(everything, interceptor.Observe(nop))}, "sees the whole stack"},
		{"only_of_nothing", []interceptor.Spec{interceptor.Only(nil, limit)}, "must have a matcher and a layer"},
		{"two_observers", []interceptor.Spec{interceptor.Observe(nop), interceptor.Observe(nop)}, "one observer"},
		{"no_observer", []interceptor.Spec{interceptor.Observe(nil)}, "must be an observer"},
		{"nil_gate", []interceptor.Spec{&nilToy{}}, "layer 0 (nil): WrapGate returned nil"},
		{"nil_call", []interceptor.Spec{&nilToy{gate: true}}, "layer 0 (nil): WrapCall returned nil"},
	} {
		t.Run("rejects/"+tc.name, func(t *testing.T) {
			_, err := interceptor.NewStack(tc.layers...)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("NewStack returned %v, want an error with %q", err, tc.want)
			}
		})
	}

	t.Run("joins_all_errors_with_their_indexes", func(t *testing.T) {
		wrong := &interceptor.ConfigError{Layer: "x", Field: "Size", Value: 0, Rule: "must be positive"}
		fails := specFunc(func() (interceptor.Layer, error) { return nil, wrong })
		two := specFunc(func() (interceptor.Layer, error) { return nil, errors.Join(errors.New("first"), errors.New("second")) })
		_, err := interceptor.NewStack(fails, limit, nil, interceptor.Only(everything, fails), two)
		if err == nil {
			t.Fatal("NewStack returned no error")
		}
		for _, want := range []string{"layer 0: x: Size", "layer 2 is nil", "layer 3: Only: x: Size", "layer 4: first", "layer 4: second"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error is %v, want %q in it", err, want)
			}
		}
		if got := new(interceptor.ConfigError); !errors.As(err, &got) || got.Field != "Size" {
			t.Errorf("errors.As found %+v, want the ConfigError", got)
		}
	})

	t.Run("gate_over_is_told_what_is_inside", func(t *testing.T) {
		over := &overToy{}
		calltest.Stack(t, interceptor.Only(everything, over), &passToy{}, limit, newLimit("second", 1))
		calltest.Stack(t, over, limit)
		calltest.Stack(t, over, limit, &retryToy{}) // Whose attempts wait for a READY endpoint.
		if got, want := over.waits, []int{2, 1, 2}; !slices.Equal(got, want) {
			t.Errorf("it was told of %v gates inside that can wait, want %v", got, want)
		}
	})
}

type specFunc func() (interceptor.Layer, error)

func (f specFunc) NewLayer() (interceptor.Layer, error) { return f() }

// nilToy returns no gate, or one and no call path.
type nilToy struct{ gate bool }

func (l *nilToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*nilToy) String() string                         { return "nil" }

func (l *nilToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	if l.gate {
		return inner
	}
	return nil
}

func (*nilToy) WrapCall(interceptor.Next, interceptor.Again) interceptor.Next { return nil }

// overToy notes how many gates inside can wait.
type overToy struct {
	gateToy
	waits []int
}

func (l *overToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *overToy) WrapGateOver(inner interceptor.Gate, waits int) interceptor.Gate {
	l.waits = append(l.waits, waits)
	return inner
}

func TestStackAdvice(t *testing.T) {
	limit := newLimit("limit", 1)
	for _, tc := range []struct {
		name   string
		layers []interceptor.Spec
		want   []string
	}{
		{"recommended_order", []interceptor.Spec{&shedToy{}, &timeToy{d: 2 * time.Second}, &hedgeToy{}, &retryToy{}, newBuffer(1), limit, newTokens(1), &timeToy{d: time.Second}}, nil},
		{"rate_outside_a_limit", []interceptor.Spec{newTokens(1), limit}, []string{"is outside limit"}},
		{"rate_behind_an_only", []interceptor.Spec{interceptor.Only(everything, newTokens(1)), limit, newLimit("second", 1)}, []string{"is outside limit"}},
		{"rate_outside_a_shed", []interceptor.Spec{newTokens(1), &shedToy{}, limit}, nil},
		{"rate_outside_a_shed_that_lets_calls_wait", []interceptor.Spec{newTokens(1), &shedToy{}, newBuffer(1), limit}, []string{"is outside limit"}},
		{"buffer_outside_a_shed", []interceptor.Spec{newBuffer(1), &shedToy{}, limit}, []string{"lets no call wait"}},
		{"buffer_outside_a_shed_of_some_calls", []interceptor.Spec{newBuffer(1), interceptor.Only(everything, &shedToy{}), limit}, nil},
		{"buffer_with_something_to_wait_for_outside_a_shed", []interceptor.Spec{newBuffer(1), newLimit("first", 1), &shedToy{}, limit}, nil},
		{"retry_outside_a_retry", []interceptor.Spec{&retryToy{}, &timeToy{}, &retryToy{}}, []string{"multiplied"}},
		{"two_rates", []interceptor.Spec{newTokens(1), newTokens(1)}, nil},
		{"retry_outside_a_hedge", []interceptor.Spec{&retryToy{}, &hedgeToy{}}, []string{"put the hedge outside"}},
		{"attempts_timeout_not_below_the_calls", []interceptor.Spec{&timeToy{d: time.Second}, &retryToy{}, &timeToy{d: time.Second}}, []string{"it never acts"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := calltest.Stack(t, tc.layers...).Advice()
			if len(got) != len(tc.want) {
				t.Fatalf("Advice() = %q, want %d sentences", got, len(tc.want))
			}
			for i, want := range tc.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("Advice()[%d] = %q, want %q in it", i, got[i], want)
				}
			}
		})
	}
}

// timeToy only says what its timeout is.
type timeToy struct {
	interceptor.CallOnly
	d time.Duration
}

func (l *timeToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *timeToy) Timeout(string) time.Duration         { return l.d }

func (*timeToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next { return next }

var everything = selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true })

func TestStack(t *testing.T) {
	t.Run("String_leaves_out_what_is_off", func(t *testing.T) {
		s := calltest.Stack(t, &shedToy{}, interceptor.Optional(false, nil), interceptor.Optional(true, newBuffer(1)), interceptor.Only(everything, newLimit("limit", 1)))
		if got, want := s.String(), "[shed > buffer > only(limit)]"; got != want {
			t.Errorf("String() = %q, want %q", got, want)
		}
	})

	t.Run("Only_applies_to_matching_calls", func(t *testing.T) {
		writes := selector.MatchFunc(func(_ context.Context, m interceptors.CallMeta) bool { return m.Method == "write" })
		tokens := newTokens(1)
		timeout := &timeoutToy{d: time.Hour}
		mapped := 0
		mapper := mapping.Error(func(_ context.Context, _ string, err error) error { mapped++; return err })
		var deadline bool
		c := &conn{invoke: func(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
			_, deadline = ctx.Deadline()
			return errors.New("failed")
		}}
		s := calltest.Stack(t, interceptor.Only(writes, tokens), interceptor.Only(writes, timeout), interceptor.Only(writes, mapper)).Wrap(c)
		ctx := context.Background()
		for i, tc := range []struct {
			method   string
			reason   interceptor.Reason
			deadline bool
		}{{"/s/read", "", false}, {"/s/write", "", true}, {"/s/read", "", false}, {"/s/write", interceptor.ReasonRateLimit, false}} {
			deadline = false
			err := s.Invoke(ctx, tc.method, nil, nil)
			if calltest.Reason(err) != tc.reason || deadline != tc.deadline {
				t.Errorf("call %d of %s: %v, deadline %v; want reason %q, deadline %v", i, tc.method, err, deadline, tc.reason, tc.deadline)
			}
		}
		if mapped != 1 {
			t.Errorf("%d errors were mapped, want that of the one write that was sent", mapped)
		}
	})

	t.Run("Replace_leaves_calls_in_flight_alone", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			old, new := newLimit("old", 1), newLimit("new", 1)
			s := calltest.Stack(t, old)
			c := s.Wrap(calltest.Takes(time.Second))
			go c.Invoke(context.Background(), calltest.Method, nil, nil)
			synctest.Wait()
			if err := s.Replace(new, new); err == nil || s.String() != "[old]" {
				t.Errorf("a bad Replace returned %v and left %s, want an error and the old layers", err, s)
			}
			if err := s.Replace(new); err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil || time.Since(start) != time.Second {
				t.Errorf("a call of the new layers: %v after %v, want success after 1s", err, time.Since(start))
			}
			if err := errors.Join(s.Drain(context.Background()), old.atRest(), new.atRest()); err != nil {
				t.Error(err)
			}
		})
	})

	t.Run("conformance", func(t *testing.T) {
		layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
			outer, middle, inner := newLimit("outer", 2000), newLimit("middle", 2000), newLimit("inner", 50)
			buffer := newBuffer(2000)
			layers := []interceptor.Spec{
				interceptor.Observe(&recorder{}), outer, &shedToy{}, &timeoutToy{d: 10 * time.Second}, passForeign(), middle,
				&retryToy{n: 3}, mapping.Error(func(_ context.Context, _ string, err error) error { return err }),
				interceptor.Only(everything, &passToy{}), buffer, inner,
			}
			return layers, func() error {
				if n := buffer.used.Load(); n != 0 {
					return fmt.Errorf("%d places of the buffer taken", n)
				}
				return errors.Join(outer.atRest(), middle.atRest(), inner.atRest())
			}
		})
	})
}

// The layers of the examples are as good as belfry's own.
func TestExampleLayers(t *testing.T) {
	t.Run("quota", func(t *testing.T) {
		layertest.Run(t, func() (interceptor.Spec, func() error) {
			q := NewQuota(100)
			return q, func() error {
				if n := q.InUse(); n != 0 {
					return fmt.Errorf("%d calls are counted as running", n)
				}
				return nil
			}
		})
	})
	t.Run("request_id", func(t *testing.T) {
		layertest.Run(t, func() (interceptor.Spec, func() error) {
			return &RequestID{next: func() string { return "id" }}, nil
		})
	})
}
