// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
)

// held is a server that answers no call until it is told to.
type held struct {
	grpc.ClientConnInterface
	mu  sync.Mutex // Guards now and max.
	now int
	max int // The most calls that ran at a time.
	end chan struct{}
}

func newHeld() *held { return &held{end: make(chan struct{})} }

func (h *held) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	h.mu.Lock()
	h.now++
	h.max = max(h.max, h.now)
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.now--
	}()
	select {
	case <-h.end:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (h *held) running() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now
}

// Tower's builder_service test: the same layers around an inner service that
// answers "world" to true.
func TestTowersBuilderServiceComposes(t *testing.T) {
	s := newStack(t, `{"buffer": {"size": 5}}, {"concurrency": {"limit": 5}}, {"rateLimit": {"limit": 5, "per": "5s", "burst": 5}},
		{"retry": {}}, {"provided": "response"}, {"provided": "request"}`,
		stackconfig.WithLayer("response", interceptor.MapResponse(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
			m.Value = fmt.Sprint(m.Value == "world")
			return nil
		})),
		stackconfig.WithLayer("request", interceptor.MapRequest(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
			return wrapperspb.String(fmt.Sprint(m.Value == "hello")), nil
		})))
	want := "*: [buffer > concurrency > ratelimit > retry > mapresponse > maprequest]"
	if got := s.String(); got != want {
		t.Errorf("String() = %q, want %q: the first layer is the outermost", got, want)
	}
	var seen string
	unary := s.UnaryClientInterceptor()
	reply := new(wrapperspb.StringValue)
	err := unary(t.Context(), "/s.S/M", wrapperspb.String("hello"), reply, nil,
		func(_ context.Context, _ string, req, reply any, _ *grpc.ClientConn, _ ...grpc.CallOption) error {
			seen = req.(*wrapperspb.StringValue).Value
			reply.(*wrapperspb.StringValue).Value = "world"
			return nil
		})
	if err != nil || seen != "true" || reply.Value != "true" {
		t.Errorf("the inner service saw %q, the caller got %q and %v, want true, true and no error", seen, reply.Value, err)
	}
}

// The order is the program: what is in flight, waits and is refused of 200 calls
// at a time, as the documentation of package interceptor counts it.
func TestOrderDecidesHowManyCallsAreInFlight(t *testing.T) {
	const (
		shed   = `{"loadShed": {}}`
		queue  = `{"name": "buffer", "buffer": {"size": 100}}`
		limit  = `{"name": "limit", "concurrency": {"limit": 10}}`
		within = `{"provided": "ready"}` // What a buffer may stand in front of that is always ready.
	)
	for _, c := range []struct {
		order                  string
		run, atLimit, inBuffer int // At a time; the rest of 200 calls is refused.
	}{
		{queue + "," + limit, 10, 100, 100},
		{limit + "," + queue + "," + within, 10, 190, 0},
		{shed + "," + limit, 10, 0, -1},
		{limit + "," + shed, 10, 190, -1},
		{shed + "," + queue + "," + limit, 10, 100, 100},
		{queue + "," + shed + "," + limit, 10, 0, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStack(t, c.order, stackconfig.WithLayer("ready", interceptor.CarryWait()))
			server := newHeld()
			conn := s.Wrap(server)
			errs := make(chan error, 200)
			for range 200 {
				go func() { errs <- conn.Invoke(t.Context(), "/s.S/M", nil, nil) }()
			}
			synctest.Wait()
			in := c.run + c.atLimit
			l := s.Layer("limit").(*concurrency.Layer)
			if run, wait, refused := server.running(), l.Waiting(), len(errs); run != c.run || wait != c.atLimit || refused != 200-in {
				t.Errorf("%v: %d run, %d wait at the limit and %d are refused, want %d, %d and %d", s, run, wait, refused, c.run, c.atLimit, 200-in)
			}
			if c.inBuffer >= 0 {
				if got := s.Layer("buffer").(*buffer.Layer).Waiting(); got != c.inBuffer {
					t.Errorf("%v: %d wait in the buffer, want %d", s, got, c.inBuffer)
				}
			}
			if got := s.InFlight(); got != in {
				t.Errorf("%v: InFlight() = %d, want %d", s, got, in)
			}
			close(server.end)
			var ok int
			for range 200 {
				err := <-errs
				r, refused := interceptor.AsRefusal(err)
				switch {
				case err == nil:
					ok++
				case !refused || !r.NotSent():
					t.Errorf("%v: a call ended with %v, want no error or a refusal", s, err)
				}
			}
			if ok != in || server.max != 10 {
				t.Errorf("%v: %d calls succeeded, at most %d at a time, want %d and 10", s, ok, server.max, in)
			}
		})
	}
}

// One deadline holds for waiting and running.
func TestADeadlineCoversWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Tower's Timeout(50 ms) > ConcurrencyLimit(1) lets 20 calls of 40 ms succeed,
		// the last after 800 ms.
		s := newStack(t, `{"timeout": {"call": "0.05s"}}, {"concurrency": {"limit": 1}}`)
		server := sleeper(40 * time.Millisecond)
		conn := s.Wrap(server)
		begin := time.Now()
		errs := make(chan error, 20)
		for range 20 {
			go func() { errs <- conn.Invoke(t.Context(), "/s.S/M", nil, nil) }()
		}
		ok := 0
		for range 20 {
			if err := <-errs; err == nil {
				ok++
			} else if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a call ended with %v, want a deadline exceeded", err)
			}
		}
		if d := time.Since(begin); ok != 1 || d != 50*time.Millisecond {
			t.Errorf("%d of 20 calls of 40ms succeeded, the last ended after %v, want 1 and 50ms", ok, d)
		}
	})
}

// sleeper is a server whose calls take a time.
type sleeper time.Duration

func (d sleeper) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	timer := time.NewTimer(time.Duration(d))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (sleeper) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return nil, errors.New("no streams here")
}
