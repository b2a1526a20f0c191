// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/backoff"
)

// watchEnv is what the resolver tells the sources below it, nested ones
// included, through the context of Watch.
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

// retryDelay returns how long to wait after so many failures in a row, at least
// one. It is gRPC's connection backoff
// (https://github.com/grpc/grpc/blob/master/doc/connection-backoff.md), with
// the first delay jittered like the rest: the clients of a discovery service
// that went down all lose it at the same moment.
func retryDelay(c backoff.Config, failures int) time.Duration {
	d := float64(c.BaseDelay) * math.Pow(c.Multiplier, float64(failures-1))
	return jittered(min(d, float64(c.MaxDelay)), c.Jitter)
}

// jittered returns d nanoseconds, varied by up to the fraction jitter to both
// sides. A delay that stands for never may be as long as a Duration can be.
func jittered(d, jitter float64) time.Duration {
	d *= 1 + jitter*(2*rand.Float64()-1)
	if d >= math.MaxInt64 {
		return math.MaxInt64
	}
	return time.Duration(d)
}

// sleep waits for d and reports whether it did, rather than ctx ending first.
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
	err    error  // of eventError
}

type eventKind uint8

const (
	eventStart  eventKind = iota // a watch begins
	eventChange                  // it yielded a change
	eventError                   // it yielded an error
	eventFailed                  // its sequence ended after an error; another begins after the backoff
	eventEnd                     // its sequence ended for good; the last event
)

// supervise watches src, again after every failure, until it ends or ctx is
// done. It calls emit, on its own goroutine, with what happens, and gives up
// when emit returns false, which it does when ctx is done.
func supervise(ctx context.Context, src Source, cfg backoff.Config, emit func(watchEvent) bool) {
	for failures := 0; ; {
		synced, ended := watchOnce(ctx, src, emit)
		if ctx.Err() != nil {
			return
		}
		if ended {
			emit(watchEvent{kind: eventEnd})
			return
		}
		if synced {
			failures = 0
		}
		failures++
		if !emit(watchEvent{kind: eventFailed}) || !sleep(ctx, retryDelay(cfg, failures)) {
			return
		}
	}
}

var errNoSequence = errors.New("Watch returned no sequence (nil)")

// watchOnce runs one watch. It reports whether the watch was synced at
// some time, and whether its sequence ended without an error.
func watchOnce(ctx context.Context, src Source, emit func(watchEvent) bool) (synced, ended bool) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // of what the source may have started for this watch
	if !emit(watchEvent{kind: eventStart}) {
		return false, false
	}
	changes := src.Watch(ctx)
	if changes == nil {
		emit(watchEvent{kind: eventError, err: errNoSequence})
		return false, false
	}
	ended = true
	stopped := false
	// Called, not ranged over: a source that yields on after it was told to stop
	// is to be refused, not to bring the program down.
	changes(func(c Change, err error) bool {
		if stopped || ctx.Err() != nil {
			stopped = true
			return false
		}
		ev := watchEvent{kind: eventChange, change: c}
		if err != nil {
			ev = watchEvent{kind: eventError, err: err}
		} else if c.Op == OpSynced {
			synced = true
		}
		ended = err == nil
		stopped = !emit(ev)
		return !stopped
	})
	return synced, ended && !stopped
}

// A tracker knows the state of one supervised source: the last complete set,
// and the set that the running watch is still putting together. It has no lock
// and no clock; its owner, one goroutine, has them.
type tracker struct {
	current *snapshot // complete, and live unless next is set; nil before the first
	next    *snapshot // of a watch that is not synced yet; nil if there is none

	syncTimeout time.Duration
	began       time.Time // when next was started, or last found empty
}

// start begins a watch.
func (t *tracker) start(now time.Time) {
	t.next = newSnapshot()
	t.began = now
}

// fail ends a watch that another will follow. What it had not completed is
// forgotten.
func (t *tracker) fail() { t.next = nil }

// promote makes the set of the running watch the current one.
func (t *tracker) promote() {
	if t.next != nil {
		t.current, t.next = t.next, nil
	}
}

// apply applies a change other than Synced. It reports whether the change
// touches the current set, and returns an error, having done nothing, if the
// change is not a valid one.
func (t *tracker) apply(c Change) (live bool, err error) {
	set := t.next
	if set == nil {
		set, live = t.current, true
	}
	switch c.Op {
	case OpInsert:
		if err := checkEndpoint(c.Endpoint); err != nil {
			return false, fmt.Errorf("ignored %v(%q): %w", c.Op, c.Key, err)
		}
		set.insert(c.Key, c.Endpoint)
	case OpRemove:
		set.remove(c.Key)
	case OpServiceConfig:
		set.serviceConfig = c.ServiceConfig
	default:
		return false, fmt.Errorf("ignored a Change with unknown Op %d", c.Op)
	}
	return live, nil
}

// deadline returns when the running watch is due to be synced, or the zero
// time.
func (t *tracker) deadline() time.Time {
	if t.next == nil {
		return time.Time{}
	}
	return t.began.Add(t.syncTimeout)
}

// expire is called at the deadline. It takes a watch that inserted something
// for synced. One that did not gets as long again; that is an error if there is
// no earlier set to go by.
func (t *tracker) expire(now time.Time) (promoted bool, err error) {
	if len(t.next.entries) > 0 {
		t.promote()
		return true, nil
	}
	t.began = now
	if t.current == nil {
		return false, fmt.Errorf("the source has delivered no endpoints within %v", t.syncTimeout)
	}
	return false, nil
}
