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

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
)

const method = "/test.Service/Method"

var (
	unavailable = status.Error(codes.Unavailable, "try again")
	// quick is a configuration whose back-offs are known.
	quick = retry.Config{Backoff: retry.Backoff{Initial: 10 * time.Millisecond, Jitter: retry.NoJitter}}
)

// mustNew returns a layer that repeats all methods, unless c names some.
func mustNew(t testing.TB, c retry.Config, opts ...retry.Option) *retry.Layer {
	t.Helper()
	c.AllMethods = c.Methods == nil
	l, err := retry.New(c, opts...)
	if err != nil {
		t.Fatalf("New(%+v): %v", c, err)
	}
	return l
}

// repeatAll is a policy.
func repeatAll(context.Context, *retry.Attempt) retry.Decision { return retry.Decision{Repeat: true} }

// server answers unary attempts.
type server struct {
	t      *testing.T
	answer func(n int, req string) (reply string, trailer metadata.MD, err error) // n counts from 1.

	mu   sync.Mutex
	seen []string    // Requests.
	at   []time.Time // When.
	ctxs []context.Context
}

// fails answers with the errors in turn, and then with success.
func fails(t *testing.T, errs ...error) *server {
	return &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) {
		if n <= len(errs) {
			return "", nil, errs[n-1]
		}
		return "ok", nil, nil
	}}
}

// always answers with err.
func always(t *testing.T, err error, trailer metadata.MD) *server {
	return &server{t: t, answer: func(int, string) (string, metadata.MD, error) { return "", trailer, err }}
}

func (s *server) Invoke(ctx context.Context, _ string, req, reply any, opts ...grpc.CallOption) error {
	s.mu.Lock()
	s.seen = append(s.seen, req.(*wrapperspb.StringValue).GetValue())
	s.at = append(s.at, time.Now())
	s.ctxs = append(s.ctxs, ctx)
	n := len(s.seen)
	s.mu.Unlock()
	r, trailer, err := s.answer(n, req.(*wrapperspb.StringValue).GetValue())
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.TrailerCallOption:
			*o.TrailerAddr = trailer
		case grpc.HeaderCallOption:
			*o.HeaderAddr = metadata.Pairs("attempt", fmt.Sprint(n))
		case grpc.OnFinishCallOption:
			s.t.Error("an attempt was given the call's OnFinish")
		}
	}
	if reply != nil {
		reply.(*wrapperspb.StringValue).Value = r
	}
	return err
}

func (s *server) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("the server takes unary calls")
}

func (s *server) attempts() int { return len(s.seen) }

// call makes a call through the layers.
func (s *server) call(ctx context.Context, opts []grpc.CallOption, layers ...interceptor.Spec) (string, error) {
	s.t.Helper()
	reply := new(wrapperspb.StringValue)
	err := calltest.Stack(s.t, layers...).Wrap(s).Invoke(ctx, method, wrapperspb.String("hello"), reply, opts...)
	return reply.GetValue(), err
}

// The tests that Tower's own retry has, by their names there.

func TestTowerRetryErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fails(t, unavailable)
		got, err := s.call(t.Context(), nil, mustNew(t, quick))
		if got != "ok" || err != nil {
			t.Errorf("got %q, %v, want the second attempt's answer", got, err)
		}
		if want := []string{"hello", "hello"}; !slices.Equal(s.seen, want) {
			t.Errorf("the server saw %q, want %q", s.seen, want)
		}
	})
}

func TestTowerRetryLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) {
			return "", nil, status.Errorf(codes.Unavailable, "retry %d", n)
		}}
		_, err := s.call(t.Context(), nil, mustNew(t, quick))
		if s.attempts() != 3 || status.Convert(err).Message() != "retry 3" {
			t.Errorf("%d attempts, %v; want 3 and the third's error", s.attempts(), err)
		}
		if _, refused := interceptor.AsRefusal(err); refused {
			t.Errorf("the last error of all attempts is %T, want the server's as it was", err)
		}
	})
}

func TestTowerRetryErrorInspection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fails(t, status.Error(codes.Internal, "retry 1"), status.Error(codes.Internal, "reject"))
		_, err := s.call(t.Context(), nil, mustNew(t, quick, retry.WithPolicy(func(_ context.Context, a *retry.Attempt) retry.Decision {
			return retry.Decision{Repeat: a.Err != nil && status.Convert(a.Err).Message() != "reject"}
		})))
		if s.attempts() != 2 || status.Convert(err).Message() != "reject" {
			t.Errorf("%d attempts, %v; want 2 and the error that the policy rejects", s.attempts(), err)
		}
	})
}

func TestTowerRetryCannotCloneRequest(t *testing.T) {
	c := quick
	c.Methods = []string{} // None but those that are declared.
	l := mustNew(t, c, retry.WithPolicy(repeatAll))
	s := fails(t, unavailable)
	_, err := s.call(t.Context(), nil, l)
	wantRefusedAgain(t, err, "retry", interceptor.ReasonNotIdempotent)
	if s.attempts() != 1 {
		t.Errorf("%d attempts, want one", s.attempts())
	}
	s = fails(t)
	if got, err := s.call(t.Context(), nil, l); got != "ok" || err != nil {
		t.Errorf("got %q, %v, want success passed through", got, err)
	}
}

func TestTowerRetryMutatingPolicy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fails(t)
		var replies []string
		_, err := s.call(t.Context(), nil, mustNew(t, quick, retry.WithPolicy(func(_ context.Context, a *retry.Attempt) retry.Decision {
			replies = append(replies, a.Reply.(*wrapperspb.StringValue).GetValue())
			if a.N == 3 {
				a.Err = errors.New("out of retries")
				return retry.Decision{}
			}
			a.Request = wrapperspb.String("retrying")
			return retry.Decision{Repeat: true}
		})))
		if err == nil || err.Error() != "out of retries (after 3 attempts)" {
			t.Errorf("got %v, want the policy's error", err)
		}
		if want := []string{"hello", "retrying", "retrying"}; !slices.Equal(s.seen, want) {
			t.Errorf("the server saw %q, want %q", s.seen, want)
		}
		if want := []string{"ok", "ok", "ok"}; !slices.Equal(replies, want) {
			t.Errorf("the policy saw the replies %q, want %q", replies, want)
		}
	})
}

func TestPolicyWithoutBudgetKeepsSuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) { return fmt.Sprint("answer ", n), nil, nil }}
		l := mustNew(t, retry.Config{MaxAttempts: 9, Backoff: quick.Backoff, Budget: budget.Config{MinPerSecond: 0.4, Ratio: budget.None}},
			retry.WithPolicy(repeatAll))
		if got, err := s.call(t.Context(), nil, l); got != "answer 5" || err != nil {
			t.Errorf("got %q, %v, want the last answer that a budget of 4 pays for", got, err)
		}
	})
}

// What is repeated.

func TestCodes(t *testing.T) {
	for code := codes.Canceled; code <= codes.Unauthenticated; code++ {
		for _, tc := range []struct {
			codes []codes.Code
			want  bool
		}{
			{nil, code == codes.Unavailable},
			{[]codes.Code{codes.Aborted, codes.Internal}, code == codes.Aborted || code == codes.Internal},
			{[]codes.Code{}, false},
		} {
			synctest.Test(t, func(t *testing.T) {
				c := quick
				c.Codes = tc.codes
				s := fails(t, status.Error(code, ""))
				s.call(t.Context(), nil, mustNew(t, c))
				if got := s.attempts() > 1; got != tc.want {
					t.Errorf("codes %v: %v is repeated: %v, want %v", tc.codes, code, got, tc.want)
				}
			})
		}
	}
}

// retryInfo returns a status with a RetryInfo.
func retryInfo(t *testing.T, code codes.Code, d time.Duration) error {
	t.Helper()
	st, err := status.New(code, "come back").WithDetails(
		&errdetails.ErrorInfo{Reason: "BUSY"}, &errdetails.RetryInfo{RetryDelay: durationpb.New(d)})
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestServerDelay(t *testing.T) {
	exhausted := status.Error(codes.ResourceExhausted, "")
	pushback := func(v ...string) metadata.MD { return metadata.MD{"grpc-retry-pushback-ms": v} }
	for _, tc := range []struct {
		name    string
		err     error
		trailer metadata.MD
		want    string // When attempts are made.
	}{
		{"nothing said: backed off", unavailable, nil, "0s 10ms 30ms"},
		{"RESOURCE_EXHAUSTED without RetryInfo is not repeated", exhausted, nil, "0s"},
		{"RESOURCE_EXHAUSTED with RetryInfo is repeated after it", retryInfo(t, codes.ResourceExhausted, time.Second), nil, "0s 1s 2s"},
		{"RESOURCE_EXHAUSTED with pushback is repeated after it", exhausted, pushback("700"), "0s 700ms 1.4s"},
		{"RetryInfo is the least to wait", retryInfo(t, codes.Unavailable, 15*time.Millisecond), nil, "0s 15ms 35ms"},
		{"a RetryInfo of no time", retryInfo(t, codes.ResourceExhausted, 0), nil, "0s 10ms 30ms"},
		{"a RetryInfo of negative time", retryInfo(t, codes.Unavailable, -time.Hour), nil, "0s 10ms 30ms"},
		{"RetryInfo does not make a code one to repeat", retryInfo(t, codes.Internal, time.Second), nil, "0s"},
		{"pushback replaces the back-off", unavailable, pushback("3"), "0s 3ms 6ms"},
		{"pushback goes before RetryInfo", retryInfo(t, codes.Unavailable, time.Second), pushback("3"), "0s 3ms 6ms"},
		{"pushback of no time", unavailable, pushback("0"), "0s 0s 0s"},
		{"negative pushback stops", unavailable, pushback("-1"), "0s"},
		{"unparseable pushback stops", unavailable, pushback("soon"), "0s"},
		{"pushback beyond an int32 stops", unavailable, pushback("99999999999"), "0s"},
		{"two pushbacks stop", unavailable, pushback("1", "2"), "0s"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				s := always(t, tc.err, tc.trailer)
				if _, err := s.call(t.Context(), nil, mustNew(t, quick)); !errors.Is(err, tc.err) {
					t.Errorf("got %v, want the server's error", err)
				}
				var at []string
				for _, a := range s.at {
					at = append(at, a.Sub(start).String())
				}
				if got := strings.Join(at, " "); got != tc.want {
					t.Errorf("attempts at %s, want %s", got, tc.want)
				}
			})
		})
	}
}

// What the server says is heard through an interceptor of somebody else's, too.
func TestServerDelayThroughForeign(t *testing.T) {
	for _, tc := range []struct {
		pushback string
		attempts int
	}{{"-1", 1}, {"", retry.DefaultMaxAttempts}} {
		foreign := interceptor.Foreign("pass", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoker(ctx, m, req, reply, cc, opts...)
		}, nil)
		synctest.Test(t, func(t *testing.T) {
			trailer := metadata.MD{}
			if tc.pushback != "" {
				trailer.Set("grpc-retry-pushback-ms", tc.pushback)
			}
			s := always(t, unavailable, trailer)
			if _, err := s.call(t.Context(), nil, mustNew(t, quick), foreign); !errors.Is(err, unavailable) {
				t.Errorf("pushback %q: got %v, want the server's error", tc.pushback, err)
			}
			if s.attempts() != tc.attempts {
				t.Errorf("pushback %q: %d attempts, want %d", tc.pushback, s.attempts(), tc.attempts)
			}
		})
	}
}

func TestServerDelayResetsBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		s := &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) {
			if n == 3 {
				return "", metadata.Pairs("grpc-retry-pushback-ms", "100"), unavailable
			}
			return "", nil, unavailable
		}}
		c := quick
		c.MaxAttempts = 6
		s.call(t.Context(), nil, mustNew(t, c))
		var got []time.Duration
		for _, at := range s.at {
			got = append(got, at.Sub(start)/time.Millisecond)
		}
		if want := []time.Duration{0, 10, 30, 130, 140, 160}; !slices.Equal(got, want) {
			t.Errorf("attempts at %v ms, want %v", got, want)
		}
	})
}

func TestBackoffPastDeadlineFailsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
		defer cancel()
		c := quick
		c.MaxAttempts = 100
		l := mustNew(t, c)
		s := always(t, unavailable, nil)
		if _, err := s.call(ctx, nil, l); !errors.Is(err, unavailable) {
			t.Errorf("got %v, want the server's last error", err)
		}
		if got := time.Since(start); got != 10*time.Millisecond || s.attempts() != 2 {
			t.Errorf("%d attempts in %v, want 2 in 10ms: the next would come at the deadline", s.attempts(), got)
		}
		if got := l.Budget().Balance(); math.Abs(got-99.2) > 1e-9 {
			t.Errorf("balance = %v, want 100 + 0.2 - 1: the attempt that was not made costs nothing", got)
		}
	})
}

func TestBackoffCancelledKeepsServersError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(5*time.Millisecond, cancel)
		l := mustNew(t, quick)
		s := always(t, unavailable, nil)
		start := time.Now()
		_, err := s.call(ctx, nil, l)
		if status.Code(err) != codes.Canceled || !errors.Is(err, unavailable) || time.Since(start) != 5*time.Millisecond {
			t.Errorf("got %v after %v, want CANCELLED that wraps the server's error, at once", err, time.Since(start))
		}
		if got := l.Budget().Balance(); got != 100.2 {
			t.Errorf("balance = %v, want 100.2: the attempt was not made", got)
		}
	})
}

// tickets is a gate that notes how its tickets are released.
type tickets struct {
	interceptor.GateOnly
	name string
	log  *[]string
}

func (l *tickets) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *tickets) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Admission, w interceptor.Wait) error {
		c.Hold(l, int64(c.Attempt()))
		return inner.Admit(ctx, c, w)
	})
}

func (l *tickets) Release(n int64, e interceptor.End) {
	*l.log = append(*l.log, fmt.Sprintf("%s %d %s", l.name, n, e.Outcome))
}

func TestBackoffCancelledIsIgnoredOutside(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(5*time.Millisecond, cancel)
		var log []string
		always(t, unavailable, nil).call(ctx, nil, &tickets{name: "call", log: &log}, mustNew(t, quick), &tickets{name: "attempt", log: &log})
		if want := []string{"attempt 0 failed", "call 0 ignored"}; !slices.Equal(log, want) {
			t.Errorf("released %q, want %q", log, want)
		}
	})
}

// local is a layer whose call path fails attempts from the first-th on.
type local struct {
	interceptor.CallOnly
	first int
	err   error
	made  int
}

func (l *local) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *local) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if l.made++; l.made >= l.first {
			return l.err
		}
		return next(ctx, c)
	}
}

func TestRefusalIsNotRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := interceptor.Refuse("shed", interceptor.ReasonShed, "")
		l := mustNew(t, quick)
		inside := &local{first: 1, err: refused}
		if _, err := fails(t).call(t.Context(), nil, l, inside); err != error(refused) || inside.made != 1 {
			t.Errorf("%d attempts, %v; want one and the refusal", inside.made, err)
		}
		if got := l.Budget().Balance(); got != 100 {
			t.Errorf("balance = %v, want 100: nothing was sent, so nothing counts", got)
		}
		inside = &local{first: 2, err: refused}
		_, err := fails(t, unavailable).call(t.Context(), nil, l, inside)
		wantRefusedAgain(t, err, "shed", interceptor.ReasonShed)
		if inside.made != 2 {
			t.Errorf("%d attempts, want 2", inside.made)
		}
		if got := l.Budget().Balance(); got != 100.2 {
			t.Errorf("balance = %v, want 100.2: the retry was not sent", got)
		}
	})
}

// attemptTimeout is a third-party interceptor that limits each attempt to d, as the
// timeout layer does.
func attemptTimeout(d time.Duration) interceptor.Spec {
	return interceptor.Foreign("timeout", func(ctx context.Context, m string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		tctx, cancel := context.WithTimeout(ctx, d)
		defer cancel()
		err := invoker(tctx, m, req, reply, cc, opts...)
		if err != nil && tctx.Err() != nil && ctx.Err() == nil {
			return interceptor.Refuse("timeout", interceptor.ReasonDeadline, "").Because(err, true)
		}
		return err
	}, nil)
}

// slow answers after the given delays, and then at once.
type slow struct {
	server
	delays []time.Duration
}

func (s *slow) Invoke(ctx context.Context, m string, req, reply any, opts ...grpc.CallOption) error {
	if err := s.server.Invoke(ctx, m, req, reply, opts...); err != nil {
		return err
	}
	if n := s.attempts(); n <= len(s.delays) {
		select {
		case <-time.After(s.delays[n-1]):
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
	return nil
}

func TestDeadlineOfAttemptIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slow{server: server{t: t, answer: fails(t).answer}, delays: []time.Duration{time.Hour, time.Hour}}
		start := time.Now()
		reply := new(wrapperspb.StringValue)
		conn := calltest.Stack(t, mustNew(t, quick), attemptTimeout(time.Second)).Wrap(s)
		if err := conn.Invoke(t.Context(), method, wrapperspb.String(""), reply); err != nil || reply.GetValue() != "ok" {
			t.Errorf("got %v, want the third attempt's success", err)
		}
		if got, want := time.Since(start), 2*time.Second+30*time.Millisecond; got != want {
			t.Errorf("the call took %v, want %v", got, want)
		}
		s.seen = nil
		ctx, cancel := context.WithTimeout(t.Context(), time.Second/2)
		defer cancel()
		if err := conn.Invoke(ctx, method, wrapperspb.String(""), reply); status.Code(err) != codes.DeadlineExceeded || s.attempts() != 1 {
			t.Errorf("%d attempts, %v; want one and DEADLINE_EXCEEDED", s.attempts(), err)
		}
	})
}

func TestMethods(t *testing.T) {
	levels := map[string]descriptorpb.MethodOptions_IdempotencyLevel{
		"Unknown":    descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN,
		"Read":       descriptorpb.MethodOptions_NO_SIDE_EFFECTS,
		"Idempotent": descriptorpb.MethodOptions_IDEMPOTENT,
	}
	svc := &descriptorpb.ServiceDescriptorProto{Name: proto.String("Service")}
	for m, level := range levels {
		svc.Method = append(svc.Method, &descriptorpb.MethodDescriptorProto{
			Name: &m, InputType: proto.String(".google.protobuf.StringValue"), OutputType: proto.String(".google.protobuf.StringValue"),
			Options: &descriptorpb.MethodOptions{IdempotencyLevel: &level},
		})
	}
	fd, err := protodesc.NewFile(&descriptorpb.FileDescriptorProto{
		Name: proto.String("belfry/retry_test.proto"), Package: proto.String("belfry.retrytest"), Syntax: proto.String("proto3"),
		Dependency: []string{"google/protobuf/wrappers.proto"}, Service: []*descriptorpb.ServiceDescriptorProto{svc},
	}, protoregistry.GlobalFiles)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := protoregistry.GlobalFiles.FindFileByPath(fd.Path()); err != nil { // It stays when the test is run again.
		if err := protoregistry.GlobalFiles.RegisterFile(fd); err != nil {
			t.Fatal(err)
		}
	}
	c := quick
	c.Methods = []string{"/by.Name/Method", "/by.Service/"}
	for m, want := range map[string]bool{
		"/belfry.retrytest.Service/Unknown": false, "/belfry.retrytest.Service/Read": true, "/belfry.retrytest.Service/Idempotent": true,
		"/belfry.retrytest.Service/None": false, "/no.such/Method": false, "nonsense": false, "/belfry.retrytest.Service": false,
		"/by/function": true, "/by.Name/Method": true, "/by.Name/Other": false, "/by.Service/Any": true, "/by.Service": false,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := fails(t, unavailable)
			l := mustNew(t, c, retry.WithIdempotent(func(m string) bool { return m == "/by/function" }))
			calltest.Stack(t, l).Wrap(s).Invoke(t.Context(), m, wrapperspb.String(""), new(wrapperspb.StringValue))
			if got := s.attempts() == 2; got != want {
				t.Errorf("%s is repeated: %v, want %v", m, got, want)
			}
		})
	}
}

// What attempts get, and what callers do.

func TestAttemptsCarryNumberAndTried(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := fails(t, unavailable, unavailable)
		ctx := metadata.NewOutgoingContext(t.Context(), metadata.Pairs("key", "value"))
		if _, err := s.call(ctx, nil, mustNew(t, quick)); err != nil {
			t.Fatal(err)
		}
		var tried *attempt.Tried
		for i, ctx := range s.ctxs {
			md, _ := metadata.FromOutgoingContext(ctx)
			want := []string{fmt.Sprint(i)}
			if i == 0 {
				want = nil
			}
			if got := md.Get("grpc-previous-rpc-attempts"); !slices.Equal(got, want) {
				t.Errorf("attempt %d carries grpc-previous-rpc-attempts %q, want %q", i, got, want)
			}
			if got := md.Get("key"); !slices.Equal(got, []string{"value"}) {
				t.Errorf("attempt %d carries key %q, want the caller's", i, got)
			}
			info := attempt.FromContext(ctx, method, "", 0)
			if info == nil || info.Tried == nil || tried != nil && info.Tried != tried {
				t.Errorf("attempt %d has %+v, want the Tried of the first", i, info)
				continue
			}
			tried = info.Tried
		}
	})
}

func TestResultsAreThoseOfLastAttempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) {
			if n < 3 {
				return "of a failure", metadata.Pairs("n", fmt.Sprint(n), "grpc-retry-pushback-ms", "1"), unavailable
			}
			return "ok", metadata.Pairs("n", fmt.Sprint(n)), nil
		}}
		var header, trailer metadata.MD
		finished := 0
		got, err := s.call(t.Context(), []grpc.CallOption{
			grpc.Header(&header), grpc.Trailer(&trailer), grpc.OnFinish(func(error) { finished++ }),
		}, mustNew(t, quick))
		if got != "ok" || err != nil || finished != 1 {
			t.Errorf("got %q, %v and %d OnFinish, want ok and one", got, err, finished)
		}
		if h, tr := header.Get("attempt"), trailer.Get("n"); !slices.Equal(h, []string{"3"}) || !slices.Equal(tr, []string{"3"}) {
			t.Errorf("header %v, trailer %v; want the third attempt's", header, trailer)
		}
	})
}

func TestNestedRetryPassesPushbackOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &server{t: t, answer: func(n int, _ string) (string, metadata.MD, error) {
			if n == 2 {
				return "", metadata.Pairs("grpc-retry-pushback-ms", "-1"), unavailable
			}
			return "", nil, unavailable
		}}
		if _, err := s.call(t.Context(), nil, mustNew(t, quick), mustNew(t, quick)); !errors.Is(err, unavailable) || s.attempts() != 2 {
			t.Errorf("%d attempts, %v; want both layers to stop at the pushback of the second", s.attempts(), err)
		}
	})
}

// The budget.

// events notes what an observer sees.
type events struct {
	interceptor.NopObserver
	mu  sync.Mutex
	log []string
}

func (e *events) add(format string, args ...any) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.log = append(e.log, fmt.Sprintf(format, args...))
}

func (e *events) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	e.add("refused %s %s", r.Layer, r.Reason)
}
func (e *events) Attempt(c interceptor.Observed)       { e.add("attempt %d", c.Attempt) }
func (e *events) Budget(layer string, balance float64) { e.add("budget %s %.1f", layer, balance) }
func (e *events) Ended(_ interceptor.Observed, end interceptor.ObservedEnd) {
	e.add("ended %s %s", end.Outcome, status.Code(end.Err))
}

func TestBudgetSpentReturnsServersError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &events{}
		c := quick
		c.Budget = budget.Config{TTL: time.Second, MinPerSecond: 1, Ratio: budget.None}
		s := always(t, retryInfo(t, codes.Unavailable, 0), nil)
		start := time.Now()
		_, err := s.call(t.Context(), nil, interceptor.Observe(e), mustNew(t, c))
		if s.attempts() != 2 || time.Since(start) != 10*time.Millisecond {
			t.Errorf("%d attempts in %v, want 2 in 10ms: a budget that is spent is not waited for", s.attempts(), time.Since(start))
		}
		want := status.Convert(s.answer1())
		if got := status.Convert(err); !proto.Equal(got.Proto(), want.Proto()) {
			t.Errorf("the status is %v, want the server's, %v", got, want)
		}
		if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonBudget || r.Layer != "retry" || !r.Further {
			t.Errorf("the error is %v, want a refusal of a further attempt with reason BUDGET", err)
		}
		wantLog := []string{"budget retry 1.0", "attempt 0", "budget retry 0.0", "attempt 1", "budget retry 0.0", "refused retry BUDGET", "ended failed Unavailable"}
		if !slices.Equal(e.log, wantLog) {
			t.Errorf("the observer saw %q,\nwant %q", e.log, wantLog)
		}
	})
}

func (s *server) answer1() error { _, _, err := s.answer(1, ""); return err }

func TestBudgetShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, err := budget.New(budget.Config{TTL: time.Second, MinPerSecond: 3, Ratio: budget.None})
		if err != nil {
			t.Fatal(err)
		}
		total := 0
		for range 4 {
			s := always(t, unavailable, nil)
			s.call(t.Context(), nil, mustNew(t, quick, retry.WithBudget(b)))
			total += s.attempts()
		}
		if total != 4+3 {
			t.Errorf("%d attempts of 4 calls with one budget of 3, want 7", total)
		}
	})
}

func TestInvalidConfigChangesNothing(t *testing.T) {
	l := mustNew(t, retry.Config{Budget: budget.Config{MinPerSecond: 1}})
	for field, c := range map[string]retry.Config{
		"MaxAttempts": {MaxAttempts: 101}, "MaxAttempts is -1": {MaxAttempts: -1},
		"Codes[0]": {Codes: []codes.Code{codes.OK}}, "Codes[1]": {Codes: []codes.Code{codes.Internal, 17}},
		"BufferBytes": {BufferBytes: -1}, "BufferBytes is 1": {BufferBytes: 1 << 30},
		"Backoff.Max":    {Backoff: retry.Backoff{Max: -1}},
		"MaxServerDelay": {MaxServerDelay: -1},
		"Budget.TTL":     {Budget: budget.Config{TTL: 1}, MaxAttempts: 7},
	} {
		if _, err := retry.New(c); err == nil || !strings.HasPrefix(err.Error(), "retry: "+field) {
			t.Errorf("New(%+v) = %v, want an error that names %s", c, err, field)
		}
		if err := l.Update(c); err == nil || !strings.HasPrefix(err.Error(), "retry: "+field) {
			t.Errorf("Update(%+v) = %v, want an error that names %s", c, err, field)
		}
	}
	if got := l.Budget().Balance(); got != 10 {
		t.Errorf("balance = %v after bad updates, want 10 as before", got)
	}
	for name, o := range map[string]retry.Option{"WithBudget": retry.WithBudget(nil), "WithIdempotent": retry.WithIdempotent(nil), "WithPolicy": retry.WithPolicy(nil)} {
		if _, err := retry.New(retry.Config{}, o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("New with %s(nil) = %v, want an error that names it", name, err)
		}
	}
	b, err := budget.New(budget.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := retry.New(retry.Config{Budget: budget.Config{Ratio: 1}}, retry.WithBudget(b)); err == nil || !strings.Contains(err.Error(), "Budget") {
		t.Errorf("New with two budgets = %v, want an error that names Budget", err)
	}
}

func TestUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, quick)
		s := &server{t: t}
		s.answer = func(n int, _ string) (string, metadata.MD, error) {
			if n == 2 {
				if err := l.Update(retry.Config{AllMethods: true, MaxAttempts: 5, Backoff: quick.Backoff, Budget: budget.Config{MinPerSecond: 20}}); err != nil {
					t.Error(err)
				}
			}
			return "", nil, unavailable
		}
		s.call(t.Context(), nil, l)
		if s.attempts() != 5 {
			t.Errorf("%d attempts, want 5 as of the update during the call", s.attempts())
		}
		if got := l.Budget().Balance(); math.Abs(got-196.2) > 1e-9 {
			t.Errorf("balance = %v, want 200 + 0.2 - 4", got)
		}
	})
}

func TestConformance(t *testing.T) {
	layertest.Run(t, func() (interceptor.Spec, func() error) {
		l := mustNew(t, retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}})
		return l, nil
	})
}

func TestConformanceBetweenGates(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
		outer, inner := new(calltest.Counter), new(calltest.Counter)
		l := mustNew(t, retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}})
		return []interceptor.Spec{outer, l, inner}, func() error { return errors.Join(outer.AtRest(), inner.AtRest()) }
	})
}

func TestFirstSuccessAllocatesNothing(t *testing.T) {
	unary := calltest.Stack(t, mustNew(t, retry.Config{})).UnaryClientInterceptor()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := t.Context()
	if n := testing.AllocsPerRun(1000, func() { unary(ctx, method, nil, nil, nil, calltest.Noop, opts...) }); n != 0 && !race.Enabled {
		t.Errorf("%v allocations, want none", n)
	}
}

func BenchmarkFirstAttemptSucceeds(b *testing.B) {
	unary := calltest.Stack(b, mustNew(b, retry.Config{})).UnaryClientInterceptor()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		unary(ctx, method, nil, nil, nil, calltest.Noop, opts...)
	}
}

func BenchmarkFirstAttemptSucceedsParallel(b *testing.B) {
	unary := calltest.Stack(b, mustNew(b, retry.Config{})).UnaryClientInterceptor()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := b.Context()
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			unary(ctx, method, nil, nil, nil, calltest.Noop, opts...)
		}
	})
}

// The baseline.
func BenchmarkStackWithoutLayers(b *testing.B) {
	unary := calltest.Stack(b).UnaryClientInterceptor()
	opts := []grpc.CallOption{grpc.StaticMethod()}
	ctx := b.Context()
	b.ReportAllocs()
	for b.Loop() {
		unary(ctx, method, nil, nil, nil, calltest.Noop, opts...)
	}
}

func BenchmarkSpentBudget(b *testing.B) {
	l := mustNew(b, retry.Config{Budget: budget.Config{MinPerSecond: budget.None, Ratio: budget.None}})
	unary := calltest.Stack(b, l).UnaryClientInterceptor()
	ctx := b.Context()
	fail := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
		return unavailable
	}
	b.ReportAllocs()
	for b.Loop() {
		unary(ctx, method, nil, nil, nil, fail)
	}
}

// gRPC's codec takes what embeds a protocol buffer, by pointer and by value.
func TestReplyIsAWrapper(t *testing.T) {
	for name, of := range map[string]func(m proto.Message) any{
		"by_pointer": func(m proto.Message) any { return &struct{ proto.Message }{m} },
		"by_value":   func(m proto.Message) any { return struct{ proto.Message }{m} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				attempts, m := 0, wrapperspb.String("old")
				err := calltest.Stack(t, mustNew(t, quick)).UnaryClientInterceptor()(t.Context(), method, nil, of(m), nil,
					func(_ context.Context, _ string, _, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
						if attempts++; attempts == 1 {
							return unavailable
						}
						return proto.Unmarshal([]byte("\x0a\x03new"), reply.(proto.Message))
					})
				if err != nil || m.GetValue() != "new" {
					t.Errorf("the reply is %q, %v; want that of the second attempt", m.GetValue(), err)
				}
			})
		})
	}
}
