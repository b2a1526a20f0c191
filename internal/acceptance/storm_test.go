// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"math"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Ten servers fail every call for ten seconds, and every call may be retried. In
// virtual time, so the numbers are those of any run but for the jitter of
// back-offs.
func TestRetryStormIsBounded(t *testing.T) {
	const (
		perSecond = 200
		storm     = 10 * time.Second
		reserve   = budget.DefaultMinPerSecond * int64(budget.DefaultTTL/time.Second)
	)
	synctest.Test(t, func(t *testing.T) {
		cluster := testserver.NewCluster(t, 10, func(int) []testserver.Option {
			return []testserver.Option{testserver.InMemory(), testserver.ServiceTime(testserver.Fixed(5 * time.Millisecond))}
		})
		s := newStack(t, `{"timeout": {"call": "2s"}}, {"retry": {"allMethods": true}}`)
		client := testingv1.NewTestServiceClient(dial(t, s, cluster.Endpoints(), cluster.DialOptions()...))
		call := func() error {
			_, err := client.Unary(t.Context(), &testingv1.UnaryRequest{})
			return err
		}
		started := func() (n int64) {
			for _, srv := range cluster.Servers() {
				n += srv.Stats().Started
			}
			return n
		}
		// load makes calls for d and returns how many there were and failed, and how
		// many had reached a server when d was over. Retries that come after it are
		// paid for by the next second's reserve.
		load := func(d time.Duration) (calls, failed, reached int64) {
			var wg sync.WaitGroup
			var errs atomic.Int64
			for range int(d.Seconds() * perSecond) {
				calls++
				wg.Go(func() {
					if call() != nil {
						errs.Add(1)
					}
				})
				time.Sleep(time.Second / perSecond)
			}
			reached = started()
			wg.Wait()
			return calls, errs.Load(), reached
		}
		if _, failed, _ := load(time.Second); failed != 0 {
			t.Fatalf("%d calls failed before the storm", failed)
		}
		time.Sleep(2 * budget.DefaultTTL) // So that these calls pay for nothing any more.
		for _, srv := range cluster.Servers() {
			if err := srv.Fail(codes.Unavailable, 1); err != nil {
				t.Fatal(err)
			}
		}
		before := started()
		calls, failed, reached := load(storm)
		reached -= before
		if failed != calls {
			t.Errorf("in the storm %d of %d calls failed, want all", failed, calls)
		}
		most := int64(math.Ceil(1.2*float64(calls))) + reserve
		t.Logf("in the storm %d calls made %d attempts, %.3f a call; 1.2 a call and the reserve are %d", calls, reached, float64(reached)/float64(calls), most)
		if reached > most {
			t.Errorf("in the storm %d calls made %d attempts, want at most %d", calls, reached, most)
		}
		if reached < calls+reserve {
			t.Errorf("in the storm %d calls made %d attempts, want more than the reserve of retries, %d", calls, reached, calls+reserve)
		}
		for _, srv := range cluster.Servers() {
			srv.Heal()
		}
		calls, failed, _ = load(budget.DefaultTTL)
		t.Logf("after the storm %d of %d calls failed within one ttl", failed, calls)
		if calls, failed, _ = load(time.Second); failed != 0 {
			t.Errorf("one ttl after the storm %d of %d calls failed, want none", failed, calls)
		}
		if got, want := s.Budget("").Balance(), float64(reserve); got < want {
			t.Errorf("one ttl after the storm the balance is %v, want the reserve of %v and more", got, want)
		}
	})
}
