// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// wantRefusedAgain checks that err is the server's, with its status, and says who
// refused the further attempt.
func wantRefusedAgain(t *testing.T, err error, layer string, reason interceptor.Reason) {
	t.Helper()
	if status.Code(err) != codes.Unavailable || status.Convert(err).Message() != status.Convert(unavailable).Message() {
		t.Errorf("the status of %v is not the server's, %v", err, unavailable)
	}
	if r, ok := interceptor.AsRefusal(err); !ok || r.Layer != layer || r.Reason != reason || !r.Further || r.NotSent() {
		t.Errorf("got %v, want that %s refused the further attempt: %s", err, layer, reason)
	}
}

func wantBalance(t *testing.T, l *retry.Layer, want float64) {
	t.Helper()
	if got := l.Budget().Balance(); math.Abs(got-want) > 1e-9 {
		t.Errorf("balance = %v, want %v", got, want)
	}
}

// one is a limit of one.
var one = concurrency.Config{Limit: 1}

func TestAdmission(t *testing.T) {
	// The call "flaky" fails after 1 s, when two others wait for the only permit. Its
	// back-off is over before the first of them is.
	run := func(t *testing.T, specs ...interceptor.Spec) (sent []string, errs map[string]error) {
		type key struct{}
		c := calltest.Stack(t, specs...).Wrap(calltest.Server(func(ctx context.Context) error {
			sent = append(sent, ctx.Value(key{}).(string))
			time.Sleep(time.Second)
			if len(sent) == 1 {
				return unavailable
			}
			return nil
		}))
		errs = make(map[string]error)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for _, n := range []string{"flaky", "one", "two"} {
			wg.Go(func() {
				err := c.Invoke(context.WithValue(context.Background(), key{}, n), method, nil, &struct{}{})
				mu.Lock()
				defer mu.Unlock()
				errs[n] = err
			})
			synctest.Wait()
		}
		wg.Wait()
		return sent, errs
	}
	t.Run("waits_ahead_of_first_attempts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			l := mustNew(t, quick)
			sent, errs := run(t, l, one)
			if want := []string{"flaky", "one", "flaky", "two"}; !slices.Equal(sent, want) || errs["flaky"] != nil {
				t.Errorf("sent %v, %v; want %v and no error", sent, errs, want)
			}
			wantBalance(t, l, 100+3*0.2-1)
		})
	})
	t.Run("waits_no_longer_than_its_call_may", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			e, l := &events{}, mustNew(t, quick)
			// The first attempt need not wait, and the further one may not.
			s := calltest.Stack(t, interceptor.Observe(e), loadshed.Config{}, l, one).Wrap(calltest.Server(func(ctx context.Context) error {
				time.Sleep(time.Second)
				return unavailable
			}))
			done := make(chan error)
			go func() { done <- s.Invoke(t.Context(), method, nil, &struct{}{}) }()
			time.Sleep(1005 * time.Millisecond) // In the back-off.
			go s.Invoke(t.Context(), method, nil, &struct{}{})
			wantRefusedAgain(t, <-done, "concurrency", interceptor.ReasonConcurrency)
			time.Sleep(10 * time.Second)
			synctest.Wait()
			refused := 0
			for _, log := range e.log {
				if log == "refused concurrency CONCURRENCY" {
					refused++
				}
			}
			if refused != 1 {
				t.Errorf("the observer saw %d refusals in %q, want that of the further attempt, once", refused, e.log)
			}
			wantBalance(t, l, 100+2*0.2-2) // The other call was repeated twice.
		})
	})
	t.Run("is_ended_by_the_caller", func(t *testing.T) {
		for name, end := range map[string]func(t *testing.T) (context.Context, context.CancelFunc){
			"cancelled": func(t *testing.T) (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(t.Context())
				time.AfterFunc(1500*time.Millisecond, cancel)
				return ctx, cancel
			},
			"deadline": func(t *testing.T) (context.Context, context.CancelFunc) {
				return context.WithTimeout(t.Context(), 1500*time.Millisecond)
			},
		} {
			synctest.Test(t, func(t *testing.T) {
				l := mustNew(t, quick)
				first := true
				c := calltest.Stack(t, l, one).Wrap(calltest.Server(func(context.Context) error {
					time.Sleep(time.Second)
					if first {
						first = false
						return unavailable
					}
					return nil
				}))
				ctx, cancel := end(t)
				defer cancel()
				done := make(chan error)
				go func() { done <- c.Invoke(ctx, method, nil, &struct{}{}) }()
				synctest.Wait()
				go c.Invoke(context.Background(), method, nil, &struct{}{})
				err := <-done
				switch {
				case name == "deadline":
					wantRefusedAgain(t, err, "concurrency", interceptor.ReasonDeadline)
				case status.Code(err) != codes.Canceled || !errors.Is(err, unavailable):
					t.Errorf("cancelled: got %v, want CANCELLED that wraps the server's error", err)
				}
				time.Sleep(2 * time.Second)
				synctest.Wait()
				wantBalance(t, l, 100+2*0.2)
			})
		}
	})
}

func TestEnd(t *testing.T) {
	for how, reason := range map[string]interceptor.Reason{"drain": interceptor.ReasonDrain, "close": interceptor.ReasonClosed} {
		for kind := interceptor.Unary; kind <= interceptor.BidiStream; kind++ {
			t.Run(how+"_ends_a_back_off/"+kind.String(), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					srv := testserver.New(t, testserver.InMemory())
					if err := srv.Fail(codes.Unavailable, 1); err != nil {
						t.Fatal(err)
					}
					e := &events{}
					l := mustNew(t, retry.Config{MaxAttempts: 5, Backoff: retry.Backoff{Initial: 10 * time.Second, Max: 20 * time.Second, Jitter: retry.NoJitter}})
					stack := calltest.Stack(t, interceptor.Observe(e), l)
					conn, err := srv.NewClient(stack.DialOptions()...)
					if err != nil {
						t.Fatal(err)
					}
					defer conn.Close()
					done := make(chan error, 1)
					go func() {
						_, err := calltest.Exchange(context.Background(), testingv1.NewTestServiceClient(conn), kind)
						done <- err
					}()
					time.Sleep(time.Second)
					start := time.Now()
					if how == "close" {
						conn.Close()
					}
					if err := stack.Drain(t.Context()); err != nil {
						t.Error(err)
					}
					err = <-done
					layer := "stack"
					if how == "close" {
						layer = "connection"
					}
					if r, ok := interceptor.AsRefusal(err); status.Code(err) != codes.Unavailable || !ok || r.Layer != layer || r.Reason != reason || !r.Further {
						t.Errorf("got %v, want the server's error, and reason %s", err, reason)
					}
					if took := time.Since(start); took != 0 || srv.Stats().Started != 1 {
						t.Errorf("the call ended %v later after %d attempts, want at once and one", took, srv.Stats().Started)
					}
					if want := fmt.Sprintf("refused %s %s", layer, reason); !slices.Contains(e.log, want) {
						t.Errorf("the observer saw %q, want %q", e.log, want)
					}
					wantBalance(t, l, 100.2)
				})
			})
		}
	}
	t.Run("a_stack_that_drains_makes_no_further_attempt", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var stack *interceptor.Stack
			s := &server{t: t, answer: func(int, string) (string, metadata.MD, error) {
				go stack.Drain(context.Background())
				synctest.Wait()
				return "", metadata.Pairs("grpc-retry-pushback-ms", "0"), unavailable
			}}
			stack = calltest.Stack(t, mustNew(t, quick))
			err := stack.Wrap(s).Invoke(t.Context(), method, wrapperspb.String(""), new(wrapperspb.StringValue))
			wantRefusedAgain(t, err, "stack", interceptor.ReasonDrain)
			if s.attempts() != 1 {
				t.Errorf("%d attempts, want one", s.attempts())
			}
		})
	})
}

func TestMaxServerDelay(t *testing.T) {
	slow := retry.Backoff{Initial: 10 * time.Millisecond, Max: time.Minute, Jitter: retry.NoJitter}
	for _, tc := range []struct {
		name  string
		c     retry.Config
		delay time.Duration
		want  bool
	}{
		{"default", quick, 10 * time.Second, true},
		{"more_than_the_default", quick, 10*time.Second + time.Millisecond, false},
		{"an_hour", quick, time.Hour, false},
		{"less_than_the_longest_back_off", retry.Config{Backoff: slow}, time.Minute, true},
		{"more_than_the_longest_back_off", retry.Config{Backoff: slow}, time.Hour, false},
		{"its_own", retry.Config{MaxServerDelay: time.Second, Backoff: slow}, time.Second, true},
		{"more_than_its_own", retry.Config{MaxServerDelay: time.Second, Backoff: slow}, 2 * time.Second, false},
	} {
		for by, s := range map[string]*server{
			"RetryInfo": always(t, retryInfo(t, codes.Unavailable, tc.delay), nil),
			"pushback":  always(t, unavailable, metadata.Pairs("grpc-retry-pushback-ms", fmt.Sprint(tc.delay.Milliseconds()))),
		} {
			t.Run(tc.name+"/"+by, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					s.t = t
					start := time.Now()
					_, err := s.call(t.Context(), nil, mustNew(t, tc.c))
					if _, refused := interceptor.AsRefusal(err); refused || status.Code(err) != codes.Unavailable {
						t.Errorf("got %v, want the server's error", err)
					}
					if strings.Contains(err.Error(), "more than MaxServerDelay") == tc.want {
						t.Errorf("%v: does it say that the delay is too long? want %v", err, !tc.want)
					}
					if took := time.Since(start); (took > 0) != tc.want || (s.attempts() > 1) != tc.want {
						t.Errorf("%d attempts in %v, repeated: %v", s.attempts(), took, tc.want)
					}
				})
			})
		}
	}
}

// A back-off that would end after the call's deadline is not begun, and the error says so.
func TestDeadlineBeforeNextAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fails(t, unavailable)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := s.call(ctx, nil, mustNew(t, retry.Config{Backoff: retry.Backoff{Initial: time.Minute, Max: time.Minute, Jitter: retry.NoJitter}}))
		if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "the call's deadline passes before the delay of 1m0s") {
			t.Errorf("%v, want UNAVAILABLE, and why it is not repeated", err)
		}
	})
}

// A connection that cannot be made for 1 s, and calls that must not be sent twice.
func TestNotSent(t *testing.T) {
	run := func(t *testing.T, kind interceptor.Kind, c retry.Config, fail bool) (l *retry.Layer, srv *testserver.Server, e *events, err error) {
		srv = testserver.New(t, testserver.InMemory())
		srv.Stop()
		time.AfterFunc(time.Second, func() {
			if err := srv.Restart(context.Background()); err != nil {
				t.Error(err)
			}
			if fail {
				if err := srv.Fail(codes.Unavailable, 1); err != nil {
					t.Error(err)
				}
			}
		})
		e = &events{}
		l = mustNew(t, c, retry.WithIdempotent(func(string) bool { return fail }))
		conn := testserver.Dial(t, srv, calltest.Stack(t, interceptor.Observe(e), l).DialOptions()...)
		var header metadata.MD
		_, err = calltest.Exchange(t.Context(), testingv1.NewTestServiceClient(conn), kind, grpc.Header(&header))
		if err == nil && len(header["content-type"]) == 0 {
			t.Errorf("header %v, want that of the attempt that succeeded", header)
		}
		return l, srv, e, err
	}
	late := retry.Config{Backoff: retry.Backoff{Initial: 5 * time.Second, Multiplier: 1, Jitter: retry.NoJitter}}
	for kind := interceptor.Unary; kind <= interceptor.BidiStream; kind++ {
		t.Run("is_repeated_whatever_the_method/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, srv, _, err := run(t, kind, late, false)
				if err != nil || srv.Stats().Started != 1 {
					t.Errorf("got %v after %d attempts that were sent, want success of one", err, srv.Stats().Started)
				}
				wantBalance(t, l, 100+0.2-1)
			})
		})
		t.Run("costs_nothing/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, srv, e, err := run(t, kind, quick, false)
				time.Sleep(2 * time.Second)
				if status.Code(err) != codes.Unavailable || srv.Stats().Started != 0 {
					t.Errorf("got %v after %d attempts that were sent, want UNAVAILABLE after none", err, srv.Stats().Started)
				}
				if got := strings.Count(strings.Join(e.log, ","), "attempt "); got != 3 {
					t.Errorf("%d attempts, want MaxAttempts: %q", got, e.log)
				}
				wantBalance(t, l, 100)
			})
		})
		t.Run("does_not_count/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, srv, _, err := run(t, kind, late, true)
				if status.Code(err) != codes.Unavailable || srv.Stats().Started != 3 {
					t.Errorf("got %v after %d attempts that were sent, want MaxAttempts besides the one that was not", err, srv.Stats().Started)
				}
				wantBalance(t, l, 100+0.2-3)
			})
		})
	}
	t.Run("keeps_no_number", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var mu sync.Mutex
			var previous []string
			srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(
				grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
					md, _ := metadata.FromIncomingContext(ctx)
					mu.Lock()
					defer mu.Unlock()
					previous = append(previous, strings.Join(md.Get("grpc-previous-rpc-attempts"), ","))
					return nil, unavailable
				})))
			srv.Stop()
			time.AfterFunc(time.Second, func() {
				if err := srv.Restart(context.Background()); err != nil {
					t.Error(err)
				}
			})
			conn := testserver.Dial(t, srv, calltest.Stack(t, mustNew(t, late)).DialOptions()...)
			calltest.Exchange(t.Context(), testingv1.NewTestServiceClient(conn), interceptor.Unary)
			if want := []string{"", "1", "2"}; !slices.Equal(previous, want) {
				t.Errorf("attempts carried grpc-previous-rpc-attempts %q, want %q", previous, want)
			}
		})
	})
}
