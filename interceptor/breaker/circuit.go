// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package breaker

import (
	"fmt"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/grpclog"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/retryafter"
	"github.com/belfry-go/belfry/internal/rolling"
)

// A circuit is the breaker of one key. While it is closed, calls pass it without
// a lock.
type circuit struct {
	breaker *Layer
	key     string
	opened  *interceptor.Refusal                   // The refusal while open until Reset.
	soon    *retryafter.Cache[interceptor.Refusal] // While open, by the time left.
	probed  *interceptor.Refusal                   // The refusal while half-open with all probes in flight.

	// state is the State, and in the higher bits the number of changes so far. It is
	// written with mu held, after the fields that belong to it.
	state atomic.Uint64
	until atomic.Int64 // When an open circuit is half-open, an Instant; never if for ever.

	// What a closed circuit has counted.
	run   atomic.Int64                   // Failures one after the other.
	calls atomic.Pointer[rolling.Window] // Calls, and failures among them.
	timed atomic.Pointer[rolling.Window] // Unary calls, and slow ones among them.

	// mu guards changes of state and the fields below. No lock of belfry is taken under
	// it.
	mu         sync.Mutex
	trips      int                 // Since it was closed.
	probing    int                 // Probes that have said nothing yet.
	passed     int                 // Probes that have succeeded.
	probesFrom interceptor.Instant // Since when probing counts, an OpenFor at most.
}

const never = math.MaxInt64

// refusalsKept is how many refusals a circuit keeps. Calls that arrive together have
// about the same time left, and so the same refusal.
const refusalsKept = 4

func newCircuit(b *Layer, key string) *circuit {
	refuse := func(message string) *interceptor.Refusal {
		r := interceptor.Refuse(b.name, interceptor.ReasonBreakerOpen, message)
		if key != "" {
			r = r.ForKey(key)
		}
		return r
	}
	c := &circuit{breaker: b, key: key, opened: refuse("the circuit is open"), probed: refuse("the circuit is half-open and waits for its probes")}
	c.soon = retryafter.New(refusalsKept, c.opened.After)
	c.forget(b.settings.Load())
	return c
}

// forget resets what a closed circuit has counted.
func (c *circuit) forget(s *settings) {
	c.run.Store(0)
	c.calls.Store(rolling.New(s.Window))
	c.timed.Store(rolling.New(s.Window))
}

func stateOf(word uint64) State { return State(word & 3) }

// A token holds the number of changes at the moment that the circuit admitted a call, so
// that the call judges only that state, and in its lowest bit whether the call can be
// slow.
func token(word uint64, canBeSlow bool) int64 {
	t := int64(word >> 2 << 1)
	if canBeSlow {
		t++
	}
	return t
}

// isOf reports whether the circuit's state is still that of the token.
func isOf(token int64, word uint64) bool { return uint64(token)>>1 == word>>2 }

// admit lets a call pass, or refuses it.
func (c *circuit) admit(s *settings, a *interceptor.Admission) (int64, error) {
	word := c.state.Load()
	if stateOf(word) != Closed {
		now := a.Now()
		if stateOf(word) == Open && int64(now) < c.until.Load() {
			return 0, c.refusal(now)
		}
		var err error
		if word, err = c.probe(s, now); err != nil {
			return 0, err
		}
	}
	canBeSlow := s.SlowCallRatio > 0 && a.Kind() == interceptor.Unary
	if canBeSlow {
		a.Timed()
	}
	return token(word, canBeSlow), nil
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

// refusal returns a refusal that says when the circuit will be half-open, rounded up so
// that many calls share it.
func (c *circuit) refusal(now interceptor.Instant) error {
	until := c.until.Load()
	left := until - int64(now)
	if until == never || left <= 0 { // The second only if the state changes right now.
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
		c.probing, c.passed, c.probesFrom = 0, 0, now
		word = c.changeLocked(HalfOpen, CauseDelay, 0)
	default:
		if c.passed >= s.Probes { // Update has lowered Probes, and no further probe is needed.
			c.closeLocked(s, CauseProbesOK)
			return c.state.Load(), nil
		}
		if now.Sub(c.probesFrom) >= s.OpenFor {
			c.probing, c.probesFrom = 0, now // The earlier probes have said nothing for too long.
		}
		if c.probing+c.passed >= s.Probes {
			return 0, c.probed
		}
	}
	c.probing++
	return word, nil
}

// Respond counts the first response of a stream as a success.
func (c *circuit) Respond(token int64, _ interceptor.End) {
	c.take(token, verdict{counts: true})
}

// Release judges a call that has ended, unless Respond judged it before.
func (c *circuit) Release(token int64, e interceptor.End) {
	if !e.Responded {
		c.take(token, c.verdict(token, e))
	}
}

// A verdict is what the end of a call says about the server.
type verdict struct {
	counts    bool                // It is a success or a failure:
	failed    bool                // which one,
	exhausted bool                // and whether with RESOURCE_EXHAUSTED.
	timed     bool                // It was measured:
	slow      bool                // and whether it was slow.
	sent      bool                // It was sent.
	now       interceptor.Instant // Zero if the clock was not read.
}

func (c *circuit) verdict(token int64, e interceptor.End) (v verdict) {
	s := c.breaker.settings.Load()
	v.sent = e.Outcome.Sent()
	switch e.Outcome {
	case interceptor.OK:
		v.counts = true
	case interceptor.Failed:
		code := e.Code()
		v.counts, v.failed, v.exhausted = true, s.failures.Has(code), code == codes.ResourceExhausted
	case interceptor.NotConnected:
		v.counts, v.failed = !s.IgnoreNotConnected, true
		return v
	case interceptor.NotSent:
		return v
	}
	if token&1 != 0 && e.SentAt() != 0 && s.SlowCallRatio > 0 {
		v.now = interceptor.Now()
		v.slow = v.now.Sub(e.SentAt()) >= s.SlowCall
		v.timed = v.slow || v.counts
	}
	return v
}

// take applies a verdict.
func (c *circuit) take(token int64, v verdict) {
	word := c.state.Load()
	if !isOf(token, word) {
		return // It was admitted in an earlier state.
	}
	switch s := c.breaker.settings.Load(); stateOf(word) {
	case Closed:
		c.judge(s, word, v)
	case HalfOpen:
		c.result(s, word, v)
	}
}

// judge counts a call of a closed circuit, and trips the circuit if a threshold is
// reached. A success never trips it, so the thresholds are checked only at failures.
func (c *circuit) judge(s *settings, word uint64, v verdict) {
	cause, now := Cause(""), v.now
	if v.counts && s.ConsecutiveFailures > 0 {
		switch {
		case !v.failed:
			if c.run.Load() != 0 {
				c.run.Store(0)
			}
		case !v.exhausted:
			if c.run.Add(1) >= int64(s.ConsecutiveFailures) {
				cause = CauseConsecutive
			}
		}
	}
	if v.counts && s.FailureRatio > 0 {
		if now == 0 {
			now = interceptor.Now()
		}
		w := c.window(&c.calls, s, now)
		w.Add(int64(now), v.failed)
		if v.failed && over(w, now, s.MinCalls, s.FailureRatio) {
			cause = CauseRatio
		}
	}
	if v.timed {
		w := c.window(&c.timed, s, now)
		w.Add(int64(now), v.slow)
		if v.slow && over(w, now, s.MinCalls, s.SlowCallRatio) {
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

// result applies the verdict of a probe.
func (c *circuit) result(s *settings, word uint64, v verdict) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state.Load() != word {
		return
	}
	switch {
	case v.failed && v.counts || v.slow:
		c.openLocked(s, CauseProbeFailed)
	case v.counts:
		c.probing = max(c.probing-1, 0)
		if c.passed++; c.passed >= s.Probes {
			c.closeLocked(s, CauseProbesOK)
		}
	case !v.sent:
		c.probing = max(c.probing-1, 0) // Another call may be the probe.
	default:
		// It was sent and says nothing, because its caller gave up. If the next call probed
		// at once, a server that hangs would get one probe for each impatient caller.
	}
}

// openLocked opens the circuit, for longer the more often it has tripped. Caller must
// hold c.mu.
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

// changeLocked changes the state. All changes go through it. Caller must hold c.mu.
func (c *circuit) changeLocked(to State, cause Cause, openFor time.Duration) (word uint64) {
	old := c.state.Load()
	word = (old>>2+1)<<2 | uint64(to)
	c.state.Store(word)
	c.breaker.logChange(c.key, stateOf(old), to, cause, openFor)
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

// logChange logs that a circuit has opened or closed. A probe that fails changes nothing for
// an operator.
func (b *Layer) logChange(key string, from, to State, cause Cause, openFor time.Duration) {
	if from == to || to == HalfOpen || from == HalfOpen && to == Open {
		return
	}
	more, ok := b.log.May(int64(interceptor.Now()))
	if !ok {
		return
	}
	of := ""
	if key != "" {
		of = fmt.Sprintf(" of %q", key)
	}
	switch {
	case to == Closed:
		logger.Warningf("breaker %q: the circuit%s is closed: %s%s", b.name, of, cause, more)
	case openFor > 0:
		logger.Warningf("breaker %q: the circuit%s is open for %v: %s%s", b.name, of, openFor.Round(time.Millisecond), cause, more)
	default:
		logger.Warningf("breaker %q: the circuit%s is open until Reset: %s%s", b.name, of, cause, more)
	}
}

var logger = grpclog.Component("belfry")
