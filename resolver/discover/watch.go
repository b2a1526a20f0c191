// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"time"

	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"
)

// watchEnv is what the resolver tells its source, and the sources inside that,
// through the context of Watch.
type watchEnv struct {
	nudge       <-chan struct{} // nil: never
	backoff     backoff.Config
	syncTimeout time.Duration
}

type watchEnvKey struct{}

// watchEnvOf returns the environment in ctx, or the defaults.
func watchEnvOf(ctx context.Context) watchEnv {
	if env, ok := ctx.Value(watchEnvKey{}).(watchEnv); ok {
		return env
	}
	return watchEnv{backoff: backoff.DefaultConfig, syncTimeout: defaultSyncTimeout}
}

func (env watchEnv) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, watchEnvKey{}, env)
}

// retryDelay returns how long to wait after the given number of failures in a
// row, which is at least 1. It is gRPC's connection backoff
// (https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md), except
// that the first delay has jitter too, because all clients lose a discovery
// service at the same moment.
func retryDelay(c backoff.Config, failures int) time.Duration {
	d := float64(c.BaseDelay) * math.Pow(c.Multiplier, float64(failures-1))
	return jittered(min(d, float64(c.MaxDelay)), c.Jitter)
}

// jittered returns d nanoseconds, plus or minus up to the fraction jitter of it.
// A result that is too large for a Duration becomes the largest Duration.
func jittered(d, jitter float64) time.Duration {
	d *= 1 + jitter*(2*rand.Float64()-1)
	if d >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(d)
}

// sleep waits for d. It reports false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// A watchEvent is one step in the life of a supervised source.
type watchEvent struct {
	kind   eventKind
	change Change // of eventChange
	err    error  // of eventError; of eventFailed, nil if it was told before
}

type eventKind uint8

const (
	eventStart  eventKind = iota // a watch begins
	eventChange                  // it yielded a change
	eventError                   // it yielded an error
	eventFailed                  // it is over; another begins after the backoff
)

// supervise watches src, and again after every failure, until it is final or ctx
// is done. It calls emit with every event, on the goroutine that called
// supervise. It returns when emit returns false, as emit does when ctx is done.
func supervise(ctx context.Context, src Source, cfg backoff.Config, emit func(watchEvent) bool) {
	for failures := 0; ; {
		began := time.Now()
		end := watchOnce(ctx, src, emit)
		if ctx.Err() != nil || end.final {
			return
		}
		// A source that never says Synced counts as healthy if its watch lasts.
		if end.synced || time.Since(began) >= cfg.MaxDelay {
			failures = 0
		}
		failures++
		if !emit(watchEvent{kind: eventFailed, err: end.err}) || !sleep(ctx, retryDelay(cfg, failures)) {
			return
		}
	}
}

var (
	errNoSequence = errors.New("Watch returned no sequence (nil)")
	errEnded      = errors.New("the source ended without an error and without Final; watching it again")
)

// watchEnd says how a watch ended.
type watchEnd struct {
	synced bool // it was synced at some time
	final  bool
	err    error // if the last thing it yielded was not an error
}

// watchOnce runs one watch.
func watchOnce(ctx context.Context, src Source, emit func(watchEvent) bool) (end watchEnd) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // of what the source may have started for this watch
	defer func() {
		if v := recover(); v != nil {
			logger.Errorf("the source panicked: %v\n%s", v, debug.Stack())
			end.final, end.err = false, fmt.Errorf("the source panicked: %v", v)
		}
	}()
	if !emit(watchEvent{kind: eventStart}) {
		return end
	}
	changes := src.Watch(ctx)
	if changes == nil {
		end.err = errNoSequence
		return end
	}
	end.err = errEnded
	stopped := false
	// Called, not ranged over. A source that yields after it was told to stop would
	// panic in a range loop; here it gets false again.
	changes(func(c Change, err error) bool {
		if stopped || ctx.Err() != nil {
			stopped = true
			return false
		}
		if err != nil {
			end.err = nil
			stopped = !emit(watchEvent{kind: eventError, err: err})
			return !stopped
		}
		end.err = errEnded
		for c := range c.All() {
			end.final = end.final || c.Op == OpFinal
			end.synced = end.synced || c.Op == OpSynced
		}
		stopped = !emit(watchEvent{kind: eventChange, change: c}) || end.final
		return !stopped
	})
	return end
}

// An entry is an endpoint as it will be published.
type entry struct {
	endpoint resolver.Endpoint // with its key
	id       string            // addressID
}

// A snapshot is the state that one watch has yielded so far.
type snapshot struct {
	entries       map[string]entry
	refused       map[string]struct{} // keys that were given an endpoint that cannot be used
	serviceConfig string
}

func newSnapshot() *snapshot {
	return &snapshot{entries: make(map[string]entry), refused: make(map[string]struct{})}
}

// A follower holds the state of one supervised source: the last complete set,
// and the incomplete set of the running watch. It alone decides whether a set is
// complete. It has no lock and no clock: one goroutine owns it and passes it the
// time.
type follower struct {
	// Immutable.
	check       func(resolver.Endpoint) error // what is wrong with an endpoint
	syncTimeout time.Duration                 // 0: the source keeps the time of the sources in it
	quiet       time.Duration                 // of Settle; 0: none

	set  *snapshot // complete, and live unless next is set; nil before the first
	next *snapshot // of a watch that is not synced yet; nil if there is none

	dirty map[string]struct{} // the keys of set that have changed since the owner called clean

	syncBy  time.Time // when next is due to be synced; zero: never
	quietAt time.Time // when next is taken for complete unless it changes; zero: never
	told    bool      // why next is not complete: an error has come since it began
}

// follow returns a follower of src.
func follow(src Source, check func(resolver.Endpoint) error, syncTimeout, quiet time.Duration) follower {
	// A merged source has a timeout for each of its sources. One around it would
	// expire first, before it has heard what those have inserted.
	if _, ok := src.(merged); ok {
		syncTimeout = 0
	}
	return follower{check: check, syncTimeout: syncTimeout, quiet: quiet, dirty: make(map[string]struct{})}
}

// news is what an event means to the owner of a follower. The owner also reads
// dirty.
type news struct {
	synced bool // the set is complete: it can be published at once
	final  bool // and stays as it is
	err    error
	faults []fault
}

// A fault is a change that was ignored, and why.
type fault struct {
	change Change
	err    error
}

func (f *follower) handle(ev watchEvent, now time.Time) (n news) {
	switch ev.kind {
	case eventStart:
		f.next, f.quietAt, f.syncBy, f.told = newSnapshot(), time.Time{}, time.Time{}, false
		if f.syncTimeout > 0 {
			f.syncBy = now.Add(f.syncTimeout)
		}
	case eventChange:
		for c := range ev.change.All() {
			switch c.Op {
			case OpSynced, OpFinal:
				f.promote()
				n.synced, n.final = true, n.final || c.Op == OpFinal
			default:
				if err := f.apply(c); err != nil {
					n.faults = append(n.faults, fault{c, err})
				}
			}
		}
		if f.next != nil && f.quiet > 0 {
			// An empty set looks the same as one that has not arrived yet.
			f.quietAt = time.Time{}
			if len(f.next.entries) > 0 {
				f.quietAt = now.Add(f.quiet)
			}
		}
	case eventError:
		n.err, f.told = ev.err, true
	case eventFailed:
		f.next = nil // What it had not completed is forgotten.
		n.err = ev.err
	}
	return n
}

// clean forgets which keys have changed.
func (f *follower) clean() {
	if len(f.dirty) > 100 {
		f.dirty = make(map[string]struct{}) // A map that was large is slow to walk for ever.
	} else {
		clear(f.dirty)
	}
}

// promote makes the set of the running watch the last complete one.
func (f *follower) promote() {
	if f.next == nil {
		return
	}
	old := f.set
	f.set, f.next = f.next, nil
	for k, e := range f.set.entries {
		if old == nil {
			f.dirty[k] = struct{}{}
		} else if o, ok := old.entries[k]; !ok || !equalEndpoints(o.endpoint, e.endpoint) {
			f.dirty[k] = struct{}{}
		}
	}
	if old != nil {
		for k := range old.entries {
			if _, ok := f.set.entries[k]; !ok {
				f.dirty[k] = struct{}{}
			}
		}
	}
}

// apply applies a change of one key or of the service config. It returns an
// error, and changes no endpoint, if the change is not valid.
func (f *follower) apply(c Change) error {
	set, dirty := f.next, map[string]struct{}(nil)
	if set == nil {
		set, dirty = f.set, f.dirty
	}
	old, known := set.entries[c.Key]
	switch c.Op {
	case OpInsert:
		if err := f.check(c.Endpoint); err != nil {
			set.refused[c.Key] = struct{}{}
			return fmt.Errorf("ignored %v(%q): %w", c.Op, c.Key, err)
		}
		ep := SetKey(c.Endpoint, c.Key)
		if known && equalEndpoints(old.endpoint, ep) {
			return nil
		}
		set.entries[c.Key] = entry{endpoint: ep, id: addressID(ep)}
	case OpRemove:
		_, refused := set.refused[c.Key]
		delete(set.refused, c.Key)
		if !known && !refused {
			return nil
		}
		delete(set.entries, c.Key)
	case OpServiceConfig:
		set.serviceConfig = c.ServiceConfig
		return nil
	default:
		return fmt.Errorf("ignored a Change with unknown Op %d", c.Op)
	}
	if dirty != nil {
		dirty[c.Key] = struct{}{}
	}
	return nil
}

// deadline returns when expire is due, or the zero time if it is not.
func (f *follower) deadline() time.Time {
	if f.next == nil {
		return time.Time{}
	}
	return earliest(f.quietAt, f.syncBy)
}

// expire handles the deadline: it completes a set that is quiet, and reports or
// completes one that is late.
func (f *follower) expire(now time.Time) (n news) {
	switch have := len(f.next.entries); {
	case due(f.quietAt, now):
		f.promote()
		n.synced = true
	case f.set != nil:
		// A complete set is worth more than an incomplete one, even if the new watch
		// is slow.
		n.err = fmt.Errorf("the source has failed, and its new watch has not said Synced within %v; the last set, of %d endpoints, stays (a source that never says Synced is to be wrapped in Settle)", f.syncTimeout, len(f.set.entries))
		f.syncBy = time.Time{}
	case have > 0:
		logger.Warningf("the source has not said Synced within %v; the %d endpoints that it has inserted are taken for the set", f.syncTimeout, have)
		f.promote()
		n.synced = true
	default:
		// Calls fail with the last error reported. One from the source says more than
		// this one.
		if !f.told {
			n.err, f.told = fmt.Errorf("the source has delivered no endpoints within %v", f.syncTimeout), true
		}
		f.syncBy = now.Add(f.syncTimeout)
	}
	return n
}

// earliest returns the earliest of the times that are not zero.
func earliest(times ...time.Time) (first time.Time) {
	for _, t := range times {
		if first.IsZero() || !t.IsZero() && t.Before(first) {
			first = t
		}
	}
	return first
}

// due reports whether the time, if there is one, has come.
func due(at, now time.Time) bool { return !at.IsZero() && !now.Before(at) }
