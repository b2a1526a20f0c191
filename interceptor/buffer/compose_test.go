// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package buffer_test

import (
	"context"
	"io"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/internal/calltest"
)

// How the limits that wait and the layers that say how long compose. A toy bucket
// stands in for a rate limit: it refunds what was not sent.

// bucket has a number of tokens that are not filled up.
type bucket struct {
	interceptor.GateOnly
	tokens int64
}

func (b *bucket) WrapGate(inner interceptor.Gate) interceptor.Gate {
	empty := interceptor.Refuse("bucket", interceptor.ReasonRateLimit, "")
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		if b.tokens == 0 {
			return empty
		}
		b.tokens--
		c.Hold(b, 1)
		return inner.Admit(ctx, c, w)
	})
}

func (b *bucket) Release(n int64, o interceptor.Outcome, _ error) {
	if o == interceptor.NotSent {
		b.tokens += n
	}
}

func fast(t testing.TB, d time.Duration) *failfast.Layer {
	t.Helper()
	return must[*failfast.Layer](t)(failfast.New(failfast.Config{After: d}))
}

func TestAFullLimitWaitsExactlyASecondAndAShedOutsideRefusesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, limit(t, 1)).Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.OK(2*time.Second))
		calltest.Expect(t, calltest.Burst(calltest.Stack(t, shed(t), limit(t, 1)).Wrap(calltest.Takes(time.Second)), 2),
			calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
	})
}

func TestTenRefusalsBurnNoToken(t *testing.T) {
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
		ends = calltest.Begin(calltest.Stack(t, shed(t), places(t, 1), b, l).Wrap(calltest.Takes(time.Second)), 3)
		calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.OK(2*time.Second), calltest.Refused(0, interceptor.ReasonQueueFull))
		if b.tokens != 2 {
			t.Errorf("%d tokens left after two more calls, want 2", b.tokens)
		}
	})
}

func TestFailFastRefusesAtExactlyItsBoundInsideABuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, f := places(t, 3), fast(t, 300*time.Millisecond)
		c := calltest.Stack(t, shed(t), b, f, limit(t, 1)).Wrap(calltest.Takes(time.Second))
		failed := calltest.Refused(300*time.Millisecond, interceptor.ReasonFailFast)
		calltest.Expect(t, calltest.Burst(c, 5), calltest.OK(time.Second), failed, failed, failed, calltest.Refused(0, interceptor.ReasonQueueFull))
		checkRest(t, b)
	})
}

func TestABufferInsideAFailFastWaitsOnItsBehalf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, fast(t, 300*time.Millisecond), places(t, 1), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.OK(2*time.Second))
	})
}

func TestAShedInsideABufferTakesItsWaitingAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := calltest.Stack(t, places(t, 10), shed(t), limit(t, 1)).Wrap(calltest.Takes(time.Second))
		calltest.Expect(t, calltest.Burst(c, 2), calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonConcurrency))
	})
}

// Tower's builder documentation counts them.
func TestTheOrderOfBufferAndLimitDecidesHowManyCallsThereAre(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, tc := range []struct {
			name                     string
			layers                   []interceptor.Layer
			calls                    int
			running, queued, refused int
		}{
			{"shed > buffer(100) > limit(10)", []interceptor.Layer{shed(t), places(t, 100), limit(t, 10)}, 150, 10, 100, 40},
			{"buffer(100) > limit(10)", []interceptor.Layer{places(t, 100), limit(t, 10)}, 150, 10, 100, 40},
			{"shed > limit(10) > buffer(100)", []interceptor.Layer{shed(t), limit(t, 10), places(t, 100), &bucket{tokens: 1000}}, 150, 10, 0, 140},
			{"limit(10) > buffer(100)", []interceptor.Layer{limit(t, 10), places(t, 100), &bucket{tokens: 1000}}, 150, 10, 140, 0},
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

func TestAStreamHoldsItsPermitButNoPlaceUntilItHasEnded(t *testing.T) {
	desc := &grpc.StreamDesc{ServerStreams: true}
	b, l := places(t, 1), limit(t, 1)
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

// again makes a second attempt of calls that fail.
type again struct {
	interceptor.CallOnly
	_ byte
}

func (*again) WrapCall(next interceptor.Next, inner interceptor.Gate) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		origin := c.Origin()
		err := next(ctx, c)
		if err == nil {
			return nil
		}
		f := origin.Fork()
		if inner.Admit(ctx, f, interceptor.None) != nil {
			return err
		}
		err = next(ctx, f)
		c.Adopt(f)
		return err
	}
}

func TestAFurtherAttemptPassesABufferButDoesNotWaitInIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b, l := places(t, 10), limit(t, 1)
		attempts := 0
		c := calltest.Stack(t, &again{}, b, l).Wrap(calltest.Server(func(context.Context) error {
			attempts++
			time.Sleep(time.Second)
			return io.ErrUnexpectedEOF
		}))
		call := func() {
			t.Helper()
			if err := c.Invoke(context.Background(), calltest.Method, nil, &struct{}{}); err != io.ErrUnexpectedEOF {
				t.Errorf("got %v, want the server's error", err)
			}
		}
		start := time.Now()
		call()
		if attempts != 2 || time.Since(start) != 2*time.Second {
			t.Errorf("%d attempts in %v with a permit free, want 2 in 2s", attempts, time.Since(start))
		}
		attempts = 0
		time.AfterFunc(500*time.Millisecond, func() { // Takes the permit for itself.
			if err := l.SetLimit(0); err != nil {
				t.Error(err)
			}
		})
		call()
		if attempts != 1 || time.Since(start) != 3*time.Second {
			t.Errorf("%d attempts, until %v, with no permit free, want 1, until 3s", attempts, time.Since(start))
		}
		checkRest(t, b)
	})
}
