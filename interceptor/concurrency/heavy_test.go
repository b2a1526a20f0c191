// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// Of calls of all costs about the same share is admitted, where calls may not wait.
func TestHeavyInOverload(t *testing.T) {
	const ten = 10 * time.Millisecond
	for _, tc := range []struct {
		name    string
		rate    float64
		classes []class
		lost    float64 // At most, in %, of each class.
	}{
		// Without the rule, 99.7 % and 100 % of the heavy calls are lost.
		{"three_times_capacity", 2500, []class{{0, 1, 0.95}, {0, 5, 0.05}}, 80},
		{"three_costs", 2500, []class{{0, 1, 0.9}, {0, 2, 0.07}, {0, 6, 0.03}}, 85},
		{"more_than_the_limit", 2500, []class{{0, 1, 0.98}, {0, 20, 0.02}}, 85},
		{"one_cost", 1500, []class{{0, 2, 1}}, 70},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const seed = 1
				tallies, _ := overload(t, seed, 20_000, tc.rate, exponential(ten), tc.classes...)
				light := 100 - tallies[0].lost()
				for k, got := range tallies {
					admitted := 100 - got.lost()
					t.Logf("seed %d, cost %d: %.1f %% of %d calls admitted", seed, tc.classes[k].cost, admitted, got.calls)
					// Of 400 calls, a third of which are admitted, the share varies by 2.4 % (sd).
					if got.lost() > tc.lost || admitted < 0.7*light || admitted > 1.4*light {
						t.Errorf("want at most %.0f %% lost, and within 0.7 to 1.4 times the %.1f %% of cost 1", tc.lost, light)
					}
				}
			})
		})
	}
}

func TestHeavyKeepsPermits(t *testing.T) {
	// calls makes calls of a cost that are refused, or that run until the test ends.
	type caller func(cost int64, priority int) (admitted bool)
	with := func(t *testing.T, f func(t *testing.T, call caller, end func(n int))) {
		synctest.Test(t, func(t *testing.T) {
			l := newLayer(t, concurrency.Config{Limit: 4}, concurrency.WithCost(costOf))
			over := make(chan struct{})
			c := calltest.Stack(t, loadshed.Config{}, l).Wrap(calltest.Server(func(context.Context) error { <-over; return nil }))
			running := 0
			f(t, func(cost int64, priority int) bool {
				done := make(chan error, 1)
				go func() {
					done <- c.Invoke(interceptor.ContextWithPriority(costs(cost), priority), calltest.Method, nil, nil)
				}()
				synctest.Wait()
				select {
				case <-done:
					return false
				default:
					running++
					return true
				}
			}, func(n int) {
				for range n {
					over <- struct{}{}
				}
				running -= n
				synctest.Wait()
			})
			for range running {
				over <- struct{}{}
			}
			synctest.Wait()
			checkRest(t, l)
		})
	}
	// full fills the limit with light calls, and lets heavy ones fail until they have credit.
	full := func(t *testing.T, call caller) {
		t.Helper()
		for range 4 {
			if !call(1, 0) {
				t.Fatal("a light call was refused at once")
			}
		}
		if call(3, 0) {
			t.Fatal("a heavy call was admitted at a full limit")
		}
	}
	want := func(t *testing.T, what string, got, want bool) {
		t.Helper()
		if got != want {
			t.Errorf("%s admitted: %t, want %t", what, got, want)
		}
	}
	t.Run("until_they_come_together", func(t *testing.T) {
		with(t, func(t *testing.T, call caller, end func(int)) {
			full(t, call)
			end(1)
			want(t, "a light call, before the heavy one has credit", call(1, 0), true)
			want(t, "the heavy call", call(3, 0), false) // It has credit now.
			end(1)
			want(t, "a light call", call(1, 0), false)
			end(1)
			want(t, "a light call", call(1, 0), false)
			want(t, "a heavy call that does not fit yet", call(3, 0), false)
			end(1)
			want(t, "the heavy call", call(3, 0), true)
			end(1)
			want(t, "a light call after it", call(1, 0), true)
		})
	})
	t.Run("not_from_higher_priorities", func(t *testing.T) {
		with(t, func(t *testing.T, call caller, end func(int)) {
			full(t, call)
			end(1)
			want(t, "a light call", call(1, 0), true)
			want(t, "the heavy call", call(3, 0), false)
			end(1)
			want(t, "a light call", call(1, 0), false)
			want(t, "a light call of a higher priority", call(1, 1), true)
		})
	})
	t.Run("not_for_long_without_a_heavy_call", func(t *testing.T) {
		with(t, func(t *testing.T, call caller, end func(int)) {
			full(t, call)
			end(1)
			want(t, "a light call", call(1, 0), true)
			want(t, "the heavy call", call(3, 0), false)
			end(1)
			time.Sleep(999 * time.Millisecond)
			want(t, "a light call within a second", call(1, 0), false)
			time.Sleep(time.Millisecond)
			want(t, "a light call after a second", call(1, 0), true)
		})
	})
}
