// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// againToy passes a call that failed to next a second time.
type againToy struct {
	interceptor.CallOnly
	_ byte
}

func (l *againToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*againToy) Traits() interceptor.Traits { return 0 }

func (*againToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if err := next(ctx, c); err == nil {
			return nil
		}
		return next(ctx, c)
	}
}

// extraToy makes a further attempt, which nobody waits for if ends is set.
type extraToy struct {
	interceptor.CallOnly
	expendable, ends bool
}

func (l *extraToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*extraToy) Traits() interceptor.Traits { return interceptor.Hedges }

func (l *extraToy) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		origin.Expendable = l.expendable
		err := next(ctx, c)
		further, cancel := context.WithCancel(ctx)
		defer cancel()
		if l.ends {
			cancel()
		}
		if f, refused := again(further, &origin, interceptor.Forever); refused == nil {
			err = next(further, f)
		}
		return err
	}
}

// expendables notes of each attempt whether it is expendable.
type expendables struct {
	interceptor.GateOnly
	got []bool
}

func (l *expendables) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *expendables) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		l.got = append(l.got, a.Internals().Expendable())
		return inner.Admit(ctx, a, w)
	})
}

func TestAttempts(t *testing.T) {
	t.Run("of_an_expendable_one_are_expendable", func(t *testing.T) {
		e := &expendables{}
		s := calltest.Stack(t, &extraToy{expendable: true}, &extraToy{}, e)
		if err := s.Wrap(answers(nil, nil, nil, nil)).Invoke(t.Context(), calltest.Method, nil, new(wrapperspb.StringValue)); err != nil {
			t.Fatal(err)
		}
		// The first and its retry, then the hedge and its retry.
		if want := []bool{false, false, true, true}; !slices.Equal(e.got, want) {
			t.Errorf("expendable: %v, want %v", e.got, want)
		}
	})

	t.Run("observer_does_not_hear_of_one_that_nobody_wants", func(t *testing.T) {
		obs := &recorder{}
		s := calltest.Stack(t, interceptor.Observe(obs), &extraToy{ends: true})
		if err := s.Wrap(answers(nil)).Invoke(t.Context(), "/m", nil, new(wrapperspb.StringValue)); err != nil {
			t.Fatal(err)
		}
		want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "ended /m unary ok OK", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
	})

	t.Run("next_called_twice_is_an_error", func(t *testing.T) {
		log, obs := &eventLog{}, &recorder{}
		s := calltest.Stack(t, interceptor.Observe(obs), &againToy{}, &logToy{name: "attempt", log: log})
		unavailable := status.Error(codes.Unavailable, "")
		for range 2 { // The second call may be given the first one's Call.
			n := 0
			c := &conn{invoke: func(context.Context, string, any, any, ...grpc.CallOption) error { n++; return unavailable }}
			err := s.Wrap(c).Invoke(context.Background(), "/m", nil, nil)
			if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "interceptor.Again") || n != 1 {
				t.Errorf("got %v after %d attempts, want INTERNAL that names interceptor.Again, after one", err, n)
			}
			if got, want := log.take(), []string{"attempt 0 failed Unavailable"}; !slices.Equal(got, want) {
				t.Errorf("released %q, want %q", got, want)
			}
			want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "ended /m unary failed Internal", "inflight -1"}
			if got := obs.log.take(); !slices.Equal(got, want) {
				t.Errorf("observed %q, want %q", got, want)
			}
		}
	})

	t.Run("next_called_twice_for_a_stream_is_an_error", func(t *testing.T) {
		log := &eventLog{}
		opened := 0
		c := &conn{stream: func(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
			opened++
			return nil, status.Error(codes.Unavailable, "")
		}}
		_, err := calltest.Stack(t, &againToy{}, &logToy{name: "attempt", log: log}).Wrap(c).NewStream(t.Context(), descOf(interceptor.BidiStream), calltest.Method)
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "interceptor.Again") || opened != 1 {
			t.Errorf("got %v after %d streams, want INTERNAL that names interceptor.Again, after one", err, opened)
		}
		if got, want := log.take(), []string{"attempt 0 failed Unavailable"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("no_permit_is_held_during_a_backoff", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			unavailable := status.Error(codes.Unavailable, "the server's own")
			limit := newLimit("limit", 1)
			s := calltest.Stack(t, &retryToy{n: 2, backoff: time.Second}, limit)
			done := make(chan error)
			go func() {
				done <- s.Wrap(answers(unavailable, nil)).Invoke(context.Background(), calltest.Method, nil, new(wrapperspb.StringValue))
			}()
			synctest.Wait()
			select {
			case <-limit.slots: // Another call takes it during the back-off.
			default:
				t.Fatal("the permit is held while the call backs off")
			}
			time.Sleep(5 * time.Second)
			if len(done) != 0 {
				t.Error("the retry did not wait for a permit")
			}
			limit.slots <- struct{}{}
			if err := <-done; err != nil {
				t.Errorf("a retry that waited for a permit returned %v, want no error", err)
			}
		})
	})

	t.Run("refused_further_attempt_returns_the_servers_error_and_the_refusal", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			unavailable := status.Error(codes.Unavailable, "the server's own")
			obs, limit := &recorder{}, newLimit("limit", 1)
			s := calltest.Stack(t, interceptor.Observe(obs), &failFastToy{d: 3 * time.Second}, &retryToy{n: 2, backoff: time.Second}, limit)
			done := make(chan error)
			start := time.Now()
			go func() {
				done <- s.Wrap(answers(unavailable)).Invoke(context.Background(), "/m", nil, new(wrapperspb.StringValue))
			}()
			synctest.Wait()
			<-limit.slots
			err := <-done
			limit.slots <- struct{}{}
			if got := time.Since(start); got != 3*time.Second {
				t.Errorf("refused after %v, want what is left of the call's wait: 3s after its start", got)
			}
			r, ok := interceptor.AsRefusal(err)
			if !ok || r.Layer != "limit" || r.Reason != interceptor.ReasonConcurrency || !r.Further || r.NotSent() {
				t.Errorf("errors.As found %+v in %v, want the limit's refusal of a further attempt", r, err)
			}
			if st := status.Convert(err); !errors.Is(err, unavailable) || st.Message() != "the server's own" || st.Code() != codes.Unavailable {
				t.Errorf("the status is %v, want the server's", st)
			}
			want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "waited /m limit 2s", "refused /m limit CONCURRENCY",
				"ended /m unary failed Unavailable", "inflight -1"}
			if got := obs.log.take(); !slices.Equal(got, want) {
				t.Errorf("observed %q, want %q", got, want)
			}
		})
	})

	t.Run("hedge_never_waits", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limit, buffer := newLimit("limit", 1), newBuffer(5)
			s := calltest.Stack(t, &hedgeToy{}, buffer, limit)
			start := time.Now()
			if err := s.Wrap(calltest.Takes(time.Second)).Invoke(context.Background(), calltest.Method, nil, new(wrapperspb.StringValue)); err != nil || time.Since(start) != time.Second {
				t.Errorf("got %v after %v, want success after 1s, without a hedge", err, time.Since(start))
			}
			if err := errors.Join(s.Drain(context.Background()), limit.atRest()); err != nil {
				t.Error(err)
			}
		})
	})

	t.Run("counted_from_those_admitted", func(t *testing.T) {
		log, tokens := &eventLog{}, newTokens(2)
		s := calltest.Stack(t, &retryToy{n: 4}, &logToy{name: "attempt", log: log}, tokens)
		unavailable := status.Error(codes.Unavailable, "")
		s.Wrap(answers(unavailable, unavailable)).Invoke(context.Background(), calltest.Method, nil, new(wrapperspb.StringValue))
		want := []string{"attempt 0 failed Unavailable", "attempt 1 failed Unavailable", "attempt 2 not_sent ResourceExhausted"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("reply_and_results_are_the_winners", func(t *testing.T) {
		var replies []any
		var headers []*metadata.MD
		n := 0
		c := &conn{invoke: func(_ context.Context, _ string, _, reply any, opts ...grpc.CallOption) error {
			n++
			replies = append(replies, reply)
			reply.(*wrapperspb.StringValue).Value = fmt.Sprint("attempt ", n)
			for _, o := range opts {
				switch o := o.(type) {
				case grpc.HeaderCallOption:
					headers = append(headers, o.HeaderAddr)
					*o.HeaderAddr = metadata.Pairs("attempt", fmt.Sprint(n))
				case grpc.OnFinishCallOption:
					t.Error("an attempt was given the call's OnFinish")
				}
			}
			if n < 3 {
				return status.Error(codes.Unavailable, "")
			}
			return nil
		}}
		finished := 0
		var header metadata.MD
		reply := new(wrapperspb.StringValue)
		err := calltest.Stack(t, &retryToy{n: 3}).Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply,
			grpc.Header(&header), grpc.OnFinish(func(err error) {
				finished++
				if err != nil {
					t.Errorf("OnFinish(%v), want nil", err)
				}
			}))
		if err != nil || reply.Value != "attempt 3" || len(header["attempt"]) != 1 || header["attempt"][0] != "3" {
			t.Errorf("got %v, reply %q, header %v; want the third attempt's", err, reply.Value, header)
		}
		if finished != 1 {
			t.Errorf("OnFinish was called %d times, want once", finished)
		}
		if len(replies) != 3 || replies[0] == replies[1] || replies[1] == replies[2] || headers[1] == headers[2] || headers[0] == headers[1] {
			t.Errorf("attempts share a reply or a header")
		}
	})

	t.Run("start_from_the_call_as_it_was_outside", func(t *testing.T) {
		var sent []string
		c := &conn{invoke: func(_ context.Context, _ string, req, _ any, _ ...grpc.CallOption) error {
			sent = append(sent, req.(*wrapperspb.StringValue).Value)
			return status.Error(codes.Unavailable, "")
		}}
		double := mapping.Request(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
			return wrapperspb.String(m.Value + m.Value), nil
		})
		calltest.Stack(t, &retryToy{n: 3}, double).Wrap(c).Invoke(context.Background(), calltest.Method, wrapperspb.String("x"), new(wrapperspb.StringValue))
		if want := []string{"xx", "xx", "xx"}; !slices.Equal(sent, want) {
			t.Errorf("sent %q, want %q", sent, want)
		}
	})

	t.Run("loser_is_ignored_and_drain_waits_for_it", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log := &eventLog{}
			reply := new(wrapperspb.StringValue)
			c := &conn{invoke: func(ctx context.Context, _ string, _, r any, _ ...grpc.CallOption) error {
				if r == any(reply) {
					reply.Value = "winner"
					time.Sleep(time.Second)
					return nil
				}
				<-ctx.Done()
				r.(*wrapperspb.StringValue).Value = "loser"
				time.Sleep(time.Second) // A loser that takes its time.
				return status.FromContextError(ctx.Err()).Err()
			}}
			s := calltest.Stack(t, &logToy{name: "call", log: log}, &hedgeToy{}, &logToy{name: "attempt", log: log})
			start := time.Now()
			if err := s.Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply); err != nil || time.Since(start) != time.Second {
				t.Errorf("got %v after %v, want success after 1s", err, time.Since(start))
			}
			if err := s.Drain(context.Background()); err != nil || time.Since(start) != 2*time.Second {
				t.Errorf("Drain returned %v after %v, want nil after 2s, when the loser has ended", err, time.Since(start))
			}
			if reply.Value != "winner" {
				t.Errorf("reply = %q, want the winner's", reply.Value)
			}
			got := log.take()
			if !slices.Equal(got, []string{"attempt 0 ok OK", "call 0 ok OK", "attempt 1 ignored Canceled"}) {
				t.Errorf("released %q, want the winner ok, the call ok, the loser ignored", got)
			}
		})
	})

	t.Run("stream_opened_after_the_end_is_ignored", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log := &eventLog{}
			n := 0
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				if n++; n == 2 {
					time.Sleep(time.Second)
				}
				return &scriptStream{ctx: ctx, errs: []error{io.EOF}}, nil
			}}
			pair := &pairToy{opened: make(chan struct{})}
			s := calltest.Stack(t, pair, &logToy{name: "attempt", log: log})
			st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if err := st.RecvMsg(nil); err != io.EOF {
				t.Fatal(err)
			}
			<-pair.opened
			if err := s.Drain(context.Background()); err != nil {
				t.Fatal(err)
			}
			if got, want := log.take(), []string{"attempt 0 ok OK", "attempt 1 ignored Canceled"}; !slices.Equal(got, want) {
				t.Errorf("released %q, want %q", got, want)
			}
		})
	})

	t.Run("reply_passes_through_layers_inside", func(t *testing.T) {
		passes := passForeign()
		n := 0
		answersItself := interceptor.Foreign("answers", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if n == 0 {
				return invoker(ctx, m, req, reply, cc, opts...)
			}
			reply.(*wrapperspb.StringValue).Value = "second"
			return nil
		}, nil)
		c := &conn{invoke: func(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
			if n++; n == 1 {
				reply.(*wrapperspb.StringValue).Value = "first"
				return status.Error(codes.Unavailable, "")
			}
			reply.(*wrapperspb.StringValue).Value = "second"
			return nil
		}}
		for _, inside := range []interceptor.Spec{passes, answersItself} {
			n = 0
			reply := new(wrapperspb.StringValue)
			err := calltest.Stack(t, &retryToy{n: 2}, inside).Wrap(c).Invoke(context.Background(), calltest.Method, nil, reply)
			if err != nil || reply.Value != "second" {
				t.Errorf("retry > %v: got %v, reply %q; want the second attempt's", inside, err, reply.Value)
			}
		}
	})
}

// hedgeToy starts a further attempt beside the call, and the first success wins.
type hedgeToy struct {
	interceptor.CallOnly
	_ byte
}

func (l *hedgeToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*hedgeToy) Traits() interceptor.Traits { return interceptor.Hedges }

func (*hedgeToy) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		first, cancelFirst := context.WithCancel(ctx)
		defer cancelFirst()
		second, cancelSecond := context.WithCancel(ctx)
		defer cancelSecond()
		f, err := again(second, &origin, interceptor.None)
		if err != nil {
			return next(first, c)
		}
		done := make(chan error, 1)
		go func() {
			err := next(second, f)
			if err == nil {
				cancelFirst()
			}
			done <- err
		}()
		if err := next(first, c); err == nil {
			return nil
		}
		err = <-done
		c.Adopt(f)
		return err
	}
}

// pairToy opens a second stream beside the one that the caller gets.
type pairToy struct {
	interceptor.CallOnly
	opened chan struct{} // Closed when the second one is open.
}

func (l *pairToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*pairToy) Traits() interceptor.Traits { return 0 }

func (l *pairToy) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		if err := next(ctx, c); err != nil {
			return err
		}
		second, err := again(ctx, &origin, interceptor.None)
		if err != nil {
			return err
		}
		go func() {
			defer close(l.opened)
			next(ctx, second)
		}()
		return nil
	}
}
