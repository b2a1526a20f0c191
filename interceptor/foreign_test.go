// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestForeign(t *testing.T) {
	t.Run("its_own_answer_was_not_sent", func(t *testing.T) {
		log := &eventLog{}
		denied := status.Error(codes.PermissionDenied, "")
		f := interceptor.Foreign("auth", func(context.Context, string, any, any, *grpc.ClientConn, grpc.UnaryInvoker, ...grpc.CallOption) error {
			return denied
		}, nil)
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
		if err := s.Wrap(answers()).Invoke(context.Background(), calltest.Method, nil, nil); err != denied {
			t.Errorf("got %v, want the interceptor's error", err)
		}
		want := []string{"inner 0 not_sent OK", "outer 0 not_sent PermissionDenied"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("stream_opened_later_was_sent", func(t *testing.T) {
		log := &eventLog{}
		f := interceptor.Foreign("lazy", nil, func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, m string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return &lazyStream{open: func() (grpc.ClientStream, error) { return streamer(ctx, desc, cc, m, opts...) }}, nil
		})
		failed := status.Error(codes.Internal, "")
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &scriptStream{ctx: ctx, errs: []error{failed}}, nil
		}}
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.SendMsg(nil); err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(nil); !errors.Is(err, failed) {
			t.Errorf("got %v, want the server's error", err)
		}
		want := []string{"inner 0 not_sent OK", "inner 1 failed Internal", "outer 0 failed Internal"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("first_attempt_takes_the_notes_of_gates_inside", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, passForeign(), &timeoutToy{d: time.Second})
			calltest.Expect(t, calltest.Burst(s.Wrap(calltest.Takes(time.Minute)), 1), calltest.Refused(time.Second, interceptor.ReasonDeadline))
		})
	})

	t.Run("first_attempt_carries_its_wait", func(t *testing.T) {
		for name, want := range map[string]interceptor.Wait{"forever": interceptor.Forever, "none": interceptor.None} {
			layers := []interceptor.Spec{passForeign(), newLimit("limit", 1)}
			if want == interceptor.None {
				layers = append([]interceptor.Spec{&shedToy{}}, layers...)
			}
			c := &conn{invoke: func(_ context.Context, _ string, _, _ any, opts ...grpc.CallOption) error {
				if got := interceptor.WaitOf(opts); got != want {
					t.Errorf("%s: the connection was told %v, want %v", name, got, want)
				}
				return nil
			}}
			if err := calltest.Stack(t, layers...).Wrap(c).Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	})

	t.Run("retry_inside_may_wait", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit := newLimit("limit", 1)
			s := calltest.Stack(t, passForeign(), &retryToy{n: 2, backoff: time.Second}, limit)
			done := make(chan error, 1)
			go func() {
				done <- s.Wrap(answers(status.Error(codes.Unavailable, ""), nil)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue))
			}()
			synctest.Wait()
			<-limit.slots
			time.Sleep(time.Minute)
			limit.slots <- struct{}{}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	})

	t.Run("each_attempt_is_admitted", func(t *testing.T) {
		log := &eventLog{}
		f := foreignTwice()
		s := calltest.Stack(t, &logToy{name: "outer", log: log}, f, &logToy{name: "inner", log: log})
		if err := s.Wrap(answers(status.Error(codes.Internal, ""), nil)).Invoke(context.Background(), calltest.Method, nil, nil); err != nil {
			t.Error(err)
		}
		want := []string{"inner 0 failed Internal", "inner 1 ok OK", "outer 0 ok OK"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})
}

// A retry of somebody else's has its further attempts admitted, waits for them, and
// learns from whom they were refused together with what the server said.
func TestForeignFurtherAttempts(t *testing.T) {
	retry := interceptor.Foreign("retry", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := invoker(ctx, m, req, reply, cc, opts...); status.Code(err) != codes.Unavailable {
			return err
		}
		return invoker(ctx, m, req, reply, cc, opts...)
	}, nil)
	unavailable := status.Error(codes.Unavailable, "from the server")
	full := interceptor.Refuse("full", interceptor.ReasonConcurrency, "")
	for _, tc := range []struct {
		name   string
		gate   error // For further attempts.
		answer error
		want   []string
		err    error
	}{
		{"admitted", nil, nil, []string{"inner 0 failed Unavailable", "gate forever", "inner 1 ok OK", "outer 0 ok OK"}, nil},
		{"refused", full, nil, []string{"inner 0 failed Unavailable", "gate forever", "refused full CONCURRENCY", "outer 0 failed Unavailable"}, unavailable},
	} {
		t.Run(tc.name, func(t *testing.T) {
			log := &eventLog{}
			gate := admitToy(func(a *interceptor.Admission, w interceptor.Wait) error {
				if a.Attempt() == 0 {
					return nil
				}
				log.add("gate %v", w)
				return tc.gate
			})
			s := calltest.Stack(t, interceptor.Observe(&refusalLog{log: log}), &logToy{name: "outer", log: log}, retry, gate, &logToy{name: "inner", log: log})
			err := s.Wrap(answers(unavailable, tc.answer)).Invoke(context.Background(), calltest.Method, nil, nil)
			if status.Convert(err).Message() != status.Convert(tc.err).Message() {
				t.Errorf("got %v, want the status of %v", err, tc.err)
			}
			if r, refused := interceptor.AsRefusal(err); refused != (tc.gate != nil) || refused && (r.Layer != "full" || !r.Further || r.NotSent()) {
				t.Errorf("got %v, want it to say who refused the further attempt, if it was refused", err)
			}
			if got := log.take(); !slices.Equal(got, tc.want) {
				t.Errorf("saw %q,\nwant %q", got, tc.want)
			}
		})
	}
	t.Run("none_when_the_stack_drains", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var s *interceptor.Stack
			attempts := 0
			s = calltest.Stack(t, retry)
			err := s.Wrap(calltest.Server(func(context.Context) error {
				attempts++
				go s.Drain(context.Background())
				synctest.Wait()
				return unavailable
			})).Invoke(context.Background(), calltest.Method, nil, nil)
			if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonDrain || !r.Further || status.Code(err) != codes.Unavailable || attempts != 1 {
				t.Errorf("got %v after %d attempts, want the server's error and reason DRAIN after one", err, attempts)
			}
		})
	})
}

// admitToy is a gate that admits what a function does.
type admitToy func(a *interceptor.Admission, w interceptor.Wait) error

func (g admitToy) NewLayer() (interceptor.Layer, error) { return &funcLayer{admit: g}, nil }

type funcLayer struct {
	interceptor.GateOnly
	admit admitToy
}

func (l *funcLayer) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *funcLayer) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if err := l.admit(a, w); err != nil {
			return err
		}
		return inner.Admit(ctx, a, w)
	})
}

// refusalLog logs refusals.
type refusalLog struct {
	interceptor.NopObserver
	log *eventLog
}

func (l *refusalLog) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	l.log.add("refused %s %s", r.Layer, r.Reason)
}

// lazyStream is opened by its first SendMsg.
type lazyStream struct {
	grpc.ClientStream
	open func() (grpc.ClientStream, error)
}

func (s *lazyStream) SendMsg(m any) (err error) {
	if s.ClientStream == nil {
		if s.ClientStream, err = s.open(); err != nil {
			return err
		}
	}
	return s.ClientStream.SendMsg(m)
}

// foreignTwice makes a second attempt of a unary call that failed, and of a stream
// that fails before its first message.
func foreignTwice() interceptor.Spec {
	return interceptor.Foreign("twice",
		func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if err := invoker(ctx, m, req, reply, cc, opts...); err == nil {
				return nil
			}
			return invoker(ctx, m, req, reply, cc, opts...)
		},
		func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, m string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			again := func() (grpc.ClientStream, error) { return streamer(ctx, desc, cc, m, opts...) }
			s, err := again()
			return &twiceStream{ClientStream: s, again: again}, err
		})
}

type twiceStream struct {
	grpc.ClientStream
	again func() (grpc.ClientStream, error)
	sent  any
}

func (s *twiceStream) SendMsg(m any) error {
	s.sent = m
	return s.ClientStream.SendMsg(m)
}

func (s *twiceStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil || err == io.EOF || s.again == nil {
		return err
	}
	next, err := s.again()
	if err != nil {
		return err
	}
	s.ClientStream, s.again = next, nil
	next.SendMsg(s.sent)
	next.CloseSend()
	return next.RecvMsg(m)
}

// passForeign only passes calls on.
func passForeign() interceptor.Spec {
	return interceptor.Foreign("pass", foreignUnary, func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, m string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		return streamer(ctx, desc, cc, m, opts...)
	})
}

func foreignUnary(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoker(ctx, m, req, reply, cc, opts...)
}
