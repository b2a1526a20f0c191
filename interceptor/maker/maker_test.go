// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
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
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const method = "/s/m"

// factory makes connections, and keeps what became of them.
type factory struct {
	makeTakes, closeTakes, callTakes time.Duration

	mu       sync.Mutex // Guards the fields below.
	err      error      // Of making.
	closeErr error
	made     []string // Keys, in order.
	closed   []string
	live     int
	most     int // That were live at once.
	ctx      context.Context
}

func (f *factory) make(ctx context.Context, key string) (Conn, error) {
	f.mu.Lock()
	f.ctx = ctx
	f.made = append(f.made, key)
	err := f.err
	f.live++
	f.most = max(f.most, f.live)
	f.mu.Unlock()
	select {
	case <-time.After(f.makeTakes):
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		f.mu.Lock()
		f.live--
		f.mu.Unlock()
		return nil, err
	}
	return &served{f: f, key: key}, nil
}

type served struct {
	f   *factory
	key string
}

func (c *served) Invoke(ctx context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	if s, ok := reply.(*string); ok {
		*s = c.key
	}
	if c.f.callTakes == 0 {
		return ctx.Err()
	}
	select {
	case <-time.After(c.f.callTakes):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (c *served) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return &stream{ctx: ctx}, nil
}

func (c *served) Close() error {
	time.Sleep(c.f.closeTakes)
	c.f.mu.Lock()
	defer c.f.mu.Unlock()
	c.f.closed = append(c.f.closed, c.key)
	c.f.live--
	return c.f.closeErr
}

type stream struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *stream) SendMsg(any) error { return nil }

func (s *stream) RecvMsg(m any) error {
	if m == nil {
		return io.EOF
	}
	<-s.ctx.Done()
	return s.ctx.Err()
}

// openStream opens a stream, which has one request, and sends that.
func openStream(ctx context.Context, m *Maker, key string) (grpc.ClientStream, error) {
	s, err := m.NewStream(with(ctx, key), &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		return nil, err
	}
	return s, s.SendMsg("request")
}

func (f *factory) want(t *testing.T, what string, got *[]string, want ...string) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if !slices.Equal(*got, want) {
		t.Errorf("%s %q, want %q", what, *got, want)
	}
}

type keyOf struct{}

// byContext takes the key from the context.
func byContext(ctx context.Context, _ string, _ any) (string, error) {
	k, _ := ctx.Value(keyOf{}).(string)
	return k, nil
}

func with(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, keyOf{}, key)
}

// bubble runs f with a Maker in virtual time, and closes the Maker.
func bubble(t *testing.T, c Config, fac *factory, f func(t *testing.T, m *Maker)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := mustNew(t, c, fac)
		defer m.Close()
		f(t, m)
	})
}

func mustNew(t testing.TB, c Config, fac *factory) *Maker {
	t.Helper()
	m, err := New(c, byContext, fac.make)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// call makes a call and expects it to succeed on the connection of key.
func call(t *testing.T, m *Maker, key string) {
	t.Helper()
	var got string
	if err := m.Invoke(with(context.Background(), key), method, nil, &got); err != nil || got != key {
		t.Errorf("a call for %q: answered by %q, %v", key, got, err)
	}
}

// start makes a call in the background.
func start(m *Maker, ctx context.Context, key string, opts ...grpc.CallOption) <-chan error {
	done := make(chan error, 1)
	go func() { done <- m.Invoke(with(ctx, key), method, nil, nil, opts...) }()
	synctest.Wait()
	return done
}

// stats compares what want sets; Making and Waiting only if they are not 0.
func stats(t *testing.T, m *Maker, want Stats) {
	t.Helper()
	got := m.Stats()
	if want.Making == 0 {
		got.Making = 0
	}
	if want.Waiting == 0 {
		got.Waiting = 0
	}
	if got != want {
		t.Errorf("stats are %+v, want %+v", got, want)
	}
}

func TestOneConnectionPerKey(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		stats(t, m, Stats{})
		call(t, m, "a")
		call(t, m, "b")
		call(t, m, "a")
		if _, err := m.NewStream(with(t.Context(), "a"), &grpc.StreamDesc{}, method); err != nil {
			t.Error(err)
		}
		fac.want(t, "made", &fac.made, "a", "b")
		stats(t, m, Stats{Conns: 2, Idle: 1})
	})
}

func TestConcurrentCallsShareOneMaking(t *testing.T) {
	fac := &factory{makeTakes: time.Second}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		began := time.Now()
		var calls []<-chan error
		for range 10 {
			calls = append(calls, start(m, context.Background(), "a"))
		}
		for _, c := range calls {
			if err := <-c; err != nil {
				t.Errorf("a call that waited for its connection: %v", err)
			}
		}
		if got := time.Since(began); got != time.Second {
			t.Errorf("took %v, want 1s", got)
		}
		fac.want(t, "made", &fac.made, "a")
	})
}

func TestFailureIsNotRemembered(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code codes.Code
	}{
		{errors.New("no route"), codes.Unavailable},
		{status.Error(codes.Unauthenticated, "who are you"), codes.Unauthenticated},
	} {
		fac := &factory{makeTakes: time.Second, err: tc.err}
		bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
			for _, c := range []<-chan error{start(m, context.Background(), "a"), start(m, context.Background(), "a")} {
				err := <-c
				r, ok := interceptor.AsRefusal(err)
				if !ok || r.Reason != ReasonMake || r.Key != "a" || !r.NotSent() || !errors.Is(err, tc.err) || status.Code(err) != tc.code {
					t.Errorf("a call whose connection cannot be made: %v, want a refusal of key a with %v and reason MAKE_FAILED", err, tc.code)
				}
			}
			fac.want(t, "made", &fac.made, "a")
			stats(t, m, Stats{})
			fac.err = nil
			call(t, m, "a")
			fac.want(t, "made", &fac.made, "a", "a")
		})
	}
}

func TestMakingSurvivesItsCall(t *testing.T) {
	fac := &factory{makeTakes: time.Second}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
		defer cancel()
		if err := <-start(m, ctx, "a"); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("a call with too short a deadline: %v, want DEADLINE_EXCEEDED", err)
		}
		stats(t, m, Stats{Conns: 1})
		time.Sleep(time.Second)
		stats(t, m, Stats{Conns: 1, Idle: 1})
		call(t, m, "a")
		fac.want(t, "made", &fac.made, "a")
	})
}

func TestMakingContext(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
		defer cancel()
		<-start(m, ctx, "a")
		if at, ok := fac.ctx.Deadline(); !ok || time.Until(at) != DefaultMakeTimeout || fac.ctx.Value(keyOf{}) != "a" {
			t.Errorf("made with %v, want the call's values and a deadline after %v", fac.ctx, DefaultMakeTimeout)
		}
	})
}

func TestIdleTimeout(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{IdleTimeout: 10 * time.Second}, fac, func(t *testing.T, m *Maker) {
		open := func(n int) {
			t.Helper()
			synctest.Wait()
			stats(t, m, Stats{Conns: n, Idle: n})
		}
		call(t, m, "a")
		time.Sleep(4 * time.Second)
		call(t, m, "b")
		time.Sleep(5 * time.Second)
		call(t, m, "a") // At 9 s.
		time.Sleep(5*time.Second - 1)
		open(2)
		time.Sleep(time.Nanosecond)
		open(1)
		fac.want(t, "closed", &fac.closed, "b")
		time.Sleep(5*time.Second - 1)
		open(1)
		time.Sleep(time.Nanosecond)
		open(0)
		fac.want(t, "closed", &fac.closed, "b", "a")
		call(t, m, "a")
		fac.want(t, "made", &fac.made, "a", "b", "a")
	})
}

func TestIdleTimeoutSparesConnectionsInUse(t *testing.T) {
	fac := &factory{callTakes: time.Hour}
	bubble(t, Config{IdleTimeout: time.Second}, fac, func(t *testing.T, m *Maker) {
		done := start(m, context.Background(), "unary")
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		if _, err := openStream(ctx, m, "abandoned"); err != nil {
			t.Fatal(err)
		}
		s, err := openStream(context.Background(), m, "read")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(30 * time.Minute)
		stats(t, m, Stats{Conns: 3})
		if err := s.RecvMsg(nil); err != io.EOF {
			t.Errorf("RecvMsg: %v, want EOF", err)
		}
		stats(t, m, Stats{Conns: 3, Idle: 1})
		time.Sleep(time.Second)
		cancel()
		synctest.Wait()
		stats(t, m, Stats{Conns: 2, Idle: 1})
		time.Sleep(time.Second)
		if err := <-done; err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		stats(t, m, Stats{})
		fac.want(t, "closed", &fac.closed, "read", "abandoned", "unary")
	})
}

func TestIdleTimeoutNone(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{IdleTimeout: None}, fac, func(t *testing.T, m *Maker) {
		call(t, m, "a")
		time.Sleep(1000 * time.Hour)
		stats(t, m, Stats{Conns: 1, Idle: 1})
	})
}

func TestMaxConnsReplacesLongestIdle(t *testing.T) {
	fac := &factory{closeTakes: time.Second}
	bubble(t, Config{MaxConns: 2}, fac, func(t *testing.T, m *Maker) {
		call(t, m, "a")
		call(t, m, "b")
		call(t, m, "a")
		began := time.Now()
		// It waits for nobody, though closing takes its time.
		if err := <-start(m, context.Background(), "c", interceptor.WithWait(interceptor.None)); err != nil {
			t.Errorf("a call for c: %v", err)
		}
		call(t, m, "b") // Which is still being closed.
		if got := time.Since(began); got != 0 {
			t.Errorf("took %v, want no time", got)
		}
		stats(t, m, Stats{Conns: 2, Idle: 2, Closing: 2})
		time.Sleep(time.Second)
		synctest.Wait()
		stats(t, m, Stats{Conns: 2, Idle: 2})
		slices.Sort(fac.closed)
		fac.want(t, "closed", &fac.closed, "a", "b")
	})
}

func TestMaxConnsQueueIsFIFO(t *testing.T) {
	fac := &factory{callTakes: time.Second}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		began := time.Now()
		a := start(m, context.Background(), "a")
		b, c, b2 := start(m, context.Background(), "b"), start(m, context.Background(), "c"), start(m, context.Background(), "b")
		stats(t, m, Stats{Conns: 1, Queued: 2})
		for i, w := range []struct {
			name string
			done <-chan error
			at   time.Duration
		}{{"a", a, time.Second}, {"b", b, 2 * time.Second}, {"the second of b", b2, 2 * time.Second}, {"c", c, 3 * time.Second}} {
			if err := <-w.done; err != nil || time.Since(began) != w.at {
				t.Errorf("call %d, %s: %v after %v, want no error after %v", i, w.name, err, time.Since(began), w.at)
			}
		}
		fac.want(t, "made", &fac.made, "a", "b", "c")
	})
}

func TestMaxWait(t *testing.T) {
	deadline := func(d time.Duration) func() (context.Context, context.CancelFunc) {
		return func() (context.Context, context.CancelFunc) { return context.WithTimeout(context.Background(), d) }
	}
	for _, tc := range []struct {
		name    string
		maxWait time.Duration
		ctx     func() (context.Context, context.CancelFunc)
		opts    []grpc.CallOption
		after   time.Duration
		code    codes.Code
		reason  interceptor.Reason
	}{
		{"MaxWait", 300 * time.Millisecond, nil, nil, 300 * time.Millisecond, codes.Unavailable, interceptor.ReasonConcurrency},
		{"negative MaxWait", -1, nil, nil, 0, codes.Unavailable, interceptor.ReasonConcurrency},
		{"WithWait None", 0, nil, []grpc.CallOption{interceptor.WithWait(interceptor.None)}, 0, codes.Unavailable, interceptor.ReasonConcurrency},
		{"the lesser", time.Second, deadline(200 * time.Millisecond), nil, 200 * time.Millisecond, codes.DeadlineExceeded, interceptor.ReasonDeadline},
		{"the caller's deadline", 0, deadline(100 * time.Millisecond), nil, 100 * time.Millisecond, codes.DeadlineExceeded, interceptor.ReasonDeadline},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fac := &factory{callTakes: time.Hour}
			bubble(t, Config{MaxConns: 1, MaxWait: tc.maxWait}, fac, func(t *testing.T, m *Maker) {
				busy := start(m, context.Background(), "a")
				ctx, cancel := context.Background(), func() {}
				if tc.ctx != nil {
					ctx, cancel = tc.ctx()
				}
				defer cancel()
				began := time.Now()
				err := m.Invoke(with(ctx, "b"), method, nil, nil, tc.opts...)
				r, ok := interceptor.AsRefusal(err)
				if !ok || r.Reason != tc.reason || status.Code(err) != tc.code || time.Since(began) != tc.after {
					t.Errorf("%v after %v, want %v with reason %v after %v", err, time.Since(began), tc.code, tc.reason, tc.after)
				}
				stats(t, m, Stats{Conns: 1}) // It left no trace.
				m.Update(Config{MaxConns: 2})
				go m.Close()
				<-busy
			})
		})
	}
}

func TestMaxWaitWhileMaking(t *testing.T) {
	for _, tc := range []struct {
		name    string
		maxWait time.Duration
		opts    []grpc.CallOption
		takes   time.Duration // Of making.
		after   time.Duration
		reason  interceptor.Reason // Empty if the call succeeds.
	}{
		{"no bound", 0, nil, time.Hour, time.Hour, ""},
		{"MaxWait", time.Second, nil, time.Hour, time.Second, interceptor.ReasonNotReady},
		{"MaxWait None", None, nil, time.Hour, grace, interceptor.ReasonNotReady},
		{"MaxWait None within the grace", None, nil, grace - 1, grace - 1, ""},
		{"WithWait None", 0, []grpc.CallOption{interceptor.WithWait(interceptor.None)}, time.Hour, grace, interceptor.ReasonNotReady},
		{"WithWait None within the grace", 0, []grpc.CallOption{interceptor.WithWait(interceptor.None)}, grace - 1, grace - 1, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			fac := &factory{makeTakes: tc.takes}
			bubble(t, Config{MaxWait: tc.maxWait, MakeTimeout: None}, fac, func(t *testing.T, m *Maker) {
				began := time.Now()
				err := <-start(m, context.Background(), "a", tc.opts...)
				if got := calltest.Reason(err); got != tc.reason || time.Since(began) != tc.after {
					t.Errorf("%v after %v, want reason %q after %v", err, time.Since(began), tc.reason, tc.after)
				}
			})
		})
	}
}

// A load shed in the stack in front does not know of the connections behind the Maker.
func TestShedInFrontOfMaker(t *testing.T) {
	fac := &factory{makeTakes: time.Hour}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		conn := calltest.Stack(t, shed{}, adapt.FromSemaphore("limit", semaphore.NewWeighted(10))).Wrap(m)
		began := time.Now()
		err := conn.Invoke(context.Background(), method, nil, nil)
		if calltest.Reason(err) != interceptor.ReasonNotReady || time.Since(began) != grace {
			t.Errorf("a call whose connection hangs while it is made: %v after %v, want reason NOT_READY after %v", err, time.Since(began), grace)
		}
	})
}

// shed lets nothing inside wait.
type shed struct{ interceptor.GateOnly }

func (l shed) NewLayer() (interceptor.Layer, error) { return l, nil }

func (shed) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, _ interceptor.Wait) error {
		return inner.Admit(ctx, a, interceptor.None)
	})
}

func TestDrainInFrontWakesWaiters(t *testing.T) {
	fac := &factory{callTakes: time.Hour}
	bubble(t, Config{MaxConns: 2}, fac, func(t *testing.T, m *Maker) {
		ctx, cancel := context.WithCancel(context.Background())
		busy := start(m, ctx, "busy")
		fac.makeTakes = time.Hour
		stack := calltest.Stack(t)
		conn := stack.Wrap(m)
		done := make(chan error, 2)
		for _, key := range []string{"making", "queued"} {
			go func() { done <- conn.Invoke(with(context.Background(), key), method, nil, nil) }()
			synctest.Wait()
		}
		stats(t, m, Stats{Conns: 2, Queued: 1})
		if err := stack.Drain(context.Background()); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain {
				t.Errorf("a call that waited: %v, want reason DRAIN", err)
			}
		}
		cancel()
		<-busy
	})
}

// Two callers of a overlap, so that its connection is always in use.
func TestTurns(t *testing.T) {
	fac := &factory{callTakes: 100 * time.Millisecond}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for ctx.Err() == nil {
					call(t, m, "a")
				}
			})
			time.Sleep(50 * time.Millisecond)
		}
		for range 5 {
			began := time.Now()
			call(t, m, "b")
			if got := time.Since(began); got > 200*time.Millisecond {
				t.Errorf("a call of b took %v, want at most that of a in flight before it and its own", got)
			}
			time.Sleep(time.Second)
		}
		cancel()
		wg.Wait()
		fac.want(t, "made", &fac.made, "a", "b", "a", "b", "a", "b", "a", "b", "a", "b", "a")
	})
}

// For each key that waits one connection yields, the one that is in use for longest. Its
// later calls wait behind that key; those of the others pass.
func TestTurnsTakeOneConnectionForEachKey(t *testing.T) {
	fac := &factory{callTakes: time.Minute}
	bubble(t, Config{MaxConns: 3}, fac, func(t *testing.T, m *Maker) {
		began := time.Now()
		order := &observed{}
		var wg sync.WaitGroup
		at := func(name, key string) {
			wg.Go(func() {
				call(t, m, key)
				order.add("%s %v", name, time.Since(began))
			})
			synctest.Wait()
		}
		at("a", "a")
		time.Sleep(10 * time.Second)
		at("b", "b")
		time.Sleep(10 * time.Second)
		at("c", "c")
		time.Sleep(10 * time.Second)
		at("waits", "d")
		at("later a", "a")
		stats(t, m, Stats{Conns: 3, Queued: 2, Waiting: 2})
		at("c again", "c")
		time.Sleep(10 * time.Second)
		err := m.Invoke(with(t.Context(), "b"), method, nil, nil, interceptor.WithWait(interceptor.None))
		if calltest.Reason(err) != interceptor.ReasonConcurrency { // The second that yields.
			t.Errorf("a call of b that may not wait: %v, want reason CONCURRENCY", err)
		}
		wg.Wait()
		want := []string{"a 1m0s", "b 1m10s", "c 1m20s", "c again 1m30s", "waits 2m0s", "later a 2m10s"}
		if !slices.Equal(order.list, want) {
			t.Errorf("the calls ended %q, want %q", order.list, want)
		}
	})
}

// A key that gives up leaves the others as they were.
func TestTurnGivenUp(t *testing.T) {
	fac := &factory{callTakes: time.Minute}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		busy := start(m, context.Background(), "a")
		ctx, cancel := context.WithCancel(context.Background())
		b := start(m, ctx, "b")
		later := start(m, context.Background(), "a")
		stats(t, m, Stats{Conns: 1, Queued: 2, Waiting: 2})
		time.Sleep(time.Second)
		cancel()
		<-b
		synctest.Wait()
		stats(t, m, Stats{Conns: 1})
		<-busy
		began := time.Now()
		if err := <-later; err != nil || time.Since(began) != time.Second {
			t.Errorf("the later call of a: %v, %v after the first, want no error after 1s", err, time.Since(began))
		}
		busy = start(m, context.Background(), "a")
		ctx, cancel = context.WithCancel(context.Background())
		b = start(m, ctx, "b")
		cancel()
		<-b
		if err := <-start(m, context.Background(), "a", interceptor.WithWait(interceptor.None)); err != nil {
			t.Errorf("a call of a after b has given up: %v", err)
		}
		<-busy
		fac.want(t, "made", &fac.made, "a")
	})
}

func TestMaxAge(t *testing.T) {
	fac := &factory{callTakes: time.Second}
	bubble(t, Config{MaxAge: 10 * time.Second}, fac, func(t *testing.T, m *Maker) {
		time.Sleep(time.Hour)
		for range 9 {
			call(t, m, "a")
		}
		long := start(m, context.Background(), "a")
		time.Sleep(time.Second - 1)
		fac.want(t, "made", &fac.made, "a")
		time.Sleep(time.Nanosecond)
		call(t, m, "a")
		<-long
		synctest.Wait()
		fac.want(t, "made", &fac.made, "a", "a")
		fac.want(t, "closed", &fac.closed, "a")
	})
}

func TestMakeTimeout(t *testing.T) {
	for _, tc := range []struct {
		timeout, want time.Duration
		code          codes.Code
	}{
		{0, 20 * time.Second, codes.Unavailable},
		{time.Second, time.Second, codes.Unavailable},
		{None, time.Hour, codes.OK},
	} {
		fac := &factory{makeTakes: time.Hour}
		bubble(t, Config{MakeTimeout: tc.timeout}, fac, func(t *testing.T, m *Maker) {
			began := time.Now()
			err := <-start(m, context.Background(), "a")
			if status.Code(err) != tc.code || time.Since(began) != tc.want {
				t.Errorf("%v: %v after %v, want %v after %v", tc.timeout, err, time.Since(began), tc.code, tc.want)
			}
			if err != nil && !strings.Contains(err.Error(), fmt.Sprintf("MakeTimeout of %v has passed", tc.want)) {
				t.Errorf("%v, want an error that names the setting", err)
			}
		})
	}
}

type observed struct {
	mu   sync.Mutex // Guards list.
	list []string
}

func (o *observed) add(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.list = append(o.list, fmt.Sprintf(format, args...))
}

func (o *observed) Made(key string, took time.Duration, err error) {
	o.add("made %s %v %v", key, took, err)
}

func (o *observed) Waited(key string, d time.Duration) { o.add("waited %s %v", key, d) }

func (o *observed) Closed(key string, why Why, err error) { o.add("closed %s %s %v", key, why, err) }

func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fac := &factory{makeTakes: time.Second, closeErr: errors.New("bad end")}
		obs := &observed{}
		m, err := New(Config{MaxConns: 1, IdleTimeout: time.Minute, MaxAge: time.Hour}, byContext, fac.make, WithObserver(obs))
		if err != nil {
			t.Fatal(err)
		}
		expect := func(want ...string) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(obs.list, want) {
				t.Errorf("observed %q, want %q", obs.list, want)
			}
			obs.list = nil
		}
		a := start(m, context.Background(), "a")
		stats(t, m, Stats{Conns: 1, Making: 1})
		<-a
		call(t, m, "a")
		expect("made a 1s <nil>", "waited a 1s")
		call(t, m, "b")
		expect("closed a replaced bad end", "made b 1s <nil>", "waited b 1s")
		m.Forget("b")
		expect("closed b forgotten bad end")
		call(t, m, "b")
		time.Sleep(time.Minute)
		expect("made b 1s <nil>", "waited b 1s", "closed b idle bad end")
		m.Update(Config{IdleTimeout: None, MaxAge: time.Hour})
		call(t, m, "b")
		time.Sleep(time.Hour)
		call(t, m, "b")
		expect("made b 1s <nil>", "waited b 1s", "closed b aged bad end", "made b 1s <nil>", "waited b 1s")
		fac.err = io.ErrUnexpectedEOF
		<-start(m, context.Background(), "c")
		expect("made c 1s unexpected EOF", "waited c 1s")
		m.Close()
		expect("closed b closed bad end")
	})
}

func TestServerStreamIsKeyedByItsRequest(t *testing.T) {
	fac := &factory{}
	m, err := New(Config{}, func(_ context.Context, _ string, args any) (string, error) {
		if args == nil {
			return "none", nil
		}
		return args.(string), nil
	}, fac.make)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	s, err := m.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	fac.want(t, "made", &fac.made)
	if err := s.SendMsg("a"); err != nil {
		t.Fatal(err)
	}
	stats(t, m, Stats{Conns: 1})
	if err := s.RecvMsg(nil); err != io.EOF {
		t.Errorf("RecvMsg: %v, want EOF", err)
	}
	stats(t, m, Stats{Conns: 1, Idle: 1})
	if _, err := m.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method); err != nil {
		t.Fatal(err)
	}
	fac.want(t, "made", &fac.made, "a", "none")
}

func TestConns(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		call(t, m, "a")
		for c := range m.Conns() {
			if key := c.(*served).key; key != "a" {
				t.Errorf("the connection is that of %s, want a", key)
			}
			err := m.Invoke(with(t.Context(), "b"), method, nil, nil, interceptor.WithWait(interceptor.None))
			if calltest.Reason(err) != interceptor.ReasonConcurrency {
				t.Errorf("a call of b while the loop holds a: %v, want reason CONCURRENCY", err)
			}
		}
		call(t, m, "b")
	})
}

func TestForget(t *testing.T) {
	fac := &factory{callTakes: time.Second}
	bubble(t, Config{}, fac, func(t *testing.T, m *Maker) {
		if m.Forget("a") {
			t.Error("Forget of what there is not is true")
		}
		a := start(m, context.Background(), "a")
		if !m.Forget("a") {
			t.Error("Forget of a connection in use is false")
		}
		call(t, m, "a")
		<-a
		fac.want(t, "made", &fac.made, "a", "a")
		synctest.Wait()
		fac.want(t, "closed", &fac.closed, "a")
		m.Forget("a") // It is idle.
		synctest.Wait()
		fac.want(t, "closed", &fac.closed, "a", "a")
		stats(t, m, Stats{})
		fac.makeTakes = time.Second
		a = start(m, context.Background(), "a")
		m.Forget("a") // It is being made.
		if err := <-a; err != nil {
			t.Error(err)
		}
		synctest.Wait()
		stats(t, m, Stats{})
	})
}

func TestQueueIsLeft(t *testing.T) {
	fac := &factory{callTakes: time.Second}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		a := start(m, context.Background(), "a")
		ctx, cancel := context.WithCancel(context.Background())
		b, c := start(m, ctx, "b"), start(m, context.Background(), "c")
		cancel()
		if err := <-b; status.Code(err) != codes.Canceled {
			t.Errorf("b: %v, want CANCELLED", err)
		}
		stats(t, m, Stats{Conns: 1, Queued: 1})
		<-a
		if err := <-c; err != nil {
			t.Errorf("c: %v", err)
		}
		fac.want(t, "made", &fac.made, "a", "c")
	})
}

func TestFailureGivesItsSlotToTheNext(t *testing.T) {
	fac := &factory{makeTakes: time.Second, err: errors.New("no")}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		a, b := start(m, context.Background(), "a"), start(m, context.Background(), "b")
		fac.mu.Lock()
		fac.err = nil
		fac.mu.Unlock()
		if err := <-a; err == nil {
			t.Error("a: no error")
		}
		if err := <-b; err != nil {
			t.Errorf("b: %v", err)
		}
	})
}

func TestClose(t *testing.T) {
	errClose := errors.New("close")
	fac := &factory{callTakes: time.Hour, closeTakes: time.Second, closeErr: errClose}
	bubble(t, Config{MaxConns: 3}, fac, func(t *testing.T, m *Maker) {
		ctx, cancel := context.WithCancel(context.Background())
		busy := start(m, ctx, "busy")
		if s, err := openStream(ctx, m, "idle"); err != nil {
			t.Error(err)
		} else if err := s.RecvMsg(nil); err != io.EOF {
			t.Error(err)
		}
		fac.makeTakes = time.Hour
		making, queued := start(m, context.Background(), "making"), start(m, ctx, "idle")
		waiting := start(m, context.Background(), "queued")
		stats(t, m, Stats{Conns: 3, Queued: 1})
		began := time.Now()
		second := make(chan error, 1)
		go func() { second <- m.Close() }()
		err := m.Close()
		if !errors.Is(err, errClose) || time.Since(began) != time.Second {
			t.Errorf("Close: %v after %v, want the error of closing after 1s", err, time.Since(began))
		}
		if err := <-second; !errors.Is(err, errClose) {
			t.Errorf("the second Close: %v, want the same", err)
		}
		for name, c := range map[string]<-chan error{"making": making, "queued": waiting} {
			if r, ok := interceptor.AsRefusal(<-c); !ok || r.Reason != interceptor.ReasonDrain {
				t.Errorf("%s: %v, want a refusal with reason DRAIN", name, r)
			}
		}
		if err := m.Invoke(with(ctx, "a"), method, nil, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("a later call: %v, want UNAVAILABLE", err)
		}
		if _, err := m.NewStream(with(ctx, "a"), &grpc.StreamDesc{}, method); status.Code(err) != codes.Unavailable {
			t.Errorf("a later stream: %v, want UNAVAILABLE", err)
		}
		if err := m.Update(Config{}); err != nil {
			t.Errorf("Update after Close: %v", err)
		}
		stats(t, m, Stats{})
		if fac.live != 0 {
			t.Errorf("%d connections live, want 0", fac.live)
		}
		cancel()
		<-busy
		<-queued
	})
}

func TestCloseWakesWaitersOfAMakingThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		m, err := New(Config{}, byContext, func(context.Context, string) (Conn, error) { <-hang; return nil, io.EOF })
		if err != nil {
			t.Fatal(err)
		}
		done := start(m, context.Background(), "a")
		closed := make(chan error, 1)
		go func() { closed <- m.Close() }()
		if err := <-done; calltest.Reason(err) != interceptor.ReasonDrain {
			t.Errorf("a call that waits for its connection: %v, want reason DRAIN", err)
		}
		close(hang)
		if err := <-closed; err != nil {
			t.Error(err)
		}
	})
}

func TestUpdateMaxConns(t *testing.T) {
	fac := &factory{callTakes: time.Second}
	bubble(t, Config{MaxConns: 1}, fac, func(t *testing.T, m *Maker) {
		a, b, c := start(m, context.Background(), "a"), start(m, context.Background(), "b"), start(m, context.Background(), "c")
		if err := m.Update(Config{MaxConns: -1}); err == nil {
			t.Error("Update with -1: no error")
		}
		stats(t, m, Stats{Conns: 1, Queued: 2})
		if err := m.Update(Config{MaxConns: 3}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		stats(t, m, Stats{Conns: 3})
		<-a
		<-b
		<-c
		long := start(m, context.Background(), "a")
		if err := m.Update(Config{MaxConns: 1}); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		stats(t, m, Stats{Conns: 1})
		<-long
		stats(t, m, Stats{Conns: 1, Idle: 1})

		// Fewer than are in use: each is closed when it is not.
		m.Update(Config{MaxConns: 2})
		a, b = start(m, context.Background(), "a"), start(m, context.Background(), "b")
		m.Update(Config{MaxConns: 1})
		stats(t, m, Stats{Conns: 2})
		<-a
		<-b
		synctest.Wait()
		stats(t, m, Stats{Conns: 1, Idle: 1})
	})
}

func TestUpdateMaxConnsWhileClosing(t *testing.T) {
	fac := &factory{closeTakes: time.Minute}
	bubble(t, Config{MaxConns: 3}, fac, func(t *testing.T, m *Maker) {
		for _, k := range []string{"a", "b", "c"} {
			call(t, m, k)
		}
		if err := m.Update(Config{MaxConns: 1}); err != nil {
			t.Fatal(err)
		}
		stats(t, m, Stats{Conns: 1, Idle: 1, Closing: 2})
		call(t, m, "d")
		fac.want(t, "made", &fac.made, "a", "b", "c", "d")
	})
}

func TestUpdateIdleTimeout(t *testing.T) {
	fac := &factory{}
	bubble(t, Config{IdleTimeout: time.Hour}, fac, func(t *testing.T, m *Maker) {
		call(t, m, "a")
		time.Sleep(time.Minute)
		m.Update(Config{IdleTimeout: 2 * time.Minute})
		time.Sleep(time.Minute - 1)
		stats(t, m, Stats{Conns: 1, Idle: 1})
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		stats(t, m, Stats{})
		call(t, m, "a")
		m.Update(Config{IdleTimeout: None})
		time.Sleep(time.Hour)
		m.Update(Config{IdleTimeout: time.Minute})
		synctest.Wait()
		stats(t, m, Stats{})
	})
}

func TestMakeFuncFaults(t *testing.T) {
	for name, f := range map[string]MakeFunc{
		"make panicked: boom":                           func(context.Context, string) (Conn, error) { panic("boom") },
		"make did not return":                           func(context.Context, string) (Conn, error) { runtime.Goexit(); return nil, nil },
		"make returned neither a connection nor an err": func(context.Context, string) (Conn, error) { return nil, nil },
		"make returned neither a connection nor an":     func(context.Context, string) (Conn, error) { return (*grpc.ClientConn)(nil), nil },
	} {
		t.Run(name, func(t *testing.T) {
			m, err := New(Config{}, byContext, f)
			if err != nil {
				t.Fatal(err)
			}
			defer m.Close()
			err = m.Invoke(context.Background(), method, nil, nil)
			if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), name) {
				t.Errorf("call: %v, want INTERNAL that says %q", err, name)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error is %q, want one line", err)
			}
			stats(t, m, Stats{})
		})
	}
}

func TestKeyError(t *testing.T) {
	for _, tc := range []struct {
		err  error
		code codes.Code
	}{{errors.New("no tenant"), codes.InvalidArgument}, {status.Error(codes.Unauthenticated, ""), codes.Unauthenticated}} {
		fac := &factory{}
		m, err := New(Config{}, func(context.Context, string, any) (string, error) { return "", tc.err }, fac.make)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		err = m.Invoke(context.Background(), method, nil, nil)
		if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != ReasonMake || !errors.Is(err, tc.err) || status.Code(err) != tc.code {
			t.Errorf("call: %v, want a refusal with %v", err, tc.code)
		}
		fac.want(t, "made", &fac.made)
	}
}

func TestKeyDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fac := &factory{}
		m, err := New(Config{}, func(ctx context.Context, _ string, _ any) (string, error) {
			<-ctx.Done()
			return "", fmt.Errorf("looking up the tenant: %w", ctx.Err())
		}, fac.make)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := m.Invoke(ctx, method, nil, nil); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("call: %v, want DEADLINE_EXCEEDED", err)
		}
		ctx, cancel = context.WithCancel(t.Context())
		cancel()
		if err := m.Invoke(ctx, method, nil, nil); status.Code(err) != codes.Canceled {
			t.Errorf("call: %v, want CANCELLED", err)
		}
	})
}

func TestPanicReleases(t *testing.T) {
	m, err := New(Config{}, byContext, func(context.Context, string) (Conn, error) { return panicking{}, nil })
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	for name, f := range map[string]func(){
		"unary":  func() { m.Invoke(context.Background(), method, nil, nil) },
		"stream": func() { m.NewStream(context.Background(), &grpc.StreamDesc{}, method) },
	} {
		func() {
			defer func() {
				if got := recover(); got != "boom" {
					t.Errorf("%s: recovered %v, want the connection's panic", name, got)
				}
			}()
			f()
		}()
		stats(t, m, Stats{Conns: 1, Idle: 1})
	}
}

type panicking struct{}

func (panicking) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { panic("boom") }
func (panicking) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("boom")
}
func (panicking) Close() error { return nil }

func TestConfigErrors(t *testing.T) {
	mk := (&factory{}).make
	for want, f := range map[string]func() (*Maker, error){
		"maker: MaxConns is -1, must be":     func() (*Maker, error) { return New(Config{MaxConns: -1}, byContext, mk) },
		"maker: IdleTimeout is 1ns, must be": func() (*Maker, error) { return New(Config{IdleTimeout: 1}, byContext, mk) },
		"maker: MaxAge is 1ns, must be":      func() (*Maker, error) { return New(Config{MaxAge: 1}, byContext, mk) },
		"maker: MakeTimeout is 1ns, must be": func() (*Maker, error) { return New(Config{MakeTimeout: 1}, byContext, mk) },
		"maker: WithObserver is nil":         func() (*Maker, error) { return New(Config{}, byContext, mk, WithObserver(nil)) },
		"maker: key is nil":                  func() (*Maker, error) { return New(Config{}, nil, mk) },
		"maker: makeConn is nil":             func() (*Maker, error) { return New(Config{}, byContext, nil) },
	} {
		if _, err := f(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want an error that begins with %q", err, want)
		}
	}
}

func TestName(t *testing.T) {
	m, err := New(Config{}, byContext, (&factory{}).make, WithName("tenants"))
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
	if r, ok := interceptor.AsRefusal(m.Invoke(context.Background(), method, nil, nil)); !ok || r.Layer != "tenants" {
		t.Errorf("refusal %v, want one of tenants", r)
	}
}

// unfair says what does not hold of the keys that wait in m, and should always.
func unfair(m *Maker) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	waiting, yielding, busy, idle := m.queue.Len(), m.yielding.Len(), m.busy.Len(), m.idle.Len()
	switch {
	case m.conns != yielding+busy+idle:
		return fmt.Errorf("%d connections, but %d yield, %d are busy and %d idle", m.conns, yielding, busy, idle)
	case waiting > 0 && (idle > 0 || m.conns < m.config.MaxConns):
		return fmt.Errorf("%d keys wait, but %d of %d connections are idle and there may be %d", waiting, idle, m.conns, m.config.MaxConns)
	case yielding != min(waiting, m.conns):
		return fmt.Errorf("%d keys wait and %d of %d connections yield, want one for each", waiting, yielding, m.conns)
	}
	return nil
}

// Calls of random keys that take a random time, are cancelled, or fail to get a
// connection, in virtual time: the bound always holds, and at rest all that is
// left is idle, and then gone. Virtual time makes it fail never or for a reason.
func TestRandomCalls(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	fac := &factory{makeTakes: 5 * time.Millisecond, closeTakes: 3 * time.Millisecond, callTakes: 10 * time.Millisecond}
	bubble(t, Config{MaxConns: 3, IdleTimeout: 20 * time.Millisecond, MaxAge: 200 * time.Millisecond, MaxWait: 100 * time.Millisecond}, fac, func(t *testing.T, m *Maker) {
		var wg sync.WaitGroup
		var ok atomic.Int64
		over := false
		for range 1000 {
			key, isStream, d := fmt.Sprint(rng.IntN(8)), rng.IntN(4) == 0, time.Duration(rng.IntN(150))*time.Millisecond
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(context.Background(), d)
				defer cancel()
				if isStream {
					if s, err := openStream(ctx, m, key); err == nil && d%2 == 0 {
						s.RecvMsg(nil)
					}
				} else if m.Invoke(with(ctx, key), method, nil, nil) == nil {
					ok.Add(1)
				}
			})
			over = over || m.Stats().Conns > 3
			if err := unfair(m); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(20) == 0 {
				m.Forget(key)
			}
			if rng.IntN(3) == 0 {
				time.Sleep(time.Duration(rng.IntN(10)) * time.Millisecond)
			}
			if rng.IntN(20) == 0 {
				fac.mu.Lock()
				fac.err = nil
				if rng.IntN(3) == 0 {
					fac.err = errors.New("not now")
				}
				fac.mu.Unlock()
			}
		}
		wg.Wait()
		time.Sleep(time.Second)
		synctest.Wait()
		stats(t, m, Stats{})
		if fac.live != 0 || len(fac.closed) == 0 || over {
			t.Errorf("%d connections live at rest, %d closed, over the bound: %t, want 0, some, false", fac.live, len(fac.closed), over)
		}
		if ok.Load() == 0 {
			t.Error("no call succeeded")
		}
	})
}

// through is a connection that passes calls on to where the interceptor, whose
// invoker or streamer is in the context, would have.
type through struct{}

type targetKey struct{}

type target struct {
	desc     *grpc.StreamDesc
	cc       *grpc.ClientConn
	invoker  grpc.UnaryInvoker
	streamer grpc.Streamer
}

func (through) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	t := ctx.Value(targetKey{}).(target)
	return t.invoker(ctx, method, args, reply, t.cc, opts...)
}

func (through) NewStream(ctx context.Context, _ *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	t := ctx.Value(targetKey{}).(target)
	return t.streamer(ctx, t.desc, t.cc, method, opts...)
}

func (through) Close() error { return nil }

// The conformance kit tests layers. Here a Maker becomes one, in front of the
// kit's connection.
func TestConformance(t *testing.T) {
	layertest.Run(t, func() (interceptor.Spec, func() error) {
		m, err := New(Config{MaxConns: 2}, func(context.Context, string, any) (string, error) { return "", nil },
			func(context.Context, string) (Conn, error) { return through{}, nil })
		if err != nil {
			t.Fatal(err)
		}
		l := interceptor.Foreign("maker",
			func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				return m.Invoke(context.WithValue(ctx, targetKey{}, target{cc: cc, invoker: invoker}), method, req, reply, opts...)
			},
			func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				// An interceptor has to open its stream at once, so the Maker sees one that
				// it opens at once.
				return m.NewStream(context.WithValue(ctx, targetKey{}, target{desc: desc, cc: cc, streamer: streamer}),
					&grpc.StreamDesc{ServerStreams: desc.ServerStreams, ClientStreams: true}, method, opts...)
			})
		return l, func() error {
			defer m.Close()
			// The end of an abandoned stream is learnt by the stack and by the Maker
			// each for itself, in no order.
			var s Stats
			for began := time.Now(); time.Since(began) < time.Minute; runtime.Gosched() {
				if s = m.Stats(); s.Conns == s.Idle && s.Queued == 0 {
					return nil
				}
			}
			return fmt.Errorf("stats are %+v, want no connection in use", s)
		}
	})
}

func TestAllocations(t *testing.T) {
	m := benchMaker(t)
	defer m.Close()
	ctx := context.Background()
	if got := testing.AllocsPerRun(100, func() { m.Invoke(ctx, method, nil, nil) }); got != 0 {
		t.Errorf("%v allocations, want 0", got)
	}
}

func benchMaker(t testing.TB) *Maker {
	m, err := New(Config{}, func(context.Context, string, any) (string, error) { return "a", nil }, (&factory{}).make)
	if err != nil {
		t.Fatal(err)
	}
	m.Invoke(context.Background(), method, nil, nil)
	return m
}

func BenchmarkMaker(b *testing.B) {
	m := benchMaker(b)
	defer m.Close()
	ctx := context.Background()
	b.Run("unary", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			m.Invoke(ctx, method, nil, nil)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				m.Invoke(ctx, method, nil, nil)
			}
		})
	})
	b.Run("stream", func(b *testing.B) {
		b.ReportAllocs()
		desc := &grpc.StreamDesc{ServerStreams: true}
		for b.Loop() {
			s, err := m.NewStream(ctx, desc, method)
			if err != nil {
				b.Fatal(err)
			}
			s.SendMsg(nil)
			s.RecvMsg(nil)
		}
	})
}
