// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"slices"
	"strings"
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

type recorder struct {
	interceptor.NopObserver
	log eventLog
}

func (r *recorder) Admitted(c interceptor.Observed) {
	r.log.add("admitted %s %s %d", c.Method, c.Kind, c.Attempt)
}

func (r *recorder) Refused(c interceptor.Observed, re *interceptor.Refusal) {
	r.log.add("refused %s %s %s", c.Method, re.Layer, re.Reason)
}

func (r *recorder) Attempt(c interceptor.Observed) { r.log.add("attempt %s %d", c.Method, c.Attempt) }

func (r *recorder) InFlight(_ interceptor.Observed, d int) { r.log.add("inflight %+d", d) }

func (r *recorder) Waited(c interceptor.Observed, l string, d time.Duration) {
	r.log.add("waited %s %s %v", c.Method, l, d)
}

func (r *recorder) Ended(c interceptor.Observed, e interceptor.ObservedEnd) {
	r.log.add("ended %s %s %s %s", c.Method, c.Kind, e.Outcome, status.Code(e.Err))
}

func TestObserver(t *testing.T) {
	t.Run("is_told_what_gates_are", func(t *testing.T) {
		for _, kind := range allKinds {
			synctest.Test(t, func(t *testing.T) {
				obs := &recorder{}
				f := newFixture(t, "pick_first", "dial_options", nil, interceptor.Observe(obs), &gateToy{})
				f.fail(codes.Aborted, "")
				f.call(t, kind)
				f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "")}))
				f.call(t, kind)
				var ended []string
				for _, e := range obs.log.take() {
					if strings.HasPrefix(e, "ended") {
						ended = append(ended, e)
					}
				}
				what := "ended " + methodOf[kind] + " " + kind.String()
				if want := []string{what + " failed Aborted", what + " not_sent Unavailable"}; !slices.Equal(ended, want) {
					t.Errorf("observed %q, want %q", ended, want)
				}
			})
		}
	})

	t.Run("sees_admissions_attempts_refusals_and_ends", func(t *testing.T) {
		obs := &recorder{}
		tokens := newTokens(2)
		s := calltest.Stack(t, interceptor.Observe(obs), &retryToy{n: 3}, tokens)
		unavailable := status.Error(codes.Unavailable, "")
		s.Wrap(answers(unavailable, unavailable)).Invoke(context.Background(), "/m", nil, new(wrapperspb.StringValue))
		want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "admitted /m unary 1", "attempt /m 1",
			"refused /m tokens RATE_LIMIT", "ended /m unary failed Unavailable", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
		s.Wrap(answers()).Invoke(context.Background(), "/m", nil, nil)
		want = []string{"inflight +1", "refused /m tokens RATE_LIMIT", "ended /m unary not_sent ResourceExhausted", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
	})
}

// attemptEnds notes how attempts end.
type attemptEnds struct {
	interceptor.NopObserver
	log eventLog
}

func (r *attemptEnds) AttemptEnded(c interceptor.Observed, e interceptor.ObservedEnd) {
	r.log.add("%s %d %s %v %s %s %v", c.Stack, c.Attempt, c.Kind, e.Took, e.Outcome, status.Code(e.Err), c.Context.Value(ctxKey{}))
}

func (r *attemptEnds) Ended(c interceptor.Observed, e interceptor.ObservedEnd) {
	r.log.add("call %s %v %s %s", c.Stack, e.Took, e.Outcome, status.Code(e.Err))
}

type ctxKey struct{}

func TestObserverEnds(t *testing.T) {
	t.Run("of_unary_attempts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			obs, second := &attemptEnds{}, &attemptEnds{}
			s := calltest.Stack(t, interceptor.Observe(obs, second), interceptor.Named("orders"), &retryToy{n: 2})
			n := 0
			err := s.UnaryClientInterceptor()(context.WithValue(t.Context(), ctxKey{}, "v"), "/m", nil, new(wrapperspb.StringValue), nil,
				func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
					time.Sleep(time.Second)
					if n++; n == 1 {
						return status.Error(codes.Unavailable, "")
					}
					return nil
				})
			if err != nil {
				t.Fatal(err)
			}
			want := []string{"orders 0 unary 1s failed Unavailable v", "orders 1 unary 1s ok OK v", "call orders 2s ok OK"}
			for i, o := range []*attemptEnds{obs, second} {
				if got := o.log.take(); !slices.Equal(got, want) {
					t.Errorf("observer %d was told %q, want %q", i, got, want)
				}
			}
		})
	})
	t.Run("of_streams", func(t *testing.T) {
		for _, kind := range allKinds {
			synctest.Test(t, func(t *testing.T) {
				obs := &attemptEnds{}
				f := newFixture(t, "pick_first", "dial_options", nil, interceptor.Observe(obs), &gateToy{})
				f.call(t, kind)
				got := obs.log.take()
				if len(got) != 2 || !strings.HasPrefix(got[0], "stack 0 "+kind.String()) || !strings.HasPrefix(got[1], "call stack ") {
					t.Errorf("observed %q, want the end of one attempt and of its call", got)
				}
			})
		}
	})
}

func TestNamed(t *testing.T) {
	if got := calltest.Stack(t).Name(); got != "stack" {
		t.Errorf("a stack without a name is %q", got)
	}
	if got := calltest.Stack(t, interceptor.Named("orders")).Name(); got != "orders" {
		t.Errorf("a stack with the name orders is %q", got)
	}
	if _, err := interceptor.NewStack(interceptor.Named("a"), interceptor.Named("b")); err == nil {
		t.Error("a stack may have two names")
	}
	_, err := interceptor.NewStack(interceptor.Named(""))
	var wrong *interceptor.ConfigError
	if !errors.As(err, &wrong) || wrong.Field != "Named" {
		t.Errorf("error %v for an empty name, want a ConfigError", err)
	}
}
