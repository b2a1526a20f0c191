// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer_test

import (
	"context"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// How the limits that wait and the layers that say how long compose. A toy bucket
// takes the role of a rate limit: it refunds what was not sent.

// bucket has a number of tokens that are not filled up.
type bucket struct {
	interceptor.GateOnly
	tokens int64
}

func (b *bucket) NewLayer() (interceptor.Layer, error) { return b, nil }

func (b *bucket) WrapGate(inner interceptor.Gate) interceptor.Gate {
	empty := interceptor.Refuse("bucket", interceptor.ReasonRateLimit, "")
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if b.tokens == 0 {
			return empty
		}
		b.tokens--
		a.Hold(b, 1)
		return inner.Admit(ctx, a, w)
	})
}

func (b *bucket) Release(n int64, e interceptor.End) {
	if !e.Outcome.Sent() {
		b.tokens += n
	}
}

func fast(t testing.TB, d time.Duration) *failfast.Layer {
	t.Helper()
	return must[*failfast.Layer](t)(failfast.New(failfast.Config{After: d}))
}

func TestComposeShedOverLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, limit(t, 1)).Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.OK(2*time.Second))
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, shed(t), limit(t, 1)).Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
	})
}

func TestComposeRefusalsBurnNoToken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &bucket{tokens: 5}
		l := limit(t, 1)
		c := calltest.Stack(t, shed(t), b, l).Wrap(calltest.Takes(time.Second))
		ends := calltest.Begin(c, 1)
		for range 10 {
			calltest.Expect(t, calltest.Burst(c, 1), calltest.Refused(0, interceptor.ReasonConcurrency))
		}
		if b.tokens != 4 {
			t.Errorf("%d tokens left after a call and ten refusals, want 4", b.tokens)
		}
		calltest.Expect(t, ends(), calltest.OK(time.Second))
		// Nor does asking twice, as a buffer does that lets a call wait.
		ends = calltest.Begin(calltest.Stack(t, shed(t), slots(t, 1), b, l).Wrap(calltest.Takes(time.Second)), 3)
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
		if b.tokens != 2 {
			t.Errorf("%d tokens left after two more calls, want 2", b.tokens)
		}
	})
}

func TestComposeFailFastInsideBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, f := slots(t, 3), fast(t, 300*time.Millisecond)
		c := calltest.Stack(t, shed(t), b, f, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		failed := calltest.Refused(300*time.Millisecond, interceptor.ReasonFailFast)
		calltest.Expect(t, calltest.Burst(c, 5), calltest.OK(time.Second), failed, failed, failed, calltest.Refused(0, interceptor.ReasonQueueFull))
		checkRest(t, b)
	})
}

func TestComposeBufferInsideFailFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, fast(t, 300*time.Millisecond), slots(t, 1), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.OK(2*time.Second))
	})
}

func TestComposeShedInsideBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, slots(t, 10), shed(t), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
	})
}

// Tower's builder documentation counts them.
func TestComposeOrderOfBufferAndLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct {
			name                     string
			layers                   []interceptor.Spec
			calls                    int
			running, queued, refused int
		}{
			{"shed > buffer(100) > limit(10)", []interceptor.Spec{shed(t), slots(t, 100), limit(t, 10)}, 150, 10, 100, 40},
			{"buffer(100) > limit(10)", []interceptor.Spec{slots(t, 100), limit(t, 10)}, 150, 10, 100, 40},
			{"shed > limit(10) > buffer(100)", []interceptor.Spec{shed(t), limit(t, 10), slots(t, 100), &bucket{tokens: 1000}}, 150, 10, 0, 140},
			{"limit(10) > buffer(100)", []interceptor.Spec{limit(t, 10), slots(t, 100), &bucket{tokens: 1000}}, 150, 10, 140, 0},
		} {
			running := 0
			release := make(chan struct{})
			s := calltest.Stack(t, tc.layers...)
			ends := calltest.Begin(s.Wrap(calltest.Server(func(context.Context) error {
				running++ // They begin one after the other.
				<-release
				return nil
			})), tc.calls)
			if inStack := s.InFlight(); running != tc.running || inStack-running != tc.queued {
				t.Errorf("%s: %d run and %d wait, want %d and %d", tc.name, running, inStack-running, tc.running, tc.queued)
			}
			release <- struct{}{} // One ends, one takes its place.
			synctest.Wait()
			want := tc.running
			if tc.queued > 0 {
				want++
			}
			if running != want {
				t.Errorf("%s: %d calls were sent after one has ended, want %d", tc.name, running, want)
			}
			for range tc.running + tc.queued - 1 {
				release <- struct{}{}
				synctest.Wait()
			}
			n := 0
			for _, e := range ends() {
				if e.Reason != "" {
					n++
				}
			}
			if n != tc.refused {
				t.Errorf("%s: %d calls were refused, want %d", tc.name, n, tc.refused)
			}
		}
	})
}

// oneMessage is a connection whose streams have one message.
type oneMessage struct {
	grpc.ClientConnInterface
	open error
}

func (c oneMessage) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	return &message{ctx: ctx}, c.open
}

type message struct {
	grpc.ClientStream
	ctx  context.Context
	read bool
}

func (m *message) Context() context.Context { return m.ctx }

func (m *message) RecvMsg(any) error {
	if m.read {
		return io.EOF
	}
	m.read = true
	return nil
}

func TestComposeStream(t *testing.T) {
	desc := &grpc.StreamDesc{ServerStreams: true}
	b, l := slots(t, 1), limit(t, 1)
	c := calltest.Stack(t, shed(t), b, l).Wrap(oneMessage{})
	check := func(when string, permits int64, waiting int) {
		t.Helper()
		if p, w := l.InUse(), b.Waiting(); p != permits || w != waiting {
			t.Errorf("%s: %d permits and %d places taken, want %d and %d", when, p, w, permits, waiting)
		}
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		first, err := c.NewStream(ctx, desc, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		check("open", 1, 0)
		second := make(chan grpc.ClientStream)
		go func() {
			s, err := c.NewStream(ctx, desc, calltest.Method)
			if err != nil {
				t.Error(err)
			}
			second <- s
		}()
		synctest.Wait()
		check("a second one waits", 1, 1)
		for err == nil {
			err = first.RecvMsg(nil)
		}
		if err != io.EOF {
			t.Errorf("the first stream ended with %v, want EOF", err)
		}
		<-second
		check("the first has ended, the second is open", 1, 0)
		cancel()
		synctest.Wait()
		check("the second was abandoned and cancelled", 0, 0)
		if _, err := calltest.Stack(t, b, l).Wrap(oneMessage{open: io.ErrUnexpectedEOF}).NewStream(context.Background(), desc, calltest.Method); err == nil {
			t.Error("a stream that cannot be opened was opened")
		}
		check("creation failed", 0, 0)
	})
}

// again makes a second attempt of calls that fail, as a retry does, or as a hedge does
// if it is expendable.
type again struct {
	interceptor.CallOnly
	wait       interceptor.Wait
	expendable bool
	backoff    time.Duration
}

func (l *again) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *again) WrapCall(next interceptor.Next, again interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		origin.Expendable = l.expendable
		err := next(ctx, c)
		if err == nil {
			return nil
		}
		time.Sleep(l.backoff)
		f, refused := again(ctx, &origin, l.wait)
		if refused != nil {
			return interceptor.RefusedAgain(refused, err)
		}
		err = next(ctx, f)
		c.Adopt(f)
		return err
	}
}

type name struct{}

// named is the context of a call whose server knows it by a name.
func named(n string) context.Context { return context.WithValue(context.Background(), name{}, n) }

func TestFurtherAttempts(t *testing.T) {
	// The call "flaky" fails after 1s, which hands the permit to "one", and tries again
	// after a while. "two" waits in the buffer, and "three" comes at some moment.
	run := func(t *testing.T, a *again, priority int, three time.Duration) (sent []string, errs map[string]error) {
		b := slots(t, 2)
		c := calltest.Stack(t, shed(t), a, b, limit(t, 1)).Wrap(calltest.Server(func(ctx context.Context) error {
			sent = append(sent, ctx.Value(name{}).(string))
			time.Sleep(time.Second)
			if len(sent) == 1 {
				return status.Error(codes.Unavailable, "flaky")
			}
			return nil
		}))
		errs = make(map[string]error)
		var mu sync.Mutex
		var wg sync.WaitGroup
		for _, call := range []struct {
			name string
			at   time.Duration
		}{{"flaky", 0}, {"one", 100 * time.Millisecond}, {"two", 200 * time.Millisecond}, {"three", three}} {
			wg.Go(func() {
				time.Sleep(call.at)
				ctx := named(call.name)
				if call.name == "flaky" {
					ctx = interceptor.ContextWithPriority(ctx, priority)
				}
				err := c.Invoke(ctx, calltest.Method, nil, &struct{}{})
				mu.Lock()
				defer mu.Unlock()
				errs[call.name] = err
			})
		}
		wg.Wait()
		checkRest(t, b)
		return sent, errs
	}
	const backoff, full, late = 500 * time.Millisecond, 1200 * time.Millisecond, 1700 * time.Millisecond
	for _, tc := range []struct {
		name     string
		layer    again
		priority int
		three    time.Duration
		sent     []string
		refused  map[string]interceptor.Reason
	}{
		{"of_a_retry_evict_first_attempts", again{wait: interceptor.Forever, backoff: backoff}, 0, full,
			[]string{"flaky", "one", "flaky", "two"}, map[string]interceptor.Reason{"three": interceptor.ReasonQueueFull}},
		{"that_are_expendable_evict_nobody", again{wait: interceptor.Forever, expendable: true, backoff: backoff}, 1, full,
			[]string{"flaky", "one", "two", "three"}, map[string]interceptor.Reason{"flaky": interceptor.ReasonQueueFull}},
		{"that_are_expendable_give_their_slots_to_others", again{wait: interceptor.Forever, expendable: true, backoff: backoff}, 1, late,
			[]string{"flaky", "one", "two", "three"}, map[string]interceptor.Reason{"flaky": interceptor.ReasonQueueFull}},
		{"without_a_wait_do_not_wait", again{wait: interceptor.None, backoff: backoff}, 1, late,
			[]string{"flaky", "one", "two", "three"}, map[string]interceptor.Reason{"flaky": interceptor.ReasonConcurrency}},
		{"without_a_wait_evict_nobody", again{wait: interceptor.None, backoff: backoff}, 1, full,
			[]string{"flaky", "one", "two", "three"}, map[string]interceptor.Reason{"flaky": interceptor.ReasonConcurrency}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				sent, errs := run(t, &tc.layer, tc.priority, tc.three)
				if !slices.Equal(sent, tc.sent) {
					t.Errorf("sent %v, want %v", sent, tc.sent)
				}
				for n, err := range errs {
					if got := calltest.Reason(err); got != tc.refused[n] {
						t.Errorf("%s: %v, want %q", n, err, tc.refused[n])
					}
				}
				// Its status is the server's.
				if err := errs["flaky"]; err != nil && status.Convert(err).Message() != "flaky" {
					t.Errorf("flaky: status %v, want the server's", status.Convert(err))
				}
			})
		})
	}
}
