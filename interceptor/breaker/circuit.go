// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"math"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/retryafter"
	"github.com/belfry-go/belfry/internal/rolling"
)

// A circuit is the breaker of one key. While it is closed, calls pass it without
// a lock.
type circuit struct {
	breaker *Breaker
	key     string
	opened  *interceptor.Refusal                   // What it refuses with while open without end.
	soon    *retryafter.Cache[interceptor.Refusal] // While open, by the time left.
	probed  *interceptor.Refusal                   // While half-open, if all probes are out.

	// state is the State and above it the number of changes so far. It is written
	// with mu held, and the fields that go with it before it.
	state atomic.Uint64
	until atomic.Int64 // When an open circuit is half-open, an Instant; never if for ever.

	// What a closed circuit has counted.
	run   atomic.Int64                   // Failures one after the other.
	calls atomic.Pointer[rolling.Window] // Calls, and failures among them.
	timed atomic.Pointer[rolling.Window] // Unary calls, and slow ones among them.

	// mu guards the changes of state and the fields below. Of belfry nothing is
	// locked under it.
	mu        sync.Mutex
	trips     int                 // Since it was closed.
	probing   int                 // Probes that have not ended.
	passed    int                 // Probes that have succeeded.
	lastProbe interceptor.Instant // When the last was let pass.
}

const never = math.MaxInt64

// refusalsKept is how many refusals a circuit keeps. The time left is about the
// same for all calls that come at once.
const refusalsKept = 4

func newCircuit(b *Breaker, key string) *circuit {
	of := ""
	if key != "" {
		of = " for " + key
	}
	c := &circuit{
		breaker: b, key: key,
		opened: interceptor.Refuse(b.name, interceptor.ReasonBreakerOpen, "open"+of),
		probed: interceptor.Refuse(b.name, interceptor.ReasonBreakerOpen, "half-open"+of+", probing"),
	}
	c.soon = retryafter.New(refusalsKept, c.opened.After)
	c.forget(b.settings.Load())
	return c
}

// forget empties what a closed circuit has counted.
func (c *circuit) forget(s *settings) {
	c.run.Store(0)
	c.calls.Store(rolling.New(s.Window))
	c.timed.Store(rolling.New(s.Window))
}

func stateOf(word uint64) State { return State(word & 3) }

// A token says in which state the circuit admitted a call, by the number of
// changes until then, so that a call judges that state only; and when it was
// admitted, in microseconds, or 0 if its time says nothing.
const (
	changeBits = 16
	changeMask = 1<<changeBits - 1
	timeMask   = 1<<(63-changeBits) - 1
)

func token(word uint64, start interceptor.Instant) int64 {
	return int64(start/1000&timeMask)<<changeBits | int64(word>>2&changeMask)
}

// admit lets a call pass, or refuses it.
func (c *circuit) admit(s *settings, call *interceptor.Call) (int64, error) {
	word := c.state.Load()
	if stateOf(word) != Closed {
		now := call.Now()
		if stateOf(word) == Open && int64(now) < c.until.Load() {
			return 0, c.refusal(now)
		}
		var err error
		if word, err = c.probe(s, now); err != nil {
			return 0, err
		}
	}
	if s.SlowCallRatio > 0 && call.Kind() == interceptor.Unary {
		return token(word, call.Now()), nil
	}
	return token(word, 0), nil
}

// refuses reports whether the circuit is open and its time is not over.
func (c *circuit) refuses(now interceptor.Instant) bool {
	return stateOf(c.state.Load()) == Open && int64(now) < c.until.Load()
}

func (c *circuit) current(now interceptor.Instant) State {
	st := stateOf(c.state.Load())
	if st == Open && int64(now) >= c.until.Load() {
		return HalfOpen
	}
	return st
}

// refusal says when the circuit will be half-open, rounded up so that not every
// refused call needs one of its own.
func (c *circuit) refusal(now interceptor.Instant) error {
	until := c.until.Load()
	left := until - int64(now)
	if until == never || left <= 0 { // The latter only if it changes just now.
		return c.opened
	}
	return c.soon.Get(time.Duration(left))
}

// probe lets a call pass that may be a probe.
func (c *circuit) probe(s *settings, now interceptor.Instant) (word uint64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch word = c.state.Load(); stateOf(word) {
	case Closed:
		return word, nil
	case Open:
		if int64(now) < c.until.Load() {
			return 0, c.refusal(now)
		}
		c.probing, c.passed = 0, 0
		word = c.changeLocked(HalfOpen, CauseDelay, 0)
	default:
		if c.probing+c.passed >= s.Probes && now.Sub(c.lastProbe) < s.OpenFor {
			return 0, c.probed
		}
	}
	c.probing++
	c.lastProbe = now
	return word, nil
}

// Release judges by a call that has ended.
func (c *circuit) Release(token int64, o interceptor.Outcome, err error) {
	word := c.state.Load()
	if int64(word>>2&changeMask) != token&changeMask {
		return // It says nothing of the state the circuit is in now.
	}
	s := c.breaker.settings.Load()
	if o == interceptor.Ignored || o == interceptor.NotSent {
		if stateOf(word) == HalfOpen {
			c.result(s, word, o, false)
		}
		return
	}
	var code codes.Code
	if o == interceptor.Failed {
		code = status.Code(err)
	}
	failed := s.failures.Has(code)
	var now interceptor.Instant // Read only if needed.
	slow, isTimed := false, false
	if start := token >> changeBits; start != 0 && s.SlowCallRatio > 0 {
		now = interceptor.Now()
		took := (int64(now/1000) - start) & timeMask // The difference, around the end of the scale.
		slow, isTimed = took >= s.SlowCall.Microseconds(), true
	}
	switch stateOf(word) {
	case Closed:
		c.judge(s, word, now, code, failed, slow, isTimed)
	case HalfOpen:
		c.result(s, word, o, failed || slow)
	}
}

// judge counts a call of a closed circuit, and trips it if that was one too many.
// A success never trips, so it needs not be looked at whether it should.
func (c *circuit) judge(s *settings, word uint64, now interceptor.Instant, code codes.Code, failed, slow, isTimed bool) {
	cause := Cause("")
	if s.ConsecutiveFailures > 0 {
		switch {
		case !failed:
			if c.run.Load() != 0 {
				c.run.Store(0)
			}
		case code != codes.ResourceExhausted:
			if c.run.Add(1) >= int64(s.ConsecutiveFailures) {
				cause = CauseConsecutive
			}
		}
	}
	if s.FailureRatio > 0 {
		if now == 0 {
			now = interceptor.Now()
		}
		w := c.window(&c.calls, s, now)
		w.Add(int64(now), failed)
		if failed && over(w, now, s.MinCalls, s.FailureRatio) {
			cause = CauseRatio
		}
	}
	if isTimed {
		w := c.window(&c.timed, s, now)
		w.Add(int64(now), slow)
		if slow && over(w, now, s.MinCalls, s.SlowCallRatio) {
			cause = CauseSlow
		}
	}
	if cause == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() == word {
		c.openLocked(s, cause)
	}
}

func over(w *rolling.Window, now interceptor.Instant, atLeast int, ratio float64) bool {
	all, noted := w.Sum(int64(now))
	return all >= int64(atLeast) && float64(noted) >= ratio*float64(all)
}

// window returns the window in p, of the span that s wants.
func (c *circuit) window(p *atomic.Pointer[rolling.Window], s *settings, now interceptor.Instant) *rolling.Window {
	if w := p.Load(); w.Span() == s.Window {
		return w
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s = c.breaker.settings.Load() // Not the caller's, which may be the older one by now.
	w := p.Load()
	if w.Span() != s.Window {
		w = w.Resized(int64(now), s.Window)
		p.Store(w)
	}
	return w
}

// result takes what came of one probe.
func (c *circuit) result(s *settings, word uint64, o interceptor.Outcome, failed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != word {
		return
	}
	c.probing--
	switch {
	case o == interceptor.Ignored || o == interceptor.NotSent:
		// Its place is free again.
	case failed:
		c.openLocked(s, CauseProbeFailed)
	default:
		if c.passed++; c.passed >= s.Probes {
			c.closeLocked(s, CauseProbesOK)
		}
	}
}

// openLocked opens the circuit for as long as its trips so far ask for. Caller
// must hold c.mu.
func (c *circuit) openLocked(s *settings, cause Cause) {
	c.trips++
	c.openForLocked(interceptor.Now(), s.delay(c.trips, c.breaker.random()), cause)
}

func (c *circuit) openForLocked(now interceptor.Instant, d time.Duration, cause Cause) {
	if d <= 0 {
		c.until.Store(never)
	} else {
		c.until.Store(int64(now.Add(d)))
	}
	c.changeLocked(Open, cause, d)
}

func (c *circuit) closeLocked(s *settings, cause Cause) {
	c.trips = 0
	c.forget(s)
	c.changeLocked(Closed, cause, 0)
}

// changeLocked is every change of state. Caller must hold c.mu.
func (c *circuit) changeLocked(to State, cause Cause, openFor time.Duration) (word uint64) {
	old := c.state.Load()
	word = (old>>2+1)<<2 | uint64(to)
	c.state.Store(word)
	if f := c.breaker.onChange; f != nil && stateOf(old) != to {
		f(Change{Key: c.key, From: stateOf(old), To: to, Cause: cause, OpenFor: openFor})
	}
	return word
}

func (c *circuit) trip(now interceptor.Instant, d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.openForLocked(now, max(d, 0), CauseTrip)
}

func (c *circuit) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closeLocked(c.breaker.settings.Load(), CauseReset)
}
