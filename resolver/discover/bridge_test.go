// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
)

// bridged runs f in a bubble, with a resolver on a scripted source.
func bridged(t *testing.T, opts []discover.Option, f func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver)) {
	synctest.Test(t, func(t *testing.T) {
		src, cc := &script{}, &fakeConn{}
		r := build(t, cc, src, append([]discover.Option{exact()}, opts...)...)
		synctest.Wait()
		f(t, src, cc, r)
	})
}

// settle lets everything that is about to be published be published.
func settle() {
	time.Sleep(100 * time.Millisecond)
	synctest.Wait()
}

func TestNothingIsPublishedBeforeTheSnapshotIsComplete(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), ins("b", "2"))
		time.Sleep(10 * time.Second)
		wantSets(t, cc)
		src.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=1 b=2")
		wantErrors(t, cc)
	})
}

func TestBurstOfChangesIsOneUpdate(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Synced())
		for i := range 100 {
			src.send(ins(fmt.Sprint(i), fmt.Sprint(i)))
		}
		for i := range 99 {
			src.send(discover.Remove(fmt.Sprint(i)))
		}
		settle()
		wantSets(t, cc, "-", "99=99")
	})
}

func TestSteadyStreamOfChangesIsPublishedEvery50ms(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Synced())
		for i := range 1000 { // one per millisecond: never quiet
			src.send(ins("a", fmt.Sprint(i)))
			time.Sleep(time.Millisecond)
		}
		settle()
		if got := len(cc.sets()); got < 20 || got > 23 {
			t.Errorf("1000 changes in 1 s made %d updates, want one for each 50 ms, about 21", got)
		}
		if got, want := show(cc.last()), "a=999"; got != want {
			t.Errorf("last set = %q, want %q", got, want)
		}
	})
}

func TestFurtherSyncedPublishesAtOnce(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Synced(), ins("a", "1"), ins("b", "2"), discover.Synced())
		synctest.Wait() // no time passes
		wantSets(t, cc, "-", "a=1 b=2")
	})
}

func TestInsertReplacesAndRemoveOfUnknownKeyDoesNothing(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), ins("b", "2"), discover.Synced())
		src.send(ins("a", "3"))
		settle()
		src.send(discover.Remove("c"))
		settle()
		src.send(discover.Remove("b"))
		settle()
		wantSets(t, cc, "a=1 b=2", "a=3 b=2", "a=3")
	})
}

func TestSetsAreOrderedByKey(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("c", "1"), ins("a", "2"), ins("b", "3"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=2 b=3 c=1")
	})
}

func TestEqualSetIsNotPublishedAgainAttributesIncluded(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1", discover.Weight(2), discover.Zone("x")), discover.Synced())
		src.send(ins("a", "1", discover.Zone("x"), discover.Weight(2)), discover.Synced())
		src.send(ins("b", "2"), discover.Remove("b"))
		settle()
		wantSets(t, cc, "a=1*2")
		src.send(ins("a", "1", discover.Weight(3), discover.Zone("x")))
		settle()
		src.send(ins("a", "1", discover.Weight(3), discover.Zone("y")))
		settle()
		wantSets(t, cc, "a=1*2", "a=1*3", "a=1*3")
		if got := discover.ZoneOf(cc.last().Endpoints[0]); got != "y" {
			t.Errorf("zone = %q, want %q", got, "y")
		}
	})
}

func TestAttributesThatCannotBeComparedCountAsChanged(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		odd := ep("1")
		odd.Attributes = attributes.New("labels", map[string]string{"a": "b"})
		src.send(discover.Insert("a", odd), discover.Synced(), discover.Insert("a", odd), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=1", "a=1")
	})
}

func TestTwoKeysWithOneAddressAreOneEndpointUntilBothAreRemoved(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		both := func(a, b string) resolver.Endpoint { return ep(a, discover.Address(b)) }
		src.send(ins("k1", "1"), ins("k2", "1"), discover.Synced())
		src.send(discover.Remove("k1"), discover.Synced())
		src.send(discover.Remove("k2"), discover.Synced())
		src.send(discover.Insert("k3", both("1", "2")), discover.Insert("k4", both("2", "1")), discover.Synced())
		src.send(ins("k5", "2"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "k1=1", "k2=1", "-", "k3=1+2", "k3=1+2 k5=2")
	})
}

func TestEmptySetThatIsKnownToBeEmptyIsPublished(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "-")
		if cc.last().Endpoints == nil {
			t.Error("State.Endpoints of the empty set is nil, want empty: gRPC would look for Addresses")
		}
		src.send(ins("a", "1"))
		settle()
		src.send(discover.Remove("a"))
		settle()
		wantSets(t, cc, "-", "a=1", "-")
	})
}

func TestSourceThatSaysNothingIsReported(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		time.Sleep(14 * time.Second)
		wantErrors(t, cc)
		time.Sleep(2 * time.Second)
		wantErrors(t, cc, "no endpoints within 15s")
		src.send(ins("a", "1"))
		time.Sleep(13 * time.Second)
		wantSets(t, cc)
		time.Sleep(2 * time.Second) // the first to arrive is not published by itself
		wantSets(t, cc, "a=1")
		time.Sleep(time.Minute)
		wantErrors(t, cc, "no endpoints within 15s")
	})
}

func TestSourceThatNeverSaysSyncedIsPublishedAfterTheTimeout(t *testing.T) {
	bridged(t, []discover.Option{discover.WithSyncTimeout(3 * time.Second)}, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"))
		time.Sleep(2 * time.Second)
		src.send(ins("b", "2"))
		wantSets(t, cc)
		time.Sleep(1100 * time.Millisecond)
		wantSets(t, cc, "a=1 b=2")
		src.send(ins("c", "3"))
		settle()
		wantSets(t, cc, "a=1 b=2", "a=1 b=2 c=3")
		wantErrors(t, cc)
	})
}

func TestFinalEndsTheSourceAndKeepsTheSet(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver) {
		src.send(ins("a", "1"), discover.Final())
		synctest.Wait()
		wantSets(t, cc, "a=1")
		if got := len(src.running()); got != 0 {
			t.Errorf("%d watches run after Final, want 0", got)
		}
		r.ResolveNow(resolver.ResolveNowOptions{})
		time.Sleep(time.Hour)
		wantSets(t, cc, "a=1")
		wantErrors(t, cc)
		if got := len(src.started()); got != 1 {
			t.Errorf("the source was watched %d times, want 1: it was final", got)
		}
	})
}

func TestEndWithoutFinalIsAFailure(t *testing.T) {
	const ended = "ended without an error and without Final"
	for _, tt := range []struct {
		name  string
		first []discover.Change
		want  []string // the sets before and after the end
	}{
		{"at once", nil, nil},
		{"before Synced", []discover.Change{ins("a", "1")}, nil},
		{"after Synced", []discover.Change{ins("a", "1"), discover.Synced()}, []string{"a=1"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver) {
				src.send(tt.first...)
				src.end()
				synctest.Wait()
				wantSets(t, cc, tt.want...)
				wantErrors(t, cc, ended)
				time.Sleep(1100 * time.Millisecond) // watched again
				src.end()
				time.Sleep(time.Second)
				wantErrors(t, cc, ended, ended)
				time.Sleep(1100 * time.Millisecond)
				src.send(ins("b", "2"))
				time.Sleep(10 * time.Second)
				wantSets(t, cc, tt.want...)
				src.send(discover.Synced())
				synctest.Wait()
				wantSets(t, cc, append(tt.want, "b=2")...)
			})
		})
	}
}

func TestSlowWatchAfterAFailureDoesNotReplaceTheLastGoodSet(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver) {
		src.send(ins("a", "1"), ins("b", "2"), ins("c", "3"), discover.Synced())
		src.fail("down")
		time.Sleep(1100 * time.Millisecond)
		src.send(ins("a", "1"), ins("b", "9")) // and then nothing
		time.Sleep(time.Hour)
		wantSets(t, cc, "a=1 b=2 c=3")
		wantErrors(t, cc, "down", "has not said Synced within 15s; the last set, of 3 endpoints, stays")
		src.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=1 b=2 c=3", "a=1 b=9")
	})
}

func TestFailedWatchKeepsTheLastGoodSetUntilTheNextIsSynced(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), ins("b", "2"), discover.Synced())
		src.fail("registry down")
		synctest.Wait()
		wantErrors(t, cc, "belfry:///orders: registry down")
		wantSets(t, cc, "a=1 b=2")

		time.Sleep(1100 * time.Millisecond) // watched again
		src.send(ins("b", "3"), ins("c", "4"))
		src.fail("registry down again")
		time.Sleep(2100 * time.Millisecond)
		src.send(ins("b", "5"))
		settle()
		wantSets(t, cc, "a=1 b=2")
		src.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=1 b=2", "b=5")
		wantErrors(t, cc, "registry down", "registry down again")
	})
}

func TestChangesJustBeforeAFailureAreNotLost(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), discover.Synced(), ins("b", "2"))
		src.fail("down")
		settle()
		wantSets(t, cc, "a=1", "a=1 b=2")
	})
}

func TestFailureBeforeAnySetIsReportedAndPublishesNothing(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"))
		src.fail("down")
		time.Sleep(900 * time.Millisecond)
		wantErrors(t, cc, "down")
		wantSets(t, cc)
		time.Sleep(time.Minute) // the second watch inserts nothing
		wantSets(t, cc)
	})
}

func TestErrorThatIsNotTheLastThingYieldedDoesNotEndTheWatch(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), discover.Synced())
		src.do(step{err: errors.New("hiccup")})
		src.send(ins("b", "2"), discover.Final())
		time.Sleep(time.Hour)
		wantErrors(t, cc, "hiccup")
		wantSets(t, cc, "a=1", "a=1 b=2")
		if got := len(src.started()); got != 1 {
			t.Errorf("the source was watched %d times, want 1", got)
		}
	})
}

func TestBackoffStartsOverAfterAWatchThatLasted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var starts, ends []time.Time
		src := sourceFunc(func(_ context.Context, yield func(discover.Change, error) bool) {
			starts = append(starts, time.Now())
			yield(ins("a", "1"), nil) // and never Synced
			if n := len(starts); n == 4 || n == 5 {
				time.Sleep(time.Hour)
			}
			ends = append(ends, time.Now())
			yield(discover.Change{}, errors.New("down"))
		})
		r := build(t, &fakeConn{}, src, exact())
		time.Sleep(2*time.Hour + 30*time.Second)
		r.Close()
		synctest.Wait()
		var delays []time.Duration
		for i := 1; i < len(starts); i++ {
			delays = append(delays, starts[i].Sub(ends[i-1])/time.Second)
		}
		if want := []time.Duration{1, 2, 4, 1, 1, 2, 4, 8}; !slices.Equal(delays, want) {
			t.Errorf("seconds of backoff = %v, want %v", delays, want)
		}
	})
}

func TestBackoffGrowsWithFailuresAndStartsOverAfterSynced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		var starts []time.Time
		src := sourceFunc(func(_ context.Context, yield func(discover.Change, error) bool) {
			starts = append(starts, time.Now())
			if len(starts) == 6 && !(yield(ins("a", "1"), nil) && yield(discover.Synced(), nil)) {
				return
			}
			yield(discover.Change{}, errors.New("down"))
		})
		r := build(t, cc, src, exact())
		time.Sleep(40 * time.Second)
		r.Close()
		synctest.Wait()
		var gaps []time.Duration
		for i := 1; i < len(starts); i++ {
			gaps = append(gaps, starts[i].Sub(starts[i-1])/time.Second)
		}
		if want := []time.Duration{1, 2, 4, 8, 8, 1, 2, 4, 8}; !slices.Equal(gaps, want) {
			t.Errorf("seconds between watches = %v, want %v", gaps, want)
		}
	})
}

func TestLongestBackoffDoesNotOverflow(t *testing.T) {
	// With its jitter it would half of the time.
	longest := backoff.Config{BaseDelay: math.MaxInt64, MaxDelay: math.MaxInt64, Multiplier: 1, Jitter: 0.2}
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			src := &script{}
			r := build(t, &fakeConn{}, src, discover.WithBackoff(longest))
			synctest.Wait()
			src.fail("down")
			time.Sleep(24 * time.Hour)
			r.Close()
			if got := len(src.started()); got != 1 {
				t.Fatalf("%d watches in a day, want 1", got)
			}
		})
	}
}

func TestDefaultBackoffIsJittered(t *testing.T) {
	// 20 first delays, uniform in 0.8 s to 1.2 s. That all are within 1 ms of
	// each other has a probability below 1e-40.
	synctest.Test(t, func(t *testing.T) {
		var lowest, highest time.Duration
		for range 20 {
			src := &script{}
			r := build(t, &fakeConn{}, src)
			synctest.Wait()
			src.fail("down")
			time.Sleep(1300 * time.Millisecond)
			r.Close()
			at := src.started()
			d := at[1].Sub(at[0])
			if d < 800*time.Millisecond || d > 1200*time.Millisecond {
				t.Fatalf("first delay = %v, want 1 s plus or minus 20 %%", d)
			}
			if lowest == 0 || d < lowest {
				lowest = d
			}
			highest = max(highest, d)
		}
		if highest-lowest < time.Millisecond {
			t.Errorf("20 first delays were all between %v and %v, want them spread", lowest, highest)
		}
	})
}

func TestEveryChannelWatchesForItselfAndAgainAfterIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &script{atStart: []step{{change: ins("a", "1")}, {change: discover.Synced()}}}
		cc1, cc2 := &fakeConn{}, &fakeConn{}
		r1 := build(t, cc1, src)
		build(t, cc2, src)
		synctest.Wait()
		wantSets(t, cc1, "a=1")
		wantSets(t, cc2, "a=1")

		r1.Close() // what a channel does when it goes idle
		synctest.Wait()
		if got := len(src.running()); got != 1 {
			t.Errorf("%d watches run after one of two resolvers was closed, want 1", got)
		}
		src.send(ins("b", "2"))
		settle()
		wantSets(t, cc1, "a=1")
		wantSets(t, cc2, "a=1", "a=1 b=2")

		back := &fakeConn{}
		build(t, back, src)
		synctest.Wait()
		wantSets(t, back, "a=1")
	})
}

func TestCloseStopsAWatchThatIsBlocked(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver) {
		src.send(ins("a", "1"), discover.Synced())
		synctest.Wait()
		src.send(ins("b", "2")) // to be published still
		before := time.Now()
		r.Close()
		if took := time.Since(before); took != 0 {
			t.Errorf("Close took %v of a source that heeds its context, want no time", took)
		}
		synctest.Wait()
		if got := len(src.running()); got != 0 {
			t.Errorf("%d watches run after Close, want 0", got)
		}
		time.Sleep(time.Minute)
		wantSets(t, cc, "a=1")
		wantErrors(t, cc)
	})
}

func TestCloseWaitsForNothing(t *testing.T) {
	const long = 10 * time.Second
	for _, tt := range []struct {
		name string
		src  discover.Source
		cc   *fakeConn
	}{
		{"an update", must(discover.List(ep("1"))), &fakeConn{onUpdate: func(resolver.State) error {
			time.Sleep(long)
			return nil
		}}},
		{"a source", sourceFunc(func(context.Context, func(discover.Change, error) bool) { time.Sleep(long) }), &fakeConn{}},
		{"Watch", slowSource{}, &fakeConn{}},
		{"a source in a source", must(discover.Merge(sourceFunc(func(context.Context, func(discover.Change, error) bool) { time.Sleep(long) }))), &fakeConn{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := build(t, tt.cc, tt.src)
				synctest.Wait()
				before := time.Now()
				r.Close()
				if took := time.Since(before); took != 0 {
					t.Errorf("Close took %v, want no time", took)
				}
				time.Sleep(2 * long)
			})
		})
	}
}

func TestCloseDuringBackoff(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, r resolver.Resolver) {
		src.fail("down")
		synctest.Wait()
		r.Close()
		r.Close() // harmless
		time.Sleep(time.Minute)
		if got := len(src.started()); got != 1 {
			t.Errorf("the source was watched %d times, want 1", got)
		}
	})
}

func TestNothingIsPublishedAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, release := &fakeConn{}, make(chan struct{})
		src := sourceFunc(func(_ context.Context, yield func(discover.Change, error) bool) {
			yield(ins("a", "1"), nil)
			yield(discover.Synced(), nil)
			<-release
			yield(ins("b", "2"), nil) // refused, and asked to stop ...
			yield(discover.Synced(), nil)
			yield(discover.Change{}, errors.New("late"))
		})
		r := build(t, cc, src)
		synctest.Wait()
		r.Close()
		time.Sleep(time.Minute)
		close(release)
		settle()
		wantSets(t, cc, "a=1")
		wantErrors(t, cc)
	})
}

func TestPanicOfASourceIsAFailure(t *testing.T) {
	for _, tt := range []struct {
		name string
		wrap func(discover.Source) discover.Source
	}{
		{"alone", func(src discover.Source) discover.Source { return src }},
		{"merged", func(src discover.Source) discover.Source { return must(discover.Merge(src)) }},
		{"settled", func(src discover.Source) discover.Source { return must(discover.Settle(src, time.Hour)) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cc, watches := &fakeConn{}, 0
				src := sourceFunc(func(ctx context.Context, yield func(discover.Change, error) bool) {
					if watches++; watches == 2 {
						yield(ins("a", "1"), nil)
						yield(discover.Synced(), nil)
						<-ctx.Done()
						return
					}
					yield(ins("half", "9"), nil)
					panic("oops")
				})
				build(t, cc, tt.wrap(src), exact())
				time.Sleep(time.Minute)
				wantErrors(t, cc, "the source panicked: oops")
				if got := show(cc.last()); !strings.HasSuffix(got, "a=1") {
					t.Errorf("set = %q, want that of the next watch", got)
				}
			})
		})
	}
}

func TestErrorsAreReportedAtMostOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, sourceFunc(func(ctx context.Context, yield func(discover.Change, error) bool) {
			yield(ins("a", "1"), nil)
			yield(discover.Synced(), nil)
			for i := range 800 {
				yield(discover.Change{}, fmt.Errorf("error %d", i))
				time.Sleep(3 * time.Millisecond) // never at a full second
			}
			<-ctx.Done()
		}))
		time.Sleep(time.Minute)
		wantErrors(t, cc, "error 0", "error 333 (and 332 more errors)", "error 666 (and 332 more errors)", "error 799 (and 132 more errors)")
	})
}

func TestBatchIsOneElementAndOneUpdate(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Batch(ins("a", "1"), discover.Batch(ins("b", "2"), discover.Remove("a")), discover.Synced()))
		synctest.Wait()
		wantSets(t, cc, "b=2")
		src.send(discover.Batch(), discover.Batch(ins("c", "3"), discover.Remove("b"), discover.Synced()))
		synctest.Wait()
		wantSets(t, cc, "b=2", "c=3")
		wantErrors(t, cc)
	})
}

func TestBuildDoesNotWaitForTheSource(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before := time.Now()
		r := build(t, &fakeConn{}, slowSource{})
		if took := time.Since(before); took != 0 {
			t.Errorf("Build took %v, want no time", took)
		}
		r.Close()
	})
}

// slowSource dials in Watch, which it should do in the sequence.
type slowSource struct{}

func (slowSource) Watch(context.Context) iter.Seq2[discover.Change, error] {
	time.Sleep(time.Second)
	return func(func(discover.Change, error) bool) {}
}

func TestSourceWithoutASequenceIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, noSequence{}, exact())
		time.Sleep(1500 * time.Millisecond)
		wantErrors(t, cc, "no sequence (nil)", "no sequence (nil)")
	})
}

type noSequence struct{}

func (noSequence) Watch(context.Context) iter.Seq2[discover.Change, error] { return nil }

func TestResolveNowNudgesTheSourceAndNeverBlocks(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, _ *fakeConn, r resolver.Resolver) {
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() { r.ResolveNow(resolver.ResolveNowOptions{}) })
		}
		wg.Wait()
		nudges := discover.Nudges(src.running()[0].ctx)
		select {
		case <-nudges:
		default:
			t.Fatal("no nudge after ResolveNow")
		}
		select {
		case <-nudges:
			t.Fatal("a second nudge, want a thousand hints to be one")
		default:
		}
		if discover.Nudges(t.Context()) != nil {
			t.Error("Nudges of a foreign context is not nil")
		}
	})
}

func TestResolveNowFromWithinUpdateStateDoesNotDeadlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, src := &fakeConn{}, &script{}
		var r resolver.Resolver
		cc.onUpdate = func(resolver.State) error {
			r.ResolveNow(resolver.ResolveNowOptions{})
			return nil
		}
		r = build(t, cc, src)
		synctest.Wait()
		src.send(ins("a", "1"), discover.Synced(), ins("b", "2"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "a=1", "a=1 b=2")
	})
}

func TestChangesDuringASlowUpdateStateBecomeOneUpdate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, src := &fakeConn{}, &script{}
		cc.onUpdate = func(resolver.State) error { time.Sleep(time.Second); return nil }
		build(t, cc, src)
		synctest.Wait()
		src.send(ins("a", "1"), discover.Synced())
		for i := range 50 {
			src.send(ins(fmt.Sprintf("b%02d", i), fmt.Sprintf("addr%d", i)))
		}
		time.Sleep(5 * time.Second)
		if got := len(cc.sets()); got != 2 {
			t.Errorf("%d updates, want 2", got)
		}
		if got := len(cc.last().Endpoints); got != 51 {
			t.Errorf("%d endpoints, want 51", got)
		}
	})
}

func TestRejectedSetIsOfferedAgainAndTheSourceNudged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, src := &fakeConn{}, &script{}
		var reject atomic.Bool
		reject.Store(true)
		cc.onUpdate = func(resolver.State) error {
			if reject.Load() {
				return balancer.ErrBadResolverState
			}
			return nil
		}
		build(t, cc, src, exact())
		synctest.Wait()
		src.send(discover.Synced())
		synctest.Wait()
		nudges := discover.Nudges(src.running()[0].ctx)
		for _, delay := range []time.Duration{1, 2, 4} {
			before := time.Now()
			<-nudges
			if got := time.Since(before); got != delay*time.Second {
				t.Errorf("nudge after %v, want %v", got, delay*time.Second)
			}
			src.send(discover.Synced())
		}
		synctest.Wait()
		wantSets(t, cc, "-", "-", "-", "-")

		reject.Store(false)
		src.send(ins("a", "1"), discover.Synced(), discover.Synced())
		time.Sleep(time.Minute)
		wantSets(t, cc, "-", "-", "-", "-", "a=1")
		select {
		case <-nudges:
			t.Error("nudged after the set was accepted")
		default:
		}
	})
}

func TestServiceConfigOfTheSourceIsParsedOnceAndPublished(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.ServiceConfig(`{"x":1}`), ins("a", "1"), discover.Synced())
		src.send(discover.ServiceConfig(`{"x":1}`), discover.Synced())
		src.send(discover.ServiceConfig(`{"x":2}`))
		settle()
		src.send(discover.ServiceConfig(""))
		settle()
		got := cc.configs()
		if want := []string{`{"x":1}`, `{"x":2}`, "none"}; !slices.Equal(got, want) {
			t.Errorf("published service configs = %q, want %q", got, want)
		}
	})
}

func TestBadServiceConfigIsReportedAfterTheSetAndKeepsTheOneBefore(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.ServiceConfig(`oops`), ins("a", "1"), discover.Synced())
		time.Sleep(time.Second)
		wantSets(t, cc, "a=1")
		wantErrors(t, cc, "not an object: oops")
		if !strings.HasPrefix(cc.calls()[1], "error") || cc.last().ServiceConfig != nil {
			t.Fatalf("calls = %q, config %v; want the set without a config, then the error", cc.calls(), cc.last().ServiceConfig)
		}
		src.send(discover.ServiceConfig(`{}`), discover.Synced())
		src.send(discover.ServiceConfig(`bad`), ins("b", "2"), discover.Synced(), ins("c", "3"), discover.Synced())
		time.Sleep(time.Second)
		wantSets(t, cc, "a=1", "a=1", "a=1 b=2", "a=1 b=2 c=3")
		wantErrors(t, cc, "oops", "not an object: bad")
		if sc := cc.last().ServiceConfig; sc == nil || sc.Err != nil {
			t.Errorf("service config = %v, want the good one before", sc)
		}
	})
}

func TestServiceConfigIsIgnoredWhereTheChannelDisablesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, src := &fakeConn{}, &script{}
		buildWith(t, cc, src, resolver.BuildOptions{DisableServiceConfig: true})
		synctest.Wait()
		src.send(discover.ServiceConfig("oops"), ins("a", "a:1"), discover.Synced())
		synctest.Wait()
		wantErrors(t, cc)
		if cc.last().ServiceConfig != nil {
			t.Error("a service config was published")
		}
	})
}

func TestKeepOnEmptyKeepsTheLastSetButPublishesAnEmptyFirstOne(t *testing.T) {
	bridged(t, []discover.Option{discover.WithKeepOnEmpty()}, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Synced())
		src.send(ins("a", "1"), discover.Synced())
		src.send(discover.Remove("a"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "-", "a=1")
		src.send(discover.ServiceConfig("{}"), discover.Synced())
		src.send(ins("b", "2"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "-", "a=1", "a=1", "b=2")
	})
}

func TestInvalidChangesAreReportedAfterTheSetAndIgnored(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), discover.Insert("b", resolver.Endpoint{}), discover.Change{}, discover.Synced())
		time.Sleep(time.Second)
		wantSets(t, cc, "a=1")
		wantErrors(t, cc, `ignored Insert("b"): it has no addresses (and 1 more faults)`)
		if strings.HasPrefix(cc.calls()[0], "error") {
			t.Errorf("calls = %q, want the set first", cc.calls())
		}
		src.send(discover.Insert("a", resolver.Endpoint{Addresses: make([]resolver.Address, 1)}))
		time.Sleep(time.Second)
		wantSets(t, cc, "a=1")
		wantErrors(t, cc, "b", "address 0 is empty")
		src.send(ins("c", "3"), discover.Synced())
		time.Sleep(time.Minute)
		wantErrors(t, cc, "b", "address 0 is empty")
	})
}

func TestWithAddressesAlsoPublishesAFlatList(t *testing.T) {
	bridged(t, []discover.Option{discover.WithAddresses()}, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(discover.Insert("a", ep("1", discover.Address("2"), discover.Weight(3))), ins("b", "3"), discover.Synced())
		synctest.Wait()
		var got []string
		for _, a := range cc.last().Addresses {
			//lint:ignore SA1019 deprecated inside an endpoint only, and this one is not
			w := weight.FromEndpoint(resolver.Endpoint{Attributes: a.BalancerAttributes}).Weight
			got = append(got, fmt.Sprintf("%s*%d", a.Addr, w))
		}
		if want := []string{"1*3", "2*3", "3*0"}; !slices.Equal(got, want) {
			t.Errorf("addresses = %q, want %q", got, want)
		}
		//lint:ignore SA1019 this is the deprecated use, and must not happen
		if cc.last().Endpoints[0].Addresses[0].BalancerAttributes != nil {
			t.Error("the addresses inside the endpoint carry attributes, which makes changes of them reconnect")
		}
	})
}

func TestPublishedSlicesAreNotTouchedAgain(t *testing.T) {
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		src.send(ins("a", "1"), ins("b", "2"), discover.Synced())
		synctest.Wait()
		first := cc.last()
		slices.Reverse(first.Endpoints) // as a policy should not
		src.send(ins("a", "1"), discover.Synced())
		src.send(ins("c", "3"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "b=2 a=1", "a=1 b=2 c=3")
	})
}
