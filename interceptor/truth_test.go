// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// A foreign interceptor returns the refusal of its further attempt as it is.
func TestOutcome(t *testing.T) {
	t.Run("refused_after_an_attempt_was_sent", func(t *testing.T) {
		log := &eventLog{}
		gate := admitToy(func(a *interceptor.Admission, _ interceptor.Wait) error {
			if a.Attempt() > 0 {
				return interceptor.Refuse("full", interceptor.ReasonConcurrency, "")
			}
			return nil
		})
		failed := status.Error(codes.Unavailable, "")
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &scriptStream{ctx: ctx, errs: []error{failed}}, nil
		}}
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, foreignTwice(), gate, &logToy{name: "inner", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(nil); status.Code(err) != codes.Unavailable {
			t.Errorf("got %v, want the refusal", err)
		}
		want := []string{"inner 0 failed Unavailable", "outer 0 ignored Unavailable"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})
}

// badReleaser panics.
type badReleaser struct{ interceptor.GateOnly }

func (l badReleaser) NewLayer() (interceptor.Layer, error) { return l, nil }
func (badReleaser) Release(int64, interceptor.End)         { panic("release") }
func (l badReleaser) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

type inFlight struct {
	interceptor.NopObserver
	n, ended int
}

func (o *inFlight) InFlight(_ interceptor.Observed, delta int) { o.n += delta }
func (o *inFlight) Ended(interceptor.Observed, interceptor.ObservedEnd) {
	o.ended++
}

func TestPanics(t *testing.T) {
	t.Run("of_a_releaser_leave_nobody_untold", func(t *testing.T) {
		o, finished := &inFlight{}, 0
		s := calltest.Stack(t, interceptor.Observe(o), badReleaser{})
		func() {
			defer func() { recover() }()
			s.Wrap(answers(nil)).Invoke(context.Background(), calltest.Method, nil, nil, grpc.OnFinish(func(error) { finished++ }))
		}()
		if finished != 1 || o.n != 0 || o.ended != 1 || s.InFlight() != 0 {
			t.Errorf("OnFinish was called %d times, Ended %d times, %d and %d calls are in flight, want 1, 1, 0 and 0", finished, o.ended, o.n, s.InFlight())
		}
	})
	t.Run("of_OnFinish_leave_no_stream_in_flight", func(t *testing.T) {
		s := calltest.Stack(t)
		c := &conn{stream: func(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			return nil, status.Error(codes.Internal, "")
		}}
		func() {
			defer func() { recover() }()
			s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{}, calltest.Method, grpc.OnFinish(func(error) { panic("finish") }))
		}()
		if n := s.InFlight(); n != 0 {
			t.Errorf("%d calls are in flight, want none", n)
		}
	})
}

// responses keeps what a Responder is told.
type responses struct {
	interceptor.GateOnly
	responded bool
	end       interceptor.End
	ending    func() // Called by Release.
}

func (l *responses) NewLayer() (interceptor.Layer, error) { return l, nil }
func (l *responses) Respond(int64, interceptor.End)       { l.responded = true }
func (l *responses) Release(_ int64, e interceptor.End) {
	l.end = e
	if l.ending != nil {
		l.ending()
	}
}
func (l *responses) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func TestResponder(t *testing.T) {
	t.Run("is_not_said_to_know_of_a_header_that_comes_with_the_end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &headerStream{scriptStream{ctx: ctx}}, nil
			}}
			outer, inner := &responses{}, &responses{}
			s := calltest.Stack(t, outer, callToy{}, inner)
			st, err := s.Wrap(c).NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			inner.ending = func() { st.Header() } // The outer end has begun by then.
			cancel()
			synctest.Wait()
			if outer.responded != outer.end.Responded {
				t.Errorf("Respond was called: %v, and End.Responded is %v", outer.responded, outer.end.Responded)
			}
		})
	})
}

// callToy takes part in the call path and does nothing.
type callToy struct{ interceptor.CallOnly }

func (l callToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (callToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error { return next(ctx, c) }
}

// headerStream has a header.
type headerStream struct{ scriptStream }

func (*headerStream) Header() (metadata.MD, error) { return metadata.Pairs("a", "b"), nil }
