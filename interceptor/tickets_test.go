// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestTickets(t *testing.T) {
	t.Run("refunded_by_a_refusal_further_in", func(t *testing.T) {
		tokens, limit := newTokens(10), newLimit("limit", 1)
		c := calltest.Stack(t, &shedToy{}, tokens, limit).Wrap(answers(nil))
		<-limit.slots // The limit is full.
		for range 10 {
			if err := c.Invoke(context.Background(), calltest.Method, nil, nil); calltest.Reason(err) != interceptor.ReasonConcurrency {
				t.Fatalf("a call at a full limit: %v, want a refusal of the limit", err)
			}
		}
		if got := tokens.tokens.Load(); got != 10 {
			t.Errorf("%d tokens left after ten refusals, want all 10", got)
		}
		limit.slots <- struct{}{}
		if err := c.Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
			t.Fatal(err)
		}
		if got := tokens.tokens.Load(); got != 9 {
			t.Errorf("%d tokens left after a call, want 9", got)
		}
	})

	t.Run("released_in_reverse_order", func(t *testing.T) {
		log := &eventLog{}
		a, b := &logToy{name: "a", log: log}, &logToy{name: "b", log: log}
		for _, tc := range []struct {
			name string
			err  error
			want []string
		}{
			{"success", nil, []string{"b 0 ok OK", "a 0 ok OK"}},
			{"failure", status.Error(codes.NotFound, ""), []string{"b 0 failed NotFound", "a 0 failed NotFound"}},
			{"a server that says cancelled", status.Error(codes.Canceled, ""), []string{"b 0 failed Canceled", "a 0 failed Canceled"}},
			{"a refusal of a stack further in", interceptor.Refuse("x", interceptor.ReasonShed, ""), []string{"b 0 not_sent Unavailable", "a 0 not_sent Unavailable"}},
		} {
			t.Run(tc.name, func(t *testing.T) {
				calltest.Stack(t, a, b).Wrap(answers(tc.err)).Invoke(context.Background(), calltest.Method, nil, nil)
				if got := log.take(); !slices.Equal(got, tc.want) {
					t.Errorf("released %q, want %q", got, tc.want)
				}
			})
		}
	})

	t.Run("each_attempt_has_its_own", func(t *testing.T) {
		log := &eventLog{}
		unavailable := status.Error(codes.Unavailable, "")
		s := calltest.Stack(t, &logToy{name: "call", log: log}, &retryToy{n: 3}, &logToy{name: "attempt", log: log})
		if err := s.Wrap(answers(unavailable, unavailable, nil)).Invoke(context.Background(), calltest.Method, new(wrapperspb.StringValue), new(wrapperspb.StringValue)); err != nil {
			t.Fatal(err)
		}
		want := []string{"attempt 0 failed Unavailable", "attempt 1 failed Unavailable", "attempt 2 ok OK", "call 0 ok OK"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("released_when_the_invoker_panics", func(t *testing.T) {
		log := &eventLog{}
		c := &conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { panic("oh") }}
		s := calltest.Stack(t, &logToy{name: "a", log: log}, &passToy{}, &logToy{name: "b", log: log})
		func() {
			defer func() {
				if r := recover(); r != "oh" {
					t.Errorf("recovered %v, want the invoker's panic", r)
				}
			}()
			s.Wrap(c).Invoke(context.Background(), calltest.Method, nil, nil)
		}()
		want := []string{"b 0 failed Internal", "a 0 failed Internal"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})

	t.Run("released_when_a_layer_recovers_from_a_panic", func(t *testing.T) {
		log := &eventLog{}
		c := &conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { panic("oh") }}
		s := calltest.Stack(t, &logToy{name: "a", log: log}, &recoverToy{}, &logToy{name: "b", log: log}, &passToy{}, &logToy{name: "c", log: log})
		if err := s.Wrap(c).Invoke(context.Background(), calltest.Method, nil, nil); status.Code(err) != codes.DataLoss {
			t.Errorf("the call returned %v, want what the layer returns that recovered", err)
		}
		want := []string{"c 0 failed Internal", "b 0 failed Internal", "a 0 failed DataLoss"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})

	t.Run("released_when_a_gate_or_a_releaser_panics", func(t *testing.T) {
		log := &eventLog{}
		bad := &panicToy{}
		s := calltest.Stack(t, &logToy{name: "a", log: log}, bad, &logToy{name: "b", log: log})
		for _, where := range []string{"admit", "release"} {
			bad.where = where
			func() {
				defer func() { recover() }()
				s.Wrap(answers(nil)).Invoke(context.Background(), calltest.Method, nil, nil)
				t.Errorf("%s: no panic", where)
			}()
		}
		want := []string{"a 0 not_sent Internal", "b 0 ok OK", "a 0 ok OK"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})
}

// recoverToy returns DATA_LOSS when what is inside panics.
type recoverToy struct{ interceptor.CallOnly }

func (l *recoverToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*recoverToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) (err error) {
		defer func() {
			if recover() != nil {
				err = status.Error(codes.DataLoss, "")
			}
		}()
		return next(ctx, c)
	}
}

type panicToy struct {
	interceptor.GateOnly
	where string
}

func (l *panicToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*panicToy) Traits() interceptor.Traits { return 0 }

func (l *panicToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.where == "admit" {
			panic(l.where)
		}
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *panicToy) Release(int64, interceptor.End) {
	if l.where == "release" {
		panic(l.where)
	}
}
