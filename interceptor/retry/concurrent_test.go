// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// However many calls fail, no more further attempts are under way than MaxConcurrent
// allows, and all of those that ended make room.
func TestMaxConcurrent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := quick
		c.MaxAttempts = 2
		c.Budget = budget.Config{Ratio: 10, MaxConcurrent: 3}
		l := mustNew(t, c)
		var mu sync.Mutex
		calls, now, most := 0, 0, 0
		conn := calltest.Stack(t, l).Wrap(calltest.Server(func(context.Context) error {
			mu.Lock()
			calls++
			first := calls <= 20 || calls > 23 && calls <= 43
			if !first {
				now++
				most = max(most, now)
			}
			mu.Unlock()
			if first {
				return unavailable
			}
			time.Sleep(time.Second)
			mu.Lock()
			defer mu.Unlock()
			now--
			return nil
		}))
		for range 2 {
			var wg sync.WaitGroup
			refused := 0
			for range 20 {
				wg.Go(func() {
					err := conn.Invoke(t.Context(), method, nil, nil)
					mu.Lock()
					defer mu.Unlock()
					if r, ok := interceptor.AsRefusal(err); ok && r.Reason == interceptor.ReasonBudget && status.Code(err) == status.Code(unavailable) {
						refused++
					} else if err != nil {
						t.Errorf("got %v, want success or a refusal", err)
					}
				})
			}
			wg.Wait()
			if most != 3 || refused != 17 || l.Budget().Concurrent() != 0 {
				t.Errorf("%d further attempts at once, %d refused, %d afterwards; want 3, 17 and none", most, refused, l.Budget().Concurrent())
			}
		}
	})
}

// A further attempt of a stream counts until the stream has ended.
func TestMaxConcurrent_stream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := mustNew(t, quick)
		opened := 0
		open := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			if opened++; opened == 1 {
				return nil, unavailable
			}
			return eof{}, nil
		}
		s, err := calltest.Stack(t, l).StreamClientInterceptor()(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, method, open)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Budget().Concurrent(); got != 1 {
			t.Errorf("%d further attempts while the stream is open, want 1", got)
		}
		s.RecvMsg(nil)
		if got := l.Budget().Concurrent(); got != 0 {
			t.Errorf("%d further attempts after the stream, want none", got)
		}
	})
}

// further notes the further attempts that an observer is told of.
type further struct {
	interceptor.NopObserver
	log []string
}

func (f *further) Further(c interceptor.Observed, layer string, a interceptor.FurtherAttempt) {
	f.log = append(f.log, fmt.Sprintf("%s %s %d %s %v %v", c.Method, layer, a.Attempt, a.Reason, a.Delay, a.After))
}

func TestObserverFurther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := new(further)
		s := fails(t, unavailable, unavailable)
		l := mustNew(t, quick, retry.WithPolicy(func(_ context.Context, a *retry.Attempt) retry.Decision {
			d := a.Default
			if a.N == 2 {
				d.Reason = "mine"
			}
			return d
		}))
		calltest.Stack(t, interceptor.Observe(f), l).Wrap(s).Invoke(t.Context(), method, wrapperspb.String(""), new(wrapperspb.StringValue))
		want := []string{
			fmt.Sprintf("%s retry 1 Unavailable 10ms %v", method, unavailable),
			fmt.Sprintf("%s retry 2 mine 20ms %v", method, unavailable),
		}
		if !slices.Equal(f.log, want) {
			t.Errorf("the observer was told of %q,\nwant %q", f.log, want)
		}
	})
}
