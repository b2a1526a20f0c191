// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package hedge

import (
	"math"
	"sync"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/keyed"
	"github.com/belfry-go/belfry/internal/quantile"
)

const (
	// Extra attempts are held back while calls are due for one manySlow times as often as
	// the percentile says, and the extra attempts win fewer than rareWins of these calls. One
	// slow server of several makes many calls slow, but then extra attempts win. Servers whose
	// latencies hardly differ let few of them win, but then few calls are slow.
	//
	// With lognormal latencies (sigma 0.6) extra attempts win 30 % of their calls on idle
	// servers, 18 % at 0.9 of capacity, 4 % at 1.0 and 1 % at 1.1. One win in a row of
	// losses is more than rareWins.
	manySlow = 3
	rareWins = 0.06
	// probeEvery is how often one is made nevertheless, to find out whether they win again.
	probeEvery = time.Second

	lastCalls = 64 // About how many calls the share of slow ones is a mean of,
	lastExtra = 16 // and how many with an extra attempt that of won ones.
)

// odds says what the extra attempts of a method are worth: if many calls wait because all
// servers are busy, an extra attempt waits behind them, and only adds to the load.
type odds struct {
	// mu guards the fields below. It is locked when an extra attempt is due, and at the
	// end of a call that had one.
	mu   sync.Mutex
	slow float64             // The share of calls for which one was due.
	lost float64             // The share of calls with one that it did not win.
	n    int                 // How many latencies were known when one was last due.
	made interceptor.Instant // When one was last made although they are held back.
}

// due records that an extra attempt is due when n latencies are known, and reports
// whether to make it. Of all calls, a share of usual is expected to be due for one.
func (o *odds) due(now interceptor.Instant, n int, usual float64) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	calls := max(n-o.n, 0) // n falls once in half a window.
	o.slow = min(o.slow*math.Pow(1-1.0/lastCalls, float64(calls))+1.0/lastCalls, 1)
	o.n = n
	if o.slow < manySlow*usual || 1-o.lost > rareWins {
		return true
	}
	if now.Sub(o.made) < probeEvery {
		return false
	}
	o.made = now
	return true
}

// ended records the end of a call that had an extra attempt, and whether that won.
func (o *odds) ended(won bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.lost -= o.lost / lastExtra
	if !won {
		o.lost += 1.0 / lastExtra
	}
}

func newOdds() *keyed.Map[*odds] {
	return keyed.New(
		func() int { return quantile.MaxMethods },
		func(string) *odds { return new(odds) },
		func(_ *odds, unused time.Duration, _ int64) bool { return unused > time.Minute })
}

// due reports whether an extra attempt is made now that the delay is over.
func (r *race) due() bool {
	if r.seen == nil {
		return true
	}
	now := interceptor.Now()
	_, n := r.seen.QuantileAt(now, r.set.percentile)
	return r.oddsOf(now).due(now, n, 1-r.set.percentile)
}

// tell records whether an extra attempt that was made after the delay has won.
func (r *race) tell(won bool) {
	if r.seen != nil {
		r.oddsOf(interceptor.Now()).ended(won)
	}
}

func (r *race) oddsOf(now interceptor.Instant) *odds {
	return r.layer.odds.Get(r.Method(), int64(now))
}
