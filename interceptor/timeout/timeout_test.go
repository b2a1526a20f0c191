// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package timeout

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	retrier "github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const ms = time.Millisecond

func mustNew(t testing.TB, cfg Config, opts ...Option) *Layer {
	t.Helper()
	l, err := New(cfg, opts...)
	if err != nil {
		t.Fatalf("New(%+v): %v", cfg, err)
	}
	return l
}

// limit lets n calls run at a time.
func limit(n int64) interceptor.Spec {
	return adapt.FromSemaphore("limit", semaphore.NewWeighted(n))
}

// conn is a connection made of two functions.
type conn struct {
	invoke func(ctx context.Context) error
	stream func(ctx context.Context) (grpc.ClientStream, error)
}

func (c conn) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	return c.invoke(ctx)
}

func (c conn) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return c.stream(ctx)
}

// wait takes d, or until the context has ended as gRPC says it.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

const method = "/s/m"

func call(ctx context.Context, cc grpc.ClientConnInterface) error {
	return cc.Invoke(ctx, method, nil, nil)
}

// known returns how many latencies the layer knows of the method.
func known(l *Layer) int {
	_, n := l.window(method, interceptor.Now()).Quantile(0.5)
	return n
}

// occupy makes a call on cc that lasts until the test ends.
func occupy(t *testing.T, cc grpc.ClientConnInterface) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- call(ctx, cc) }()
	synctest.Wait()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// wantExceeded checks that err says that the bound of the layer was exceeded.
func wantExceeded(t *testing.T, err error, layer string, b Bound, limit time.Duration, sent bool) {
	t.Helper()
	var e *Exceeded
	var r *interceptor.Refusal
	if !errors.As(err, &e) || !errors.As(err, &r) {
		t.Fatalf("got %v, want a refusal with an Exceeded in it", err)
	}
	if e.Bound != b || e.Limit != limit {
		t.Errorf("exceeded was %q (%v), want %q (%v)", e.Bound, e.Limit, b, limit)
	}
	if r.Layer != layer || r.Reason != interceptor.ReasonDeadline || r.NotSent() == sent {
		t.Errorf("refusal of %s with reason %s, not sent: %t, want %s, DEADLINE, %t", r.Layer, r.Reason, r.NotSent(), layer, !sent)
	}
	if code := status.Code(err); code != codes.DeadlineExceeded {
		t.Errorf("code %v, want DEADLINE_EXCEEDED", code)
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("errors.Is(%v, context.DeadlineExceeded) is false", err)
	}
	if !strings.Contains(err.Error(), b.String()) {
		t.Errorf("the error %q does not say %q", err, b)
	}
}

// took checks how much time has passed since begin.
func took(t *testing.T, begin time.Time, want time.Duration) {
	t.Helper()
	if d := time.Since(begin); d != want {
		t.Errorf("it took %v, want %v", d, want)
	}
}

func TestCallCutShort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := calltest.Stack(t, mustNew(t, Config{Timeout: 100 * ms}, WithName("per-call"))).Wrap(calltest.Takes(time.Hour))
		begin := time.Now()
		err := call(context.Background(), cc)
		took(t, begin, 100*ms)
		wantExceeded(t, err, "per-call", Timeout, 100*ms, true)
		const want = "belfry: per-call: DEADLINE: the call's timeout has passed (100ms): rpc error: code = DeadlineExceeded desc = context deadline exceeded"
		if err.Error() != want {
			t.Errorf("error\n%q, want\n%q", err, want)
		}
	})
}

func TestCallWithinTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if err := call(context.Background(), calltest.Stack(t, mustNew(t, Config{Timeout: 100 * ms})).Wrap(calltest.Takes(100*ms-1))); err != nil {
			t.Errorf("a call 1 ns faster than its timeout: %v", err)
		}
	})
}

// Tower polls the response before the timer.
func TestCallReadyResponseWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := conn{invoke: func(context.Context) error { time.Sleep(time.Second); return nil }}
		if err := call(context.Background(), calltest.Stack(t, mustNew(t, Config{Timeout: 100 * ms})).Wrap(late)); err != nil {
			t.Errorf("a response that arrived after the deadline: %v, want it delivered", err)
		}
	})
}

func TestCallKeepsEarlierDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var seen time.Time
		cc := calltest.Stack(t, mustNew(t, Config{Timeout: 100 * ms})).Wrap(conn{invoke: func(ctx context.Context) error {
			seen, _ = ctx.Deadline()
			return wait(ctx, time.Hour)
		}})
		begin := time.Now()
		ctx, cancel := context.WithTimeout(context.Background(), 30*ms)
		defer cancel()
		wantExceeded(t, call(ctx, cc), "timeout", Caller, 0, true)
		took(t, begin, 30*ms)
		if want, _ := ctx.Deadline(); !seen.Equal(want) {
			t.Errorf("the call's deadline was %v, want the caller's, %v", seen, want)
		}
	})
}

func TestCallOtherErrorsStay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Timeout: 100 * ms})
		for _, want := range []error{
			status.Error(codes.DeadlineExceeded, "the server's own"),
			status.Error(codes.Unavailable, "down"),
			status.Error(codes.Canceled, "the server gave up"),
		} {
			cc := calltest.Stack(t, l).Wrap(conn{invoke: func(context.Context) error { return want }})
			if err := call(context.Background(), cc); err != want {
				t.Errorf("got %v, want the server's %v", err, want)
			}
		}
		// One that arrives as the deadline passes is still the server's.
		want := status.Error(codes.Unavailable, "down")
		cc := calltest.Stack(t, l).Wrap(conn{invoke: func(ctx context.Context) error { <-ctx.Done(); return want }})
		if err := call(context.Background(), cc); err != want {
			t.Errorf("got %v, want the server's %v", err, want)
		}
		ctx, cancel := context.WithCancel(context.Background())
		time.AfterFunc(10*ms, cancel)
		if err := call(ctx, calltest.Stack(t, l).Wrap(calltest.Takes(time.Hour))); status.Code(err) != codes.Canceled {
			t.Errorf("a call cancelled by its caller: %v, want CANCELLED", err)
		}
	})
}

// Tower's timer starts when the call does: of these 20 calls all succeed there, the
// last after 800 ms.
func TestGateWaitCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var sent atomic.Int64
		cc := calltest.Stack(t, mustNew(t, Config{Timeout: 50 * ms}), limit(1)).Wrap(conn{invoke: func(ctx context.Context) error {
			sent.Add(1)
			return wait(ctx, 40*ms)
		}})
		var mu sync.Mutex
		bySent := map[bool]int{}
		ok := 0
		var wg sync.WaitGroup
		begin := time.Now()
		for range 20 {
			wg.Go(func() {
				err := call(context.Background(), cc)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					ok++
					return
				}
				r, _ := interceptor.AsRefusal(err)
				bySent[!r.NotSent()]++
				wantExceeded(t, err, "timeout", Timeout, 50*ms, !r.NotSent())
			})
		}
		wg.Wait()
		took(t, begin, 50*ms)
		if ok != 1 || bySent[true] != 1 || bySent[false] != 18 {
			t.Errorf("%d calls succeeded, %d were cut short, %d in the queue, want 1, 1, 18", ok, bySent[true], bySent[false])
		}
		if n := sent.Load(); n != 2 {
			t.Errorf("%d calls were sent, want 2", n)
		}
	})
}

func TestGateRefusals(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := calltest.Stack(t, mustNew(t, Config{Timeout: 50 * ms}), limit(1)).Wrap(calltest.Takes(time.Hour))
		occupy(t, cc)
		err := cc.Invoke(context.Background(), "/s/m", nil, nil, interceptor.WithWait(interceptor.None))
		if r, ok := interceptor.AsRefusal(err); !ok || r.Layer != "limit" || r.Reason != interceptor.ReasonConcurrency {
			t.Errorf("refused at once with %v, want limit's refusal", err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		l := limit(1)
		occupy(t, calltest.Stack(t, l).Wrap(calltest.Takes(time.Second)))
		err := call(context.Background(), calltest.Stack(t, mustNew(t, Config{Timeout: 50 * ms}), l).Wrap(calltest.Takes(0)))
		wantExceeded(t, err, "timeout", Timeout, 50*ms, false)
		var e *Exceeded
		errors.As(err, &e)
		if r, ok := interceptor.AsRefusal(e.Err); !ok || r.Layer != "limit" {
			t.Errorf("inside is %v, want limit's refusal", e.Err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 20*ms)
		defer cancel()
		err = call(ctx, calltest.Stack(t, mustNew(t, Config{Timeout: 50 * ms}), l).Wrap(calltest.Takes(0)))
		wantExceeded(t, err, "timeout", Caller, 0, false)
	})
}

// stalls waits without asking how long it may.
type stalls struct {
	interceptor.GateOnly
	d time.Duration
}

func (l *stalls) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *stalls) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		time.Sleep(l.d)
		return inner.Admit(ctx, a, w)
	})
}

func TestGateAdmitsTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := Config{Timeout: 50 * ms, Lifetime: 50 * ms}
		cc := calltest.Stack(t, mustNew(t, cfg), &stalls{d: 60 * ms}).Wrap(conn{
			invoke: func(context.Context) error { t.Error("the call was sent"); return nil },
			stream: func(context.Context) (grpc.ClientStream, error) { t.Error("the stream was opened"); return nil, io.EOF },
		})
		wantExceeded(t, call(context.Background(), cc), "timeout", Timeout, 50*ms, false)
		_, err := open(cc, interceptor.BidiStream)
		wantExceeded(t, err, "timeout", Lifetime, 50*ms, false)
	})
}

// lost is a limiter elsewhere that does not answer.
type lost struct{}

func (lost) Take(ctx context.Context, _ string) (ratelimit.Decision, error) {
	return ratelimit.Decision{}, wait(ctx, time.Hour)
}

func (lost) Refund(string) {}

func TestGateRemoteLimiterCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, opts := range map[string][]ratelimit.Option{"fails closed": nil, "fails open": {ratelimit.WithFailOpen()}} {
			elsewhere := ratelimit.FromLimiter(lost{}, interceptor.KeyBy{}, opts...)
			cc := calltest.Stack(t, mustNew(t, Config{Timeout: 50 * ms}), elsewhere).Wrap(conn{
				invoke: func(context.Context) error { t.Errorf("%s: the call was sent", name); return nil },
			})
			for _, w := range []interceptor.Wait{interceptor.None, interceptor.Forever} {
				begin := time.Now()
				wantExceeded(t, cc.Invoke(context.Background(), "/s/m", nil, nil, interceptor.WithWait(w)), "timeout", Timeout, 50*ms, false)
				took(t, begin, 50*ms)
			}
		}
	})
}

// retry is an interceptor that makes a second attempt at once.
func retry() interceptor.Spec {
	return interceptor.Foreign("retry", func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := invoker(ctx, method, req, reply, cc, opts...); err == nil {
			return nil
		}
		return invoker(ctx, method, req, reply, cc, opts...)
	}, nil)
}

func TestTimeoutOfAttemptAndCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		perCall, perAttempt := mustNew(t, Config{Timeout: time.Second}, WithName("call")), mustNew(t, Config{Timeout: 300 * ms}, WithName("attempt"))
		cc := calltest.Stack(t, perCall, retry(), perAttempt).Wrap(calltest.Takes(time.Hour))
		begin := time.Now()
		wantExceeded(t, call(context.Background(), cc), "attempt", Timeout, 300*ms, true)
		took(t, begin, 600*ms)

		if err := perAttempt.Update(Config{Timeout: 700 * ms}); err != nil {
			t.Fatal(err)
		}
		begin = time.Now()
		wantExceeded(t, call(context.Background(), cc), "call", Timeout, time.Second, true)
		took(t, begin, time.Second)
	})
}

func TestDeadlineGoesToServer(t *testing.T) {
	lis := bufconn.Listen(1 << 16)
	left := make(chan time.Duration, 1)
	srv := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		d, ok := s.Context().Deadline()
		if !ok {
			left <- 0
		} else {
			left <- time.Until(d)
		}
		if err := s.RecvMsg(new(emptypb.Empty)); err != nil {
			return err
		}
		return s.SendMsg(new(emptypb.Empty))
	}))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(lis) }()
	opts := append(calltest.Stack(t, mustNew(t, Config{Timeout: time.Minute, Lifetime: time.Hour})).DialOptions(),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	cc, err := grpc.NewClient("passthrough:///bufconn", opts...)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		cc.Close()
		srv.Stop()
		<-served
	}()
	if err := cc.Invoke(context.Background(), "/s/m", new(emptypb.Empty), new(emptypb.Empty)); err != nil {
		t.Fatal(err)
	}
	if d := <-left; d < 30*time.Second || d > time.Minute {
		t.Errorf("the server had %v for a unary call, want a minute or a little less", d)
	}
	s, err := cc.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/m")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(new(emptypb.Empty)); err != nil {
		t.Fatal(err)
	}
	if d := <-left; d < 30*time.Minute || d > time.Hour {
		t.Errorf("the server had %v for a stream, want an hour or a little less", d)
	}
	for err == nil {
		err = s.RecvMsg(new(emptypb.Empty))
	}
	if err != io.EOF {
		t.Errorf("the stream ended with %v, want io.EOF", err)
	}
}

func TestAdaptive(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Timeout: time.Second, Adaptive: &Adaptive{Multiple: 2, Min: 10 * ms, MinSamples: 10, Window: time.Minute}})
		at := func(d time.Duration) error {
			return call(context.Background(), calltest.Stack(t, l).Wrap(calltest.Takes(d)))
		}
		want := func(want time.Duration) {
			t.Helper()
			if d := l.Timeout(method); d < want || float64(d) > 1.02*float64(want) {
				t.Errorf("Timeout() = %v, want %v", d, want)
			}
		}
		for range 9 {
			at(50 * ms)
		}
		want(time.Second) // Too few to know.
		at(50 * ms)
		want(100 * ms)
		timeout := l.Timeout(method)
		begin := time.Now()
		wantExceeded(t, at(time.Hour), "timeout", Timeout, timeout, true)
		took(t, begin, timeout)
		want(time.Second)       // Nobody knows how long the hundredth slowest takes.
		time.Sleep(time.Minute) // They are forgotten.
		for range 10 {
			at(ms)
		}
		want(10 * ms)
		// A caller's deadline that is earlier tells nothing about the server, an error neither.
		ctx, cancel := context.WithTimeout(context.Background(), 5*ms)
		defer cancel()
		for range 50 {
			call(ctx, calltest.Stack(t, l).Wrap(calltest.Takes(time.Hour)))
			call(context.Background(), calltest.Stack(t, l).Wrap(conn{invoke: func(context.Context) error {
				return status.Error(codes.Unavailable, "")
			}}))
		}
		if n := known(l); n != 10 {
			t.Errorf("%d latencies are known, want 10", n)
		}
		ctx, cancel = context.WithTimeout(context.Background(), 5*ms)
		defer cancel()
		call(ctx, calltest.Stack(t, l).Wrap(calltest.Takes(ms))) // A success under one does.
		if n := known(l); n != 11 {
			t.Errorf("%d latencies are known, want 11", n)
		}

		// Off and on again, the latencies are still there.
		for _, cfg := range []Config{{Timeout: 5 * time.Second}, {Timeout: 5 * time.Second, Adaptive: &Adaptive{Multiple: 20, Min: ms, MinSamples: 10}}} {
			if err := l.Update(cfg); err != nil {
				t.Fatal(err)
			}
		}
		want(20 * ms)
	})
}

// byMethod is a server whose methods take the time that it says.
type byMethod struct {
	grpc.ClientConnInterface
	takes map[string]time.Duration
}

func (s byMethod) Invoke(ctx context.Context, method string, _, _ any, _ ...grpc.CallOption) error {
	return wait(ctx, s.takes[method])
}

// Each method has its own timeout: a slow one that is called rarely is not measured by a
// fast one that is called often, and one that hangs lifts only its own.
func TestAdaptiveMethods(t *testing.T) {
	cfg := Config{Timeout: 2 * time.Second, Adaptive: &Adaptive{Min: 10 * ms, MinSamples: 20}}
	for name, around := range map[string]func(l *Layer) []interceptor.Spec{
		"alone": func(l *Layer) []interceptor.Spec { return []interceptor.Spec{l} },
		"recommended": func(l *Layer) []interceptor.Spec {
			return []interceptor.Spec{
				loadshed.Config{}, l, hedge.Config{Delay: time.Hour}, retrier.Config{}, buffer.Config{Size: 1}, concurrency.Config{Limit: 10},
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const fast, slow, hangs = "/s/fast", "/s/slow", "/s/hangs"
				l := mustNew(t, cfg)
				cc := calltest.Stack(t, around(l)...).Wrap(byMethod{takes: map[string]time.Duration{fast: ms, slow: 60 * ms, hangs: time.Hour}})
				for i := range 3000 {
					m := fast
					if i%200 == 199 { // Fewer than leave a trace in the 99th percentile of all.
						m = slow
					}
					if err := cc.Invoke(t.Context(), m, nil, nil); err != nil {
						t.Fatalf("call %d, of %s: %v", i, m, err)
					}
				}
				for range 25 {
					wantExceeded(t, cc.Invoke(t.Context(), hangs, nil, nil), "timeout", Timeout, 2*time.Second, true)
					for range 10 {
						if err := cc.Invoke(t.Context(), fast, nil, nil); err != nil {
							t.Fatal(err)
						}
					}
				}
				for m, want := range map[string]time.Duration{fast: 10 * ms, slow: 2 * time.Second, hangs: 2 * time.Second} {
					if d := l.Timeout(m); d != want {
						t.Errorf("the timeout of %s is %v, want %v", m, d, want)
					}
				}
			})
		})
	}
}

// A method whose latency grows beyond its timeout gets it back, at the cost that the
// documentation of Adaptive says, and then the timeout follows the new latency.
func TestAdaptiveRecovers(t *testing.T) {
	for _, tc := range []struct {
		before, after time.Duration // Latency.
		calls         int           // In the window.
	}{
		{10 * ms, 100 * ms, 100},
		{10 * ms, 100 * ms, 3000},
		{ms, time.Second, 3000},
		{ms, 31 * ms, 3000},
	} {
		synctest.Test(t, func(t *testing.T) {
			l := mustNew(t, Config{Timeout: 10 * time.Second, Adaptive: &Adaptive{Min: ms}})
			at := func(d time.Duration) error {
				return call(t.Context(), calltest.Stack(t, l).Wrap(calltest.Takes(d)))
			}
			for range tc.calls {
				if err := at(tc.before); err != nil {
					t.Fatal(err)
				}
			}
			if d, want := l.Timeout(method), 3*tc.before; d < want || float64(d) > 1.02*float64(want) {
				t.Fatalf("the timeout of calls of %v is %v, want %v", tc.before, d, want)
			}
			failed := 0
			for failed < tc.calls && at(tc.after) != nil {
				failed++
			}
			if most := tc.calls/100 + 2; failed > most {
				t.Errorf("%d calls failed when their latency grew from %v to %v, want at most %d, a hundredth of %d", failed, tc.before, tc.after, most, tc.calls)
			}
			for begin := time.Now(); time.Since(begin) < 2*time.Minute; {
				if err := at(tc.after); err != nil {
					t.Fatalf("a call of %v has failed after %v: %v", tc.after, time.Since(begin), err)
				}
				time.Sleep(100 * ms)
			}
			if d := l.Timeout(method); d < 3*tc.after || float64(d) > 3.06*float64(tc.after) && tc.after < time.Second {
				t.Errorf("the timeout of calls of %v is %v, want 3 times as much", tc.after, d)
			}
		})
	}
}

// No more calls of a method are cut short than the percentile leaves out, however long
// they take.
func TestAdaptiveCutsNoMoreThanThePercentile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Timeout: 10 * time.Second, Adaptive: &Adaptive{Min: ms, Percentile: 0.9, Window: time.Hour}})
		failed, calls := 0, 3000
		for i := range calls {
			d := ms
			if i > 500 && i%4 == 0 {
				d = time.Second
			}
			if call(t.Context(), calltest.Stack(t, l).Wrap(calltest.Takes(d))) != nil {
				failed++
			}
		}
		if failed == 0 || failed > calls/10 {
			t.Errorf("%d of %d calls were cut short, want some, and at most a tenth", failed, calls)
		}
	})
}

// The latencies of a method are dropped while a call of it runs, and when it ends the
// timeout is not adaptive any more.
func TestAdaptiveOffWhileACallRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Timeout: time.Minute, Adaptive: &Adaptive{Min: ms, Window: time.Second}})
		quick := calltest.Stack(t, l).Wrap(calltest.Takes(0))
		err := call(t.Context(), calltest.Stack(t, l).Wrap(conn{invoke: func(context.Context) error {
			time.Sleep(2 * time.Second)
			for i := range 300 { // One of the first in its part of the map drops them; all miss that in 1 of 10⁸ runs.
				if err := quick.Invoke(t.Context(), fmt.Sprintf("/s/%d", i), nil, nil); err != nil {
					return err
				}
			}
			if _, ok := l.methods.Load().Peek(method); ok {
				t.Errorf("the latencies of %s have not been dropped", method)
			}
			return l.Update(Config{Timeout: time.Second})
		}}))
		if err != nil || l.Timeout(method) != time.Second {
			t.Errorf("%v, and a timeout of %v, want none and 1s", err, l.Timeout(method))
		}
	})
}

// The attempt's deadline is the layer's if that explains it, whoever tells first.
func TestDeadlineToldByServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Timeout: 100 * ms, Lifetime: 100 * ms})
		// tells is a server that answers DEADLINE_EXCEEDED before its deadline.
		tells := func(before time.Duration) conn {
			answer := func(ctx context.Context) error {
				d, _ := ctx.Deadline()
				time.Sleep(time.Until(d) - before)
				return status.Error(codes.DeadlineExceeded, "no time left")
			}
			return conn{invoke: answer, stream: func(ctx context.Context) (grpc.ClientStream, error) {
				return &told{ctx: ctx, answer: answer}, nil
			}}
		}
		recv := func(ctx context.Context, cc grpc.ClientConnInterface) error {
			s, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method)
			if err != nil {
				t.Fatal(err)
			}
			return s.RecvMsg(nil)
		}
		for _, before := range []time.Duration{0, 1, 3 * ms, 25 * ms} {
			cc := calltest.Stack(t, l).Wrap(tells(before))
			wantExceeded(t, call(t.Context(), cc), "timeout", Timeout, 100*ms, true)
			wantExceeded(t, recv(t.Context(), cc), "timeout", Lifetime, 100*ms, true)
		}
		none := func(err error) {
			t.Helper()
			if _, ok := interceptor.AsRefusal(err); ok || status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("got %v, want the server's DEADLINE_EXCEEDED", err)
			}
		}
		// What comes long before is the server's own, and under a caller's earlier deadline
		// this layer has none.
		cc := calltest.Stack(t, l).Wrap(tells(50 * ms))
		none(call(t.Context(), cc))
		none(recv(t.Context(), cc))
		ctx, cancel := context.WithTimeout(t.Context(), 90*ms)
		defer cancel()
		none(call(ctx, calltest.Stack(t, l).Wrap(tells(3*ms))))
		ctx, cancel = context.WithTimeout(t.Context(), 90*ms)
		defer cancel()
		none(recv(ctx, calltest.Stack(t, l).Wrap(tells(3*ms))))
		// Nor under an earlier one of a layer outside, whose deadline it is.
		outer := mustNew(t, Config{Timeout: 90 * ms, Lifetime: 90 * ms}, WithName("outer"))
		cc = calltest.Stack(t, outer, l).Wrap(tells(3 * ms))
		wantExceeded(t, call(t.Context(), cc), "outer", Timeout, 90*ms, true)
		wantExceeded(t, recv(t.Context(), cc), "outer", Lifetime, 90*ms, true)
	})
}

// told is a stream whose RecvMsg answers.
type told struct {
	grpc.ClientStream
	ctx    context.Context
	answer func(ctx context.Context) error
}

func (s *told) RecvMsg(any) error { return s.answer(s.ctx) }

// repeats is a retry of every method.
func repeats(t *testing.T) *retrier.Layer {
	t.Helper()
	l, err := retrier.New(retrier.Config{}, retrier.WithIdempotent(func(string) bool { return true }))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A retry outside repeats an attempt that its server ended just before the deadline.
func TestDeadlineToldByServerIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var attempts atomic.Int64
		cc := calltest.Stack(t, repeats(t), mustNew(t, Config{Timeout: 50 * ms})).Wrap(conn{invoke: func(ctx context.Context) error {
			if attempts.Add(1) > 1 {
				return nil
			}
			wait(ctx, 47*ms)
			return status.Error(codes.DeadlineExceeded, "no time left")
		}})
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := call(ctx, cc); err != nil || attempts.Load() != 2 {
			t.Errorf("%v after %d attempts, want success after 2", err, attempts.Load())
		}
	})
}

func TestConfigErrors(t *testing.T) {
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{}, "Timeout is 0s, must be positive unless Lifetime, FirstResponse, Message or Idle is"},
		{Config{Timeout: -1}, "Timeout is -1ns"},
		{Config{Timeout: 1, Lifetime: -1}, "Lifetime is -1ns"},
		{Config{Timeout: 1, FirstResponse: -1}, "FirstResponse is -1ns"},
		{Config{Timeout: 1, Message: -1}, "Message is -1ns"},
		{Config{Timeout: 1, Idle: -1}, "Idle is -1ns"},
		{Config{Idle: 1, Adaptive: &Adaptive{Min: 1}}, "Timeout is 0s"},
		{Config{Timeout: 1, Adaptive: &Adaptive{}}, "Adaptive.Min is 0s"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 2}}, "Adaptive.Min is 2ns"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Percentile: 1}}, "Adaptive.Percentile is 1"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Percentile: math.NaN()}}, "Adaptive.Percentile is NaN"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Multiple: 0.5}}, "Adaptive.Multiple is 0.5"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Multiple: 101}}, "Adaptive.Multiple is 101"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Window: 1}}, "Adaptive.Window is 1ns"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, Window: 2 * time.Hour}}, "Adaptive.Window is 2h"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, MinSamples: -1}}, "Adaptive.MinSamples is -1"},
		{Config{Timeout: 1, Adaptive: &Adaptive{Min: 1, MinSamples: 1e6 + 1}}, "Adaptive.MinSamples is 1000001"},
	} {
		before := Config{Timeout: time.Second, Idle: time.Minute}
		l := mustNew(t, before)
		for what, err := range map[string]error{
			"New":    func() error { _, err := New(tt.cfg); return err }(),
			"Update": l.Update(tt.cfg),
		} {
			if err == nil || !strings.HasPrefix(err.Error(), "timeout: "+tt.want) {
				t.Errorf("%s(%+v): %v, want an error that begins with %q", what, tt.cfg, err, "timeout: "+tt.want)
			}
		}
		if l.Config() != before {
			t.Errorf("after a bad Update: %+v, want %+v", l.Config(), before)
		}
	}
	l := mustNew(t, Config{Timeout: time.Second, Adaptive: &Adaptive{Min: ms}})
	if got, want := *l.Config().Adaptive, (Adaptive{Min: ms}); got != want {
		t.Errorf("Config().Adaptive is %+v, want %+v as it was given", got, want)
	}
	if got, want := l.settings.Load().adaptive, (Adaptive{Percentile: 0.99, Multiple: 3, Min: ms, Window: time.Minute, MinSamples: 100}); got != want {
		t.Errorf("with defaults: %+v, want %+v", got, want)
	}
}

func TestEmptyName(t *testing.T) {
	if _, err := New(Config{Timeout: ms}, WithName("")); err == nil || !strings.Contains(err.Error(), `timeout: WithName is ""`) {
		t.Errorf("New with an empty name = %v, want an error that names WithName", err)
	}
}

// open opens a stream of a kind.
func open(cc grpc.ClientConnInterface, k interceptor.Kind) (grpc.ClientStream, error) {
	return cc.NewStream(context.Background(), &grpc.StreamDesc{
		ClientStreams: k != interceptor.ServerStream, ServerStreams: k != interceptor.ClientStream,
	}, "/s/m")
}

// tape is a stream whose messages come after given times, and whose sends take one.
type tape struct {
	grpc.ClientStream
	ctx   context.Context
	recvs []time.Duration // The last is the end of the stream.
	send  time.Duration
}

func (s *tape) Context() context.Context { return s.ctx }
func (s *tape) CloseSend() error         { return nil }
func (s *tape) SendMsg(any) error        { return wait(s.ctx, s.send) }
func (s *tape) Header() (metadata.MD, error) {
	return nil, wait(s.ctx, time.Hour)
}

func (s *tape) RecvMsg(any) error {
	if err := wait(s.ctx, s.recvs[0]); err != nil {
		return err
	}
	if s.recvs = s.recvs[1:]; len(s.recvs) == 0 {
		return io.EOF
	}
	return nil
}

func taped(send time.Duration, recvs ...time.Duration) conn {
	return conn{stream: func(ctx context.Context) (grpc.ClientStream, error) {
		return &tape{ctx: ctx, recvs: append(slices.Clone(recvs), 0), send: send}, nil
	}}
}

func mustOpen(t *testing.T, cc grpc.ClientConnInterface, k interceptor.Kind) grpc.ClientStream {
	t.Helper()
	s, err := open(cc, k)
	if err != nil {
		t.Fatalf("NewStream: %v", err)
	}
	return s
}

// drain reads s to its end.
func drain(s grpc.ClientStream) (n int, err error) {
	for {
		if err := s.RecvMsg(nil); err != nil {
			return n, err
		}
		n++
	}
}

func TestStreamIgnoresTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := mustOpen(t, calltest.Stack(t, mustNew(t, Config{Timeout: ms})).Wrap(taped(0, time.Hour)), interceptor.ServerStream)
		if n, err := drain(s); n != 1 || err != io.EOF {
			t.Errorf("received %d messages and %v, want 1 and io.EOF", n, err)
		}
	})
}

func TestStreamLifetime(t *testing.T) {
	for _, k := range []interceptor.Kind{interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream} {
		t.Run(k.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				begin := time.Now()
				stack := calltest.Stack(t, mustNew(t, Config{Lifetime: time.Second}), &stalls{d: 300 * ms})
				s := mustOpen(t, stack.Wrap(taped(0, 400*ms, 400*ms)), k)
				took(t, begin, 300*ms)
				if err := s.RecvMsg(nil); err != nil {
					t.Errorf("a message after 700 ms: %v", err)
				}
				if k != interceptor.ClientStream { // Which is over by now.
					wantExceeded(t, s.RecvMsg(nil), "timeout", Lifetime, time.Second, true)
					took(t, begin, time.Second)
				}
			})
		})
	}
}

func TestStreamFirstResponse(t *testing.T) {
	for _, tt := range []struct {
		kind interceptor.Kind
		want time.Duration // When the stream is cut short.
	}{
		{interceptor.ServerStream, 100 * ms}, // From the beginning,
		{interceptor.BidiStream, 150 * ms},   // from the first message at 50 ms,
		{interceptor.ClientStream, 170 * ms}, // from CloseSend at 70 ms.
	} {
		t.Run(tt.kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := mustNew(t, Config{FirstResponse: 100 * ms})
				for _, late := range []bool{true, false} {
					begin := time.Now()
					first := time.Hour
					if !late {
						first = tt.want - 70*ms - 1
					}
					s := mustOpen(t, calltest.Stack(t, l).Wrap(taped(0, first, time.Hour)), tt.kind)
					time.Sleep(50 * ms)
					s.SendMsg(nil)
					time.Sleep(20 * ms)
					s.CloseSend()
					err := s.RecvMsg(nil)
					if late {
						wantExceeded(t, err, "timeout", FirstResponse, 100*ms, true)
						took(t, begin, tt.want)
						continue
					}
					if err != nil {
						t.Errorf("a response 1 ns before the bound: %v", err)
					}
					if tt.kind != interceptor.ClientStream {
						if err := s.RecvMsg(nil); err != nil { // The second may take an hour.
							t.Errorf("the second message: %v", err)
						}
					}
				}
			})
		})
	}
}

func TestStreamFirstResponseBoundsOpening(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{FirstResponse: 100 * ms, Lifetime: time.Second})
		begin := time.Now()
		_, err := open(calltest.Stack(t, l).Wrap(conn{stream: func(ctx context.Context) (grpc.ClientStream, error) {
			return nil, wait(ctx, time.Hour)
		}}), interceptor.ServerStream)
		wantExceeded(t, err, "timeout", FirstResponse, 100*ms, true)
		took(t, begin, 100*ms)

		one := limit(1)
		occupy(t, calltest.Stack(t, one).Wrap(calltest.Takes(time.Minute)))
		begin = time.Now()
		_, err = open(calltest.Stack(t, l, one).Wrap(taped(0)), interceptor.ServerStream)
		wantExceeded(t, err, "timeout", FirstResponse, 100*ms, false)
		_, err = open(calltest.Stack(t, l, one).Wrap(taped(0)), interceptor.BidiStream)
		wantExceeded(t, err, "timeout", Lifetime, time.Second, false)
		took(t, begin, 1100*ms)
	})
}

func TestStreamMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Message: 100 * ms})
		s := mustOpen(t, calltest.Stack(t, l).Wrap(taped(0, 99*ms, 99*ms, 99*ms, 101*ms)), interceptor.ServerStream)
		time.Sleep(time.Hour) // It is not about the time between them.
		begin := time.Now()
		n, err := drain(s)
		wantExceeded(t, err, "timeout", Message, 100*ms, true)
		took(t, begin, 397*ms)
		if n != 3 {
			t.Errorf("received %d messages, want 3", n)
		}

		s = mustOpen(t, calltest.Stack(t, l).Wrap(taped(101*ms, time.Hour)), interceptor.BidiStream)
		begin = time.Now()
		wantExceeded(t, s.SendMsg(nil), "timeout", Message, 100*ms, true)
		took(t, begin, 100*ms)

		// One sends while the other receives, and each has its own time.
		s = mustOpen(t, calltest.Stack(t, l).Wrap(taped(80*ms, 99*ms)), interceptor.BidiStream)
		done := make(chan error, 1)
		go func() {
			time.Sleep(50 * ms)
			done <- s.SendMsg(nil)
		}()
		if err := s.RecvMsg(nil); err != nil {
			t.Errorf("RecvMsg: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("SendMsg: %v", err)
		}
		if err := s.RecvMsg(nil); err != io.EOF {
			t.Errorf("the end: %v, want io.EOF", err)
		}
	})
}

func TestStreamIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, Config{Idle: 100 * ms})
		begin := time.Now()
		s := mustOpen(t, calltest.Stack(t, l).Wrap(taped(0, 99*ms, 90*ms, time.Hour)), interceptor.BidiStream)
		for range 2 {
			if err := s.RecvMsg(nil); err != nil {
				t.Errorf("RecvMsg: %v", err)
			}
		}
		time.Sleep(60 * ms)
		if err := s.SendMsg(nil); err != nil {
			t.Errorf("SendMsg: %v", err)
		}
		wantExceeded(t, s.RecvMsg(nil), "timeout", Idle, 100*ms, true)
		took(t, begin, 349*ms)
		wantExceeded(t, s.RecvMsg(nil), "timeout", Idle, 100*ms, true) // And so it stays.
		if _, err := s.Header(); err == nil {
			t.Error("Header() of a stream that was cut short returned no error")
		}

		s = mustOpen(t, calltest.Stack(t, l).Wrap(taped(0, time.Hour)), interceptor.ServerStream)
		_, err := s.Header()
		wantExceeded(t, err, "timeout", Idle, 100*ms, true)
	})
}

// dead is a stream whose server has ended it: SendMsg says so, and nobody reads.
type dead struct {
	grpc.ClientStream
	sends int
}

func (s *dead) SendMsg(any) error { s.sends++; return io.EOF }

// What nobody has taken is no sign of life.
func TestStreamIdleIsNotExtendedBySendsInVain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ended, d := new(ledger), new(dead)
		cc := calltest.Stack(t, ended, mustNew(t, Config{Idle: 100 * ms})).Wrap(conn{
			stream: func(context.Context) (grpc.ClientStream, error) { return d, nil },
		})
		begin := time.Now()
		s := mustOpen(t, cc, interceptor.ClientStream)
		for len(ended.events()) == 0 && d.sends < 20 {
			s.SendMsg(nil)
			time.Sleep(40 * ms)
			synctest.Wait()
		}
		if d := time.Since(begin); d > 120*ms {
			t.Errorf("the stream was cut short after %v, want 100ms", d)
		}
	})
}

// ledger notes how what is outside or inside a timeout was released.
type ledger struct {
	interceptor.GateOnly
	mu  sync.Mutex
	log []string
}

func (l *ledger) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *ledger) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *ledger) Release(_ int64, e interceptor.End) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.log = append(l.log, fmt.Sprintf("%v %v", e.Outcome, e.Code()))
}

func (l *ledger) events() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.log)
}

func TestStreamAbandoned(t *testing.T) {
	for name, cfg := range map[string]Config{
		"idle":     {Idle: time.Second},
		"lifetime": {Lifetime: time.Second},
		"first":    {FirstResponse: time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outside, inside := new(ledger), new(ledger)
				stack := calltest.Stack(t, outside, mustNew(t, cfg), inside)
				mustOpen(t, stack.Wrap(taped(0, time.Hour)), interceptor.ServerStream)
				time.Sleep(time.Second - 1)
				if e := append(outside.events(), inside.events()...); len(e) != 0 {
					t.Errorf("released before the bound was exceeded: %v", e)
				}
				time.Sleep(time.Nanosecond)
				synctest.Wait()
				for where, l := range map[string]*ledger{"outside": outside, "inside": inside} {
					if got, want := l.events(), []string{"failed DeadlineExceeded"}; !slices.Equal(got, want) {
						t.Errorf("%s was released as %v, want %v", where, got, want)
					}
				}
				if err := stack.Drain(t.Context()); err != nil {
					t.Errorf("Drain: %v", err)
				}
			})
		})
	}
}

func TestStreamCallersDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := calltest.Stack(t, mustNew(t, Config{Lifetime: time.Hour, Idle: time.Minute})).Wrap(taped(0, time.Hour))
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s, err := cc.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/s/m")
		if err != nil {
			t.Fatal(err)
		}
		wantExceeded(t, s.RecvMsg(nil), "timeout", Caller, 0, true)
	})
}

func TestStreamTimerIsSetRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		recvs := make([]time.Duration, 1000)
		for i := range recvs {
			recvs[i] = ms
		}
		l := mustNew(t, Config{Idle: time.Second, Message: time.Second})
		ctx, cancel := context.WithCancelCause(context.Background())
		st := &stream{
			ClientStream: &tape{ctx: ctx, recvs: append(recvs, 0)},
			layer:        l, settings: l.settings.Load(), kind: interceptor.ServerStream, ctx: ctx, own: ctx, cancel: cancel, sends: new(atomic.Uint32),
		}
		st.moved(nil, nil)
		set, last := 0, interceptor.Instant(0)
		for {
			if err := st.RecvMsg(nil); err == io.EOF {
				break
			} else if err != nil {
				t.Fatal(err)
			}
			st.mu.Lock()
			if st.fires != last {
				set, last = set+1, st.fires
			}
			st.mu.Unlock()
		}
		if set > 3 {
			t.Errorf("the timer was set %d times in 1000 messages, want at most 3", set)
		}
	})
}

func TestConformance(t *testing.T) {
	for name, cfg := range map[string]Config{
		"unary":    {Timeout: 10 * time.Second},
		"streams":  {Lifetime: 10 * time.Second, FirstResponse: 9 * time.Second, Message: 8 * time.Second, Idle: 7 * time.Second},
		"tight":    {Timeout: 500 * ms, Lifetime: 500 * ms, FirstResponse: 400 * ms, Message: 400 * ms, Idle: 400 * ms},
		"adaptive": {Timeout: 10 * time.Second, Adaptive: &Adaptive{Min: time.Second, MinSamples: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
				outside, inside := semaphore.NewWeighted(5000), semaphore.NewWeighted(5000)
				specs := []interceptor.Spec{
					adapt.FromSemaphore("outside", outside), cfg, adapt.FromSemaphore("inside", inside),
				}
				return specs, func() error {
					if !outside.TryAcquire(5000) || !inside.TryAcquire(5000) {
						return errors.New("a permit is still held")
					}
					return nil
				}
			})
		})
	}
}

func cases(t testing.TB) []struct {
	name   string
	unary  grpc.UnaryClientInterceptor
	allocs float64
} {
	adaptive := &Adaptive{Min: ms, MinSamples: 1}
	hour := 2 * time.Hour // Later than the deadline of the benchmark's calls.
	full := limit(0)
	type c = struct {
		name   string
		unary  grpc.UnaryClientInterceptor
		allocs float64
	}
	return []c{
		{"no_layer", calltest.Stack(t).UnaryClientInterceptor(), 0},
		{"not_tightening", calltest.Stack(t, mustNew(t, Config{Timeout: hour})).UnaryClientInterceptor(), 0},
		{"not_tightening_adaptive", calltest.Stack(t, mustNew(t, Config{Timeout: hour, Adaptive: &Adaptive{Min: hour}})).UnaryClientInterceptor(), 0},
		{"refused_inside", calltest.Stack(t, mustNew(t, Config{Timeout: time.Minute}), full).UnaryClientInterceptor(), 0},
		{"tightening", calltest.Stack(t, mustNew(t, Config{Timeout: time.Minute})).UnaryClientInterceptor(), 4},
		{"tightening_adaptive", calltest.Stack(t, mustNew(t, Config{Timeout: time.Minute, Adaptive: adaptive})).UnaryClientInterceptor(), 6},
	}
}

func TestAllocations(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates")
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	opts := []grpc.CallOption{interceptor.WithWait(interceptor.None)}
	for _, c := range cases(t) {
		if n := testing.AllocsPerRun(1000, func() { c.unary(ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...) }); n > c.allocs {
			t.Errorf("%s: %v allocations a call, want at most %v", c.name, n, c.allocs)
		}
	}
}

func BenchmarkUnary(b *testing.B) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	opts := []grpc.CallOption{interceptor.WithWait(interceptor.None)}
	for _, c := range cases(b) {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.unary(ctx, "/s/m", nil, nil, nil, calltest.Noop, opts...)
			}
		})
	}
}

// constant is a stream whose RecvMsg always returns the same.
type constant struct {
	grpc.ClientStream
	err error
}

func (s constant) RecvMsg(any) error { return s.err }

func BenchmarkStream(b *testing.B) {
	cc := conn{stream: func(context.Context) (grpc.ClientStream, error) { return constant{}, nil }}
	empty := conn{stream: func(context.Context) (grpc.ClientStream, error) { return constant{err: io.EOF}, nil }}
	for _, c := range []struct {
		name   string
		layers []interceptor.Spec
	}{
		{"no_layer", nil},
		{"all_bounds", []interceptor.Spec{mustNew(b, Config{Lifetime: time.Hour, FirstResponse: time.Minute, Message: time.Minute, Idle: time.Minute})}},
		{"idle", []interceptor.Spec{mustNew(b, Config{Idle: time.Minute})}},
		{"lifetime", []interceptor.Spec{mustNew(b, Config{Lifetime: time.Minute})}},
	} {
		stack := calltest.Stack(b, c.layers...)
		b.Run(c.name+"/open_and_end", func(b *testing.B) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			w := stack.Wrap(empty)
			b.ReportAllocs()
			for b.Loop() {
				s, err := w.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/s/m")
				if err != nil {
					b.Fatal(err)
				}
				s.RecvMsg(nil)
			}
		})
		b.Run(c.name+"/message", func(b *testing.B) {
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			s, err := stack.Wrap(cc).NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, "/s/m")
			if err != nil {
				b.Fatal(err)
			}
			b.ReportAllocs()
			for b.Loop() {
				s.RecvMsg(nil)
			}
		})
	}
}

// lateStream delivers a message at the moment at which it is cut short.
type lateStream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *lateStream) RecvMsg(any) error {
	<-s.ctx.Done()
	return nil
}

func (*lateStream) CloseSend() error { return nil }

// The first message of a stream that was cut short is not delivered: others would not
// follow, and a retry could not repeat the stream any more. Neither is
// a single response: the observer and the limits were told of the deadline.
func TestStream_cutWithFirstMessage(t *testing.T) {
	for name, cfg := range map[string]Config{
		"FirstResponse": {FirstResponse: time.Second},
		"Lifetime":      {Lifetime: time.Second},
		"Message":       {Message: time.Second},
		"Idle":          {Idle: time.Second},
	} {
		for _, desc := range []grpc.StreamDesc{{ServerStreams: true}, {ClientStreams: true}} {
			synctest.Test(t, func(t *testing.T) {
				c := calltest.Stack(t, cfg).Wrap(conn{stream: func(ctx context.Context) (grpc.ClientStream, error) {
					return &lateStream{ctx: ctx}, nil
				}})
				s, err := c.NewStream(t.Context(), &desc, calltest.Method)
				if err != nil {
					t.Fatal(err)
				}
				s.CloseSend() // The first response of a client stream is due from then on.
				err = s.RecvMsg(nil)
				if calltest.Reason(err) != interceptor.ReasonDeadline {
					t.Errorf("%s, %+v: %v, want DEADLINE", name, desc, err)
				}
			})
		}
	}
}

// An attempt whose time passes while it waits for credentials is cut short, in whatever
// words gRPC says that, and repeated whatever the method.
func TestNotSentInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := testserver.Dial(t, testserver.New(t, testserver.InMemory()))
		retry := retrier.Config{Backoff: retrier.Backoff{Initial: time.Microsecond}}
		c := testingv1.NewTestServiceClient(calltest.Stack(t, retry, Config{Timeout: 200 * ms, Lifetime: 200 * ms}).Wrap(conn))
		for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.ServerStream} {
			token := new(calltest.SlowToken)
			if _, err := calltest.Exchange(t.Context(), c, kind, grpc.PerRPCCredentials(token)); err != nil || token.Asked.Load() < 2 {
				t.Errorf("%v: %v after %d attempts, want another one when the first got no token in time", kind, err, token.Asked.Load())
			}
		}
	})
}
