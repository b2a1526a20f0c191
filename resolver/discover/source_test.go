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
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"
)

// wantError checks an error of a constructor.
func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("error = %v, want one containing %q", err, want)
	}
}

// must returns the source of a constructor that is given nothing wrong.
func must(src discover.Source, err error) discover.Source {
	if err != nil {
		panic(err)
	}
	return src
}

func TestEndpointCarriesWeightZoneAndKey(t *testing.T) {
	e := ep("10.0.0.1:443", discover.Address("[::1]:443"), discover.Weight(2), discover.Zone("a"), discover.Key("k"))
	if got := len(e.Addresses); got != 2 {
		t.Errorf("%d addresses, want 2", got)
	}
	if e.Addresses[0].Attributes != nil {
		t.Error("the address has attributes, want them on the endpoint only")
	}
	if got := weight.FromEndpoint(e).Weight; got != 2 {
		t.Errorf("grpc's weight = %d, want 2", got)
	}
	if w, z, k := discover.WeightOf(e), discover.ZoneOf(e), discover.KeyOf(e); w != 2 || z != "a" || k != "k" {
		t.Errorf("weight, zone, key = %d, %q, %q, want 2, a, k", w, z, k)
	}
	if s := e.Attributes.String(); !strings.Contains(s, `"belfry.zone": "a"`) {
		t.Errorf("attributes print as %s, want the zone in them", s)
	}
	plain := ep("x")
	if w, z, k := discover.WeightOf(plain), discover.ZoneOf(plain), discover.KeyOf(plain); w != 1 || z != "" || k != "" {
		t.Errorf("weight, zone, key of a plain endpoint = %d, %q, %q, want 1 and nothing", w, z, k)
	}
}

func TestEndpointAttributesCompareByValue(t *testing.T) {
	a := ep("x", discover.Zone("a"), discover.Key("k"), discover.Weight(2))
	b := ep("x", discover.Weight(2), discover.Key("k"), discover.Zone("a"))
	if !a.Attributes.Equal(b.Attributes) {
		t.Error("equal attributes set in another order compare as different")
	}
	if a.Attributes.Equal(discover.SetZone(b, "b").Attributes) || a.Attributes.Equal(discover.SetKey(b, "l").Attributes) {
		t.Error("different attributes compare as equal")
	}
	if discover.SetZone(a, "a").Attributes != a.Attributes {
		t.Error("setting the zone there already is made new attributes")
	}
	if foreign := attributes.New("zone", "a"); discover.ZoneOf(resolver.Endpoint{Attributes: foreign}) != "" {
		t.Error("a foreign attribute was taken for the zone")
	}
}

func TestEndpointRejectsBadValues(t *testing.T) {
	for _, tt := range []struct {
		addr string
		opt  discover.EndpointOption
		want string
	}{
		{"", discover.Weight(1), "address is empty"},
		{"10.0.0.1:443 ", discover.Weight(1), "white space"},
		{"x", discover.Weight(0), `endpoint "x": weight 0: must be at least 1`},
		{"x", discover.Zone(""), "zone is empty"},
		{"x", discover.Key(""), "key is empty"},
		{"x", discover.Address(""), "address is empty"},
		{"x", nil, "option 0 is nil"},
	} {
		_, err := discover.Endpoint(tt.addr, tt.opt)
		wantError(t, err, tt.want)
	}
	defer func() {
		if recover() == nil {
			t.Error("MustEndpoint did not panic")
		}
	}()
	discover.MustEndpoint("")
}

func TestListPublishesItsEndpoints(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := must(discover.List(ep("3"), ep("1", discover.Weight(2)), ep("2", discover.Key("a")), ep("3")))
		for range 2 { // as two channels, or one after idle
			cc := &fakeConn{}
			build(t, cc, src)
			synctest.Wait()
			wantSets(t, cc, "1=1*2 3=3 a=2")
		}
		empty := &fakeConn{}
		build(t, empty, must(discover.List()))
		synctest.Wait()
		wantSets(t, empty, "-")
	})
}

func TestListRejectsBadEndpoints(t *testing.T) {
	_, err := discover.List(ep("1"), resolver.Endpoint{})
	wantError(t, err, "List: endpoint 1: it has no addresses")
	_, err = discover.List(ep("1", discover.Key("a")), ep("2", discover.Key("a")))
	wantError(t, err, `endpoint 1: key "a" is taken by another endpoint`)
}

func TestChannelReplaysToEveryWatcher(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan discover.Change)
		src := must(discover.Channel(ch))
		cc1, cc2 := &fakeConn{}, &fakeConn{}
		r1 := build(t, cc1, src)
		ch <- ins("a", "1")
		ch <- ins("b", "2")
		ch <- discover.Synced()
		synctest.Wait()
		wantSets(t, cc1, "a=1 b=2")

		r2 := build(t, cc2, src)
		synctest.Wait()
		wantSets(t, cc2, "a=1 b=2")

		ch <- discover.Remove("a")
		ch <- ins("c", "3")
		ch <- discover.Remove("unknown")
		settle()
		wantSets(t, cc1, "a=1 b=2", "b=2 c=3")
		wantSets(t, cc2, "a=1 b=2", "b=2 c=3")

		r1.Close() // the other goes on receiving
		ch <- ins("d", "4")
		settle()
		wantSets(t, cc1, "a=1 b=2", "b=2 c=3")
		wantSets(t, cc2, "a=1 b=2", "b=2 c=3", "b=2 c=3 d=4")
		r2.Close()

		go func() { // nobody receives until a channel watches again
			ch <- discover.Remove("b")
			ch <- discover.ServiceConfig("{}")
			close(ch)
		}()
		synctest.Wait()
		for range 2 {
			back := &fakeConn{}
			build(t, back, src)
			settle()
			if got, want := show(back.last()), "c=3 d=4"; got != want {
				t.Errorf("set after coming back = %q, want %q", got, want)
			}
			if back.last().ServiceConfig == nil {
				t.Error("no service config after coming back")
			}
		}
	})
}

func TestChannelCatchesUpBeforeItPublishesAfterIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan discover.Change, 10)
		src := must(discover.Channel(ch))
		ch <- ins("a", "1")
		ch <- discover.Synced()
		r := build(t, &fakeConn{}, src)
		synctest.Wait()
		r.Close()
		synctest.Wait() // The old watch has ended.
		ch <- discover.Remove("a")
		ch <- ins("b", "2")
		cc := &fakeConn{}
		build(t, cc, src)
		settle()
		wantSets(t, cc, "b=2")
	})
}

func TestChannelClosedBeforeSyncedIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan discover.Change, 10)
		cc := &fakeConn{}
		build(t, cc, must(discover.Channel(ch)))
		ch <- ins("a", "1")
		settle()
		wantSets(t, cc)
		close(ch)
		synctest.Wait()
		wantSets(t, cc)
		wantErrors(t, cc, "the Go channel was closed before Synced")
	})
	_, err := discover.Channel(nil)
	wantError(t, err, "nil")
}

func TestChannelTellsASlowWatcherOnlyTheLastOfEachKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan discover.Change)
		src := must(discover.Channel(ch))
		fast := build(t, &fakeConn{}, src)
		ctx, cancel := context.WithCancel(t.Context())
		var got []string
		release := make(chan struct{})
		done := make(chan struct{})
		go func() {
			defer close(done)
			for c, err := range src.Watch(ctx) {
				if err != nil {
					t.Errorf("error %v", err)
				}
				for c := range c.All() {
					got = append(got, fmt.Sprint(c.Op, " ", c.Key))
				}
				<-release
			}
		}()
		synctest.Wait()
		ch <- ins("a", "1") // the slow one is busy with this from now on
		synctest.Wait()
		for i := range 1000 {
			ch <- ins("b", fmt.Sprint(i))
			ch <- ins("c", fmt.Sprint(i))
		}
		ch <- discover.Remove("c")
		ch <- discover.Synced()
		synctest.Wait()
		close(release)
		synctest.Wait()
		cancel()
		<-done
		fast.Close()
		if want := []string{"Insert a", "Insert b", "Remove c", "Synced "}; !slices.Equal(got, want) {
			t.Errorf("the slow watcher got %q, want %q", got, want)
		}
	})
}

// One bad change must not part two channels on one source.
func TestChannelIgnoresBadChangesForAllWatchers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ch := make(chan discover.Change)
		src := must(discover.Channel(ch))
		cc := &fakeConn{}
		build(t, cc, src)
		ch <- discover.Batch(ins("a", "1"), ins("b", "2"), discover.Synced())
		ch <- discover.Insert("a", resolver.Endpoint{})
		settle()
		wantErrors(t, cc, `ignored Insert("a"): it has no addresses`)
		later := &fakeConn{}
		build(t, later, src)
		settle()
		wantSets(t, cc, "a=1 b=2")
		wantSets(t, later, "a=1 b=2")
		ch <- discover.Final()
		settle()
		wantErrors(t, later)
	})
}

func TestFullSetsBecomeChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		type delivery struct {
			set []resolver.Endpoint
			err error
		}
		deliveries := make(chan delivery)
		src := must(discover.FullSets(func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] {
			return func(yield func([]resolver.Endpoint, error) bool) {
				for {
					select {
					case <-ctx.Done():
						return
					case d := <-deliveries:
						if !yield(d.set, d.err) {
							return
						}
					}
				}
			}
		}))
		var got []string
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			for c, err := range src.Watch(ctx) {
				if err != nil {
					got = append(got, err.Error())
					continue
				}
				for c := range c.All() {
					got = append(got, strings.TrimSpace(fmt.Sprint(c.Op, " ", c.Key)))
				}
			}
		}()
		reused := []resolver.Endpoint{ep("1")}
		for _, d := range []delivery{
			{set: reused},
			{set: []resolver.Endpoint{ep("1"), ep("1")}},
			{set: []resolver.Endpoint{ep("1", discover.Weight(2))}},
			{err: errors.New("lost")},
			{set: []resolver.Endpoint{ep("1", discover.Weight(2), discover.Key("k"))}},
			{set: []resolver.Endpoint{ep("1", discover.Key("k")), ep("2", discover.Key("k"))}},
			{set: nil},
		} {
			deliveries <- d
			synctest.Wait()
			reused[0].Addresses[0].Addr = "changed behind the back of the source"
		}
		cancel()
		<-done
		want := []string{
			"Insert 1", "Synced",
			"Synced",
			"Insert 1", "Synced",
			"lost",
			"Insert k", "Remove 1", "Synced",
			`discover: endpoint 1: key "k" is taken by another endpoint of the set, 1: keys must be unique`,
			"Remove k", "Synced",
		}
		if !slices.Equal(got, want) {
			t.Errorf("changes = %q, want %q", got, want)
		}
	})
	_, err := discover.FullSets(nil)
	wantError(t, err, "nil")
}

func TestFullSetsWithoutASequenceIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, must(discover.FullSets(func(context.Context) iter.Seq2[[]resolver.Endpoint, error] { return nil })))
		synctest.Wait()
		wantErrors(t, cc, "no sequence (nil)")
	})
}

// polls is a function for Poll that notes when it was called.
type polls struct {
	mu  sync.Mutex
	at  []time.Time
	set []resolver.Endpoint
	err error
}

func (p *polls) poll(context.Context) ([]resolver.Endpoint, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = append(p.at, time.Now())
	return p.set, p.err
}

// next sets what the calls from now on return.
func (p *polls) next(err error, set ...resolver.Endpoint) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set, p.err = set, err
}

func (p *polls) gaps() (gaps []time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := 1; i < len(p.at); i++ {
		gaps = append(gaps, p.at[i].Sub(p.at[i-1]))
	}
	return gaps
}

func TestPollPublishesWhatItFindsEveryIntervalWithJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, cc := &polls{set: []resolver.Endpoint{ep("1")}}, &fakeConn{}
		r := build(t, cc, must(discover.Poll(p.poll, 10*time.Second)))
		synctest.Wait()
		wantSets(t, cc, "1=1")
		time.Sleep(time.Second)
		p.next(nil, ep("1"), ep("2"))
		time.Sleep(10 * time.Second)
		wantSets(t, cc, "1=1", "1=1 2=2")
		p.next(nil)
		time.Sleep(11 * time.Second)
		wantSets(t, cc, "1=1", "1=1 2=2", "-")
		time.Sleep(10 * time.Minute)
		wantSets(t, cc, "1=1", "1=1 2=2", "-")
		r.Close()
		gaps := p.gaps()
		if lo, hi := slices.Min(gaps), slices.Max(gaps); lo < 9*time.Second || hi > 11*time.Second || hi-lo < time.Millisecond {
			t.Errorf("polls were between %v and %v apart, want them spread over 9 s to 11 s", lo, hi)
		}
	})
}

func TestPollKeepsTheSetOverErrorsAndBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, cc := &polls{set: []resolver.Endpoint{ep("1")}}, &fakeConn{}
		r := build(t, cc, must(discover.Poll(p.poll, time.Minute)), exact())
		synctest.Wait()
		p.next(errors.New("down"))
		time.Sleep(70 * time.Second)
		r.ResolveNow(resolver.ResolveNowOptions{}) // does not cut the backoff short
		time.Sleep(12 * time.Second)
		p.next(nil, ep("2"))
		time.Sleep(10 * time.Second)
		r.Close()
		wantSets(t, cc, "1=1", "2=2")
		wantErrors(t, cc, "discover: watching belfry:///orders: down") // once
		var seconds []time.Duration
		for _, g := range p.gaps()[1:] {
			seconds = append(seconds, g/time.Second)
		}
		if want := []time.Duration{1, 2, 4, 8}; !slices.Equal(seconds[:4], want) {
			t.Errorf("seconds between polls after the first failure = %v, want %v", seconds, want)
		}
	})
}

func TestPollBacksOffNoLongerThanTheIntervalAndStartsOverAfterASuccess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &polls{err: errors.New("down")}
		r := build(t, &fakeConn{}, must(discover.Poll(p.poll, 3*time.Second)), exact())
		time.Sleep(20 * time.Second)
		p.next(nil, ep("1"))
		time.Sleep(10 * time.Second)
		p.next(errors.New("down"))
		n := len(p.gaps())
		time.Sleep(10 * time.Second)
		r.Close()
		if longest := slices.Max(p.gaps()); longest > 3300*time.Millisecond {
			t.Errorf("polls were up to %v apart, want at most the interval and a tenth", longest)
		}
		// After the first failure that follows a success the delay is 1 s again.
		if got := p.gaps()[n+1]; got != time.Second {
			t.Errorf("the poll after the first failure came after %v, want 1s", got)
		}
	})
}

func TestPollForgetsNudgesOlderThanTheLastCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &polls{err: errors.New("down")}
		r := build(t, &fakeConn{}, must(discover.Poll(p.poll, time.Minute)), exact())
		time.Sleep(500 * time.Millisecond)
		r.ResolveNow(resolver.ResolveNowOptions{})
		p.next(nil, ep("1"))
		time.Sleep(30 * time.Second)
		r.Close()
		if got, want := p.gaps(), []time.Duration{time.Second}; !slices.Equal(got, want) {
			t.Errorf("polls were %v apart, want %v: the one after the backoff answers the nudge in it", got, want)
		}
	})
}

func TestPollAnswersNudgesButNotTooOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &polls{set: []resolver.Endpoint{ep("1")}}
		r := build(t, &fakeConn{}, must(discover.Poll(p.poll, 100*time.Second)))
		for range 350 { // for 35 s
			time.Sleep(100 * time.Millisecond)
			r.ResolveNow(resolver.ResolveNowOptions{})
		}
		synctest.Wait()
		r.Close()
		want := []time.Duration{10 * time.Second, 10 * time.Second, 10 * time.Second}
		if got := p.gaps(); !slices.Equal(got, want) {
			t.Errorf("polls were %v apart under constant nudges, want %v", got, want)
		}
	})
}

func TestPollLooksAgainSoonerWhileThePolicyRejectsTheSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p, cc := &polls{}, &fakeConn{}
		cc.onUpdate = func(s resolver.State) error { return resolver.ValidateEndpoints(s.Endpoints) }
		build(t, cc, must(discover.Poll(p.poll, 5*time.Second)), exact())
		time.Sleep(500 * time.Millisecond)
		p.next(nil, ep("1"))
		time.Sleep(time.Second) // the backoff, and the least distance of two polls
		wantSets(t, cc, "-", "1=1")
	})
}

func TestPollGivesEachCallADeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, must(discover.Poll(func(ctx context.Context) ([]resolver.Endpoint, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, time.Second)), exact())
		time.Sleep(9900 * time.Millisecond)
		wantErrors(t, cc)
		time.Sleep(200 * time.Millisecond)
		wantErrors(t, cc, "deadline exceeded")
	})
}

func TestPollOfTheLongestIntervalCallsOnce(t *testing.T) {
	// An interval that overflows with its jitter does so half of the time.
	for range 20 {
		synctest.Test(t, func(t *testing.T) {
			calls := 0
			src := must(discover.Poll(func(ctx context.Context) ([]resolver.Endpoint, error) {
				if calls++; calls > 1 {
					<-ctx.Done() // lest the clock stand still
				}
				return []resolver.Endpoint{ep("1")}, nil
			}, math.MaxInt64))
			r := build(t, &fakeConn{}, src)
			time.Sleep(24 * time.Hour)
			r.Close()
			if calls != 1 {
				t.Fatalf("polled %d times in a day, want once", calls)
			}
		})
	}
}

func TestPollRejectsBadValues(t *testing.T) {
	_, err := discover.Poll(nil, time.Second)
	wantError(t, err, "nil")
	_, err = discover.Poll((&polls{}).poll, 0)
	wantError(t, err, "interval 0s: must be positive")
}

// mergedScripts runs f on a merge of two scripts.
func mergedScripts(t *testing.T, f func(t *testing.T, a, b *script, cc *fakeConn, r resolver.Resolver)) {
	synctest.Test(t, func(t *testing.T) {
		a, b, cc := &script{inTurn: true}, &script{inTurn: true}, &fakeConn{}
		r := build(t, cc, must(discover.Merge(a, b)), exact())
		synctest.Wait()
		f(t, a, b, cc, r)
	})
}

func TestMergeIsSyncedWhenAllAreAndKeepsKeysApart(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		a.send(ins("k", "1"), discover.Synced())
		b.send(ins("k", "2"))
		settle()
		wantSets(t, cc)
		b.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "0/k=1 1/k=2")
		a.send(ins("l", "2", discover.Weight(7)), discover.Synced()) // the first source's address wins
		synctest.Wait()
		b.send(discover.Remove("k"), discover.Remove("l"))
		settle()
		wantSets(t, cc, "0/k=1 1/k=2", "0/k=1 0/l=2*7")
	})
}

func TestMergeKeepsTheOthersWhenOneFails(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		a.send(ins("a", "1"), ins("b", "2"), discover.Synced())
		b.send(ins("c", "3"), discover.Synced())
		synctest.Wait()
		a.fail("down")
		b.send(ins("d", "4"))
		settle()
		wantErrors(t, cc, "source 0 of 2: down")
		wantSets(t, cc, "0/a=1 0/b=2 1/c=3", "0/a=1 0/b=2 1/c=3 1/d=4")

		time.Sleep(time.Second) // watched again
		a.send(ins("b", "2"), ins("e", "5"))
		settle()
		if got := len(cc.sets()); got != 2 {
			t.Errorf("%d updates before the new watch is synced, want still 2", got)
		}
		a.send(discover.Synced())
		synctest.Wait()
		if got, want := show(cc.last()), "0/b=2 0/e=5 1/c=3 1/d=4"; got != want {
			t.Errorf("set = %q, want %q", got, want)
		}
		if got := len(b.started()); got != 1 {
			t.Errorf("the other source was watched %d times, want 1", got)
		}
	})
}

func TestMergePublishesTheOthersWhenOneFailsFromTheBeginning(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		a.send(ins("x", "9"))
		a.fail("down")
		synctest.Wait()
		wantSets(t, cc)
		b.send(ins("b", "2"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "1/b=2")
		time.Sleep(1100 * time.Millisecond)
		a.send(ins("a", "1"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "1/b=2", "0/a=1 1/b=2")
		wantErrors(t, cc, "source 0 of 2: down")
	})
}

func TestMergePublishesTheOthersAtOnceWhenTheLastOneMissingFails(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		b.send(ins("b", "2"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc)
		a.fail("down")
		synctest.Wait()
		wantSets(t, cc, "1/b=2")
	})
}

func TestMergeOfAFailingAndAnEmptySourceIsNotKnownToBeEmpty(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		b.send(discover.Synced())
		a.fail("down")
		synctest.Wait()
		wantErrors(t, cc, "down")
		wantSets(t, cc)
		time.Sleep(1100 * time.Millisecond)
		a.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "-")
	})
}

func TestMergeWaitsForASilentSourceNoLongerThanTheTimeout(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		b.send(ins("b", "2"), discover.Synced())
		time.Sleep(14 * time.Second)
		wantSets(t, cc)
		time.Sleep(2 * time.Second)
		wantSets(t, cc, "1/b=2")
		wantErrors(t, cc, "source 0 of 2: the source has delivered no endpoints within 15s")
	})
}

func TestMergeKeepsTheLastSetOfASourceWhoseNewWatchIsSlow(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		a.send(ins("a", "1"), discover.Synced())
		b.send(discover.Final())
		synctest.Wait()
		a.fail("down")
		time.Sleep(1100 * time.Millisecond)
		a.send(ins("b", "2"))
		time.Sleep(time.Hour)
		wantSets(t, cc, "0/a=1")
		wantErrors(t, cc, "source 0 of 2: down", "source 0 of 2: the source has failed, and its new watch has not said Synced within 15s")
	})
}

// A source behaves inside a Merge as it does alone, down to the moment when the
// channel is told something.
func TestMergeOfOneSourceTellsTheChannelWhatTheSourceAloneDoes(t *testing.T) {
	for _, tt := range []struct {
		name string
		play func(src *script)
	}{
		{"never synced", func(src *script) {
			src.send(ins("a", "1"))
			time.Sleep(time.Minute)
			src.send(ins("b", "2"))
		}},
		{"silent", func(src *script) {
			time.Sleep(20 * time.Second)
			src.send(ins("a", "1"))
		}},
		{"failing", func(src *script) {
			src.send(ins("a", "1"))
			src.fail("down")
			time.Sleep(3 * time.Second)
			src.send(ins("a", "1"), discover.Synced())
			src.fail("down")
			time.Sleep(time.Minute)
			src.send(ins("b", "2"))
			src.end()
		}},
		{"final", func(src *script) {
			src.send(ins("a", "1"), discover.Insert("b", resolver.Endpoint{}), discover.Final())
		}},
		{"live", func(src *script) {
			src.send(discover.Synced(), ins("a", "1"), ins("b", "2"))
			time.Sleep(time.Second)
			src.send(discover.Batch(discover.Remove("a"), ins("c", "3"), discover.ServiceConfig("{}")))
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			told := func(wrap func(discover.Source) discover.Source) (log []string) {
				synctest.Test(t, func(t *testing.T) {
					src, cc := &script{}, &fakeConn{}
					build(t, cc, wrap(src), exact())
					synctest.Wait()
					start := time.Now()
					done := make(chan struct{})
					go func() {
						defer close(done)
						tt.play(src)
					}()
					for seen := 0; time.Since(start) < 3*time.Minute; time.Sleep(10 * time.Millisecond) {
						synctest.Wait()
						for ; seen < len(cc.calls()); seen++ {
							log = append(log, fmt.Sprint(time.Since(start).Round(20*time.Millisecond), " ", cc.calls()[seen]))
						}
					}
					<-done
				})
				return log
			}
			alone := told(func(src discover.Source) discover.Source { return src })
			for name, wrap := range map[string]func(discover.Source) discover.Source{
				"merged":       func(src discover.Source) discover.Source { return must(discover.Merge(src)) },
				"merged twice": func(src discover.Source) discover.Source { return must(discover.Merge(must(discover.Merge(src)))) },
			} {
				got := told(wrap)
				for i := range got {
					got[i] = strings.NewReplacer("0/0/", "", "0/", "", "source 0 of 1: ", "").Replace(got[i])
				}
				if !slices.Equal(got, alone) {
					t.Errorf("%s: the channel was told\n%q, alone\n%q", name, got, alone)
				}
			}
			if len(alone) == 0 {
				t.Error("the channel was told nothing")
			}
		})
	}
}

func TestMergeDoesNotHoldBackAnInsertThatCompletesTheSet(t *testing.T) {
	for _, failing := range []bool{true, false} {
		mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
			if failing {
				a.fail("down")
			} else {
				time.Sleep(15*time.Second + 1) // silent
			}
			b.send(discover.Synced())
			settle()
			wantSets(t, cc)
			b.send(ins("b", "1"))
			settle()
			wantSets(t, cc, "1/b=1")
		})
	}
}

func TestMergePartsOfAFailedFirstWatchGoWhenTheNextIsSynced(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		b.send(discover.Final())
		a.send(ins("a", "1"), ins("b", "2"))
		a.fail("down")
		time.Sleep(1100 * time.Millisecond)
		a.send(ins("b", "3"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "0/b=3")
	})
}

func TestMergeOfManySourcesPrefersTheFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sources := make([]discover.Source, 12)
		for i := range sources {
			sources[i] = must(discover.List())
		}
		for _, i := range []int{2, 10} {
			sources[i] = must(discover.List(ep("1", discover.Key("k"), discover.Weight(uint32(i)))))
		}
		cc := &fakeConn{}
		build(t, cc, must(discover.Merge(sources...)))
		settle()
		wantSets(t, cc, "02/k=1*2")
	})
}

func TestMergeServiceConfigOfTheFirstSourceThatHasOne(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, _ resolver.Resolver) {
		b.send(discover.ServiceConfig(`{"b":1}`), discover.Synced())
		a.send(discover.Synced())
		a.send(discover.ServiceConfig(`{"a":1}`), discover.Synced())
		b.send(discover.ServiceConfig(`{"b":2}`), discover.Synced())
		a.send(discover.ServiceConfig(""), discover.Synced())
		synctest.Wait()
		got := cc.configs()
		if want := []string{`{"b":1}`, `{"a":1}`, `{"b":2}`}; !slices.Equal(got, want) {
			t.Errorf("service configs = %q, want %q", got, want)
		}
	})
}

func TestMergePassesNudgesToAllAndFaultsToTheBridge(t *testing.T) {
	mergedScripts(t, func(t *testing.T, a, b *script, cc *fakeConn, r resolver.Resolver) {
		r.ResolveNow(resolver.ResolveNowOptions{})
		synctest.Wait()
		for i, s := range []*script{a, b} {
			select {
			case <-discover.Nudges(s.running()[0].ctx):
			default:
				t.Errorf("source %d was not nudged", i)
			}
		}
		a.send(discover.Insert("bad", resolver.Endpoint{}), discover.Synced())
		b.send(ins("b", "1"), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "1/b=1")
		wantErrors(t, cc, `Insert("0/bad"): it has no addresses`)
		if strings.HasPrefix(cc.calls()[0], "error") {
			t.Errorf("calls = %q, want the set first", cc.calls())
		}
	})
}

func TestMergeEndsWhenAllHaveEnded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := must(discover.Merge(must(discover.List(ep("1"))), must(discover.List()), must(discover.List(ep("2")))))
		n := 0
		for c, err := range src.Watch(t.Context()) {
			if err != nil {
				t.Errorf("error %v", err)
			}
			for c := range c.All() {
				if c.Op == discover.OpInsert {
					n++
				}
			}
		}
		if n != 2 {
			t.Errorf("%d inserts, want 2: those synced are not told again", n)
		}
	})
}

func TestMergeStopsWhenTheConsumerBreaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := &script{}
		src := must(discover.Merge(a, must(discover.List(ep("2")))))
		for range src.Watch(t.Context()) {
			break
		}
		if got := len(a.running()); got != 0 {
			t.Errorf("%d watches run, want 0", got)
		}
	})
	_, err := discover.Merge()
	wantError(t, err, "no sources")
	_, err = discover.Merge(&script{}, nil)
	wantError(t, err, "source 1 is nil")
}

func TestMergesNest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := must(discover.Merge(must(discover.List(ep("1"))), must(discover.List(ep("2")))))
		cc := &fakeConn{}
		build(t, cc, must(discover.Merge(inner, must(discover.List(ep("3"))))))
		synctest.Wait()
		wantSets(t, cc, "0/0/1=1 0/1/2=2 1/3=3")
	})
}

func TestSettleSyncsWhenTheSourceHasBeenQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, cc := &script{}, &fakeConn{}
		build(t, cc, must(discover.Settle(src, time.Second)), exact())
		time.Sleep(3 * time.Second) // connecting
		for i := range 5 {
			src.send(ins(fmt.Sprint(i), fmt.Sprint(i)))
			time.Sleep(900 * time.Millisecond)
		}
		wantSets(t, cc)
		time.Sleep(200 * time.Millisecond)
		wantSets(t, cc, "0=0 1=1 2=2 3=3 4=4")
		src.send(discover.Remove("0"))
		settle()
		wantSets(t, cc, "0=0 1=1 2=2 3=3 4=4", "1=1 2=2 3=3 4=4")

		src.fail("down") // and settles again
		time.Sleep(1100 * time.Millisecond)
		src.send(ins("a", "1"))
		time.Sleep(1100 * time.Millisecond)
		wantSets(t, cc, "0=0 1=1 2=2 3=3 4=4", "1=1 2=2 3=3 4=4", "a=1")
		wantErrors(t, cc, "down")
	})
}

func TestSettleDoesNotSyncAnEmptySet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, cc := &script{}, &fakeConn{}
		build(t, cc, must(discover.Settle(src, time.Second)), exact())
		time.Sleep(10 * time.Second)
		wantSets(t, cc)
		src.send(ins("a", "1"), discover.Remove("a"))
		time.Sleep(3 * time.Second)
		wantSets(t, cc)
		wantErrors(t, cc)
		time.Sleep(3 * time.Second)
		wantErrors(t, cc, "discover: watching belfry:///orders: the source has delivered no endpoints within 15s")
		src.send(ins("b", "2"))
		time.Sleep(1100 * time.Millisecond)
		wantSets(t, cc, "b=2")
	})
	_, err := discover.Settle(nil, time.Second)
	wantError(t, err, "nil")
	_, err = discover.Settle((*script)(nil), time.Second)
	wantError(t, err, "nil")
	_, err = discover.Settle(&script{}, -time.Second)
	wantError(t, err, "quiet -1s: must be positive")
}

// An error says nothing of whether the set is complete.
func TestSettleIsNotDelayedByAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, cc := &script{}, &fakeConn{}
		build(t, cc, must(discover.Settle(src, time.Second)), exact())
		synctest.Wait()
		src.send(ins("a", "1"))
		src.do(step{err: errors.New("a malformed entry")})
		time.Sleep(1100 * time.Millisecond)
		wantSets(t, cc, "a=1")
		src.fail("down")
		time.Sleep(time.Minute) // The next watch inserts nothing.
		wantSets(t, cc, "a=1")
	})
}

func TestSettleLeavesASourceAloneThatSyncsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src, cc := &script{}, &fakeConn{}
		build(t, cc, must(discover.Settle(src, time.Second)))
		synctest.Wait()
		src.send(discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "-")
		src.send(ins("a", "1"), discover.Final())
		time.Sleep(time.Minute)
		wantSets(t, cc, "-", "a=1")
		if got := len(src.started()); got != 1 {
			t.Errorf("the source was watched %d times, want 1", got)
		}
	})
}
