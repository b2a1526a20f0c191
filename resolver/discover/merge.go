// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/grpc/resolver"
)

// Merge returns a source of the endpoints of all the sources together. Keys
// are those of the sources behind the index of the source and a slash
// ("0/a", "1/a"; "00/a" if there are more than ten), so that equal keys do not
// meet, and of two sources with the same address the first wins, its attributes
// included. Of several service configs the one of the first source that has one
// holds.
//
// The set is complete when all the sources' are, each by its own [Synced]. A
// source that fails is reported, and watched again with the backoff of
// [WithBackoff], while its last set stays and the others go on. One that has no
// set yet, and fails or takes longer than [WithSyncTimeout], does not hold back
// the first set of the others, unless that would be empty. The merged source
// ends when all of them have ended.
//
// It returns an error if there are no sources or one is nil. It may be used by
// as many channels as the sources may.
func Merge(sources ...Source) (Source, error) {
	if len(sources) == 0 {
		return nil, errors.New("discover: Merge: no sources")
	}
	for i, src := range sources {
		if src == nil {
			return nil, fmt.Errorf("discover: Merge: source %d is nil", i)
		}
	}
	return merged(slices.Clone(sources)), nil
}

// merged is immutable.
type merged []Source

// Watch implements [Source].
func (m merged) Watch(ctx context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		env := watchEnvOf(ctx)
		w := mergeWatch{ctx: ctx, yield: yield, sources: make([]mergeSource, len(m)), running: len(m)}
		events := make(chan mergeEvent)
		nudges := make([]chan struct{}, len(m))
		digits := len(strconv.Itoa(len(m) - 1)) // the order of the keys is that of the sources
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		for i, src := range m {
			w.sources[i].prefix = fmt.Sprintf("%0*d/", digits, i)
			w.sources[i].set.syncTimeout = env.syncTimeout
			nudges[i] = make(chan struct{}, 1)
			below := env
			below.nudge = nudges[i]
			wg.Go(func() {
				supervise(below.context(ctx), src, env.backoff, func(ev watchEvent) bool {
					select {
					case events <- mergeEvent{source: i, watchEvent: ev}:
						return true
					case <-ctx.Done():
						return false
					}
				})
			})
		}
		if env.nudge != nil {
			wg.Go(func() { spread(ctx, env.nudge, nudges) })
		}
		w.run(events)
	}
}

// spread passes every nudge on to all.
func spread(ctx context.Context, nudge <-chan struct{}, all []chan struct{}) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-nudge:
		}
		for _, n := range all {
			select {
			case n <- struct{}{}:
			default:
			}
		}
	}
}

type mergeEvent struct {
	source int
	watchEvent
}

// mergeWatch is one watch of a merged source. Its methods report false when the
// consumer wants no more.
type mergeWatch struct {
	ctx     context.Context
	yield   func(Change, error) bool
	sources []mergeSource
	running int // sources that have not ended
	synced  bool

	serviceConfig string // as last yielded
}

// mergeSource is the state of one of the sources.
type mergeSource struct {
	prefix  string // of its keys
	set     tracker
	told    map[string]resolver.Endpoint // what has been yielded of the current set, under its own keys
	failing bool                         // it has failed, or was late, before its first set
}

func (w *mergeWatch) run(events <-chan mergeEvent) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for w.running > 0 {
		var at time.Time
		for i := range w.sources {
			at = earliest(at, w.sources[i].set.deadline())
		}
		if at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		ok := true
		select {
		case <-w.ctx.Done():
			return
		case ev := <-events:
			ok = w.handle(ev, time.Now())
		case <-timer.C:
			ok = w.tick(time.Now())
		}
		if !ok || w.ctx.Err() != nil {
			return
		}
	}
}

func (w *mergeWatch) handle(ev mergeEvent, now time.Time) bool {
	s := &w.sources[ev.source]
	switch ev.kind {
	case eventStart:
		s.set.start(now)
	case eventChange:
		if ev.change.Op == OpSynced {
			s.set.promote()
			return w.settle(ev.source)
		}
		live, err := s.set.apply(ev.change)
		if err != nil {
			// Whoever watches us will find the same fault, and knows better when
			// it is time to speak of it.
			ev.change.Key = s.prefix + ev.change.Key
			return w.yield(ev.change, nil)
		}
		if live {
			return w.pass(ev.source, ev.change)
		}
	case eventError:
		return w.fail(ev.source, ev.err)
	case eventFailed:
		s.set.fail()
	case eventEnd:
		s.set.promote()
		w.running--
		return w.settle(ev.source)
	}
	return true
}

func (w *mergeWatch) tick(now time.Time) bool {
	for i := range w.sources {
		s := &w.sources[i]
		if !due(s.set.deadline(), now) {
			continue
		}
		promoted, err := s.set.expire(now)
		if promoted && !w.settle(i) || err != nil && !w.fail(i, err) {
			return false
		}
	}
	return true
}

// fail yields the error of a source, and stops waiting for its first set.
func (w *mergeWatch) fail(source int, err error) bool {
	if !w.yield(Change{}, fmt.Errorf("source %d of %d: %w", source, len(w.sources), err)) {
		return false
	}
	w.sources[source].failing = true
	return w.synced || w.complete()
}

// pass yields a change of a source's current set.
func (w *mergeWatch) pass(source int, c Change) bool {
	s := &w.sources[source]
	switch c.Op {
	case OpInsert:
		s.told[c.Key] = s.set.current.entries[c.Key].endpoint
	case OpRemove:
		if _, ok := s.told[c.Key]; !ok {
			return true
		}
		delete(s.told, c.Key)
	case OpServiceConfig:
		return w.configure()
	}
	c.Key = s.prefix + c.Key
	return w.yield(c, nil)
}

// configure yields the service config if it is another now.
func (w *mergeWatch) configure() bool {
	config := ""
	for i := range w.sources {
		if current := w.sources[i].set.current; current != nil && current.serviceConfig != "" {
			config = current.serviceConfig
			break
		}
	}
	if config == w.serviceConfig {
		return true
	}
	w.serviceConfig = config
	return w.yield(ServiceConfig(config), nil)
}

// settle yields what the newly completed set of a source changes, and Synced if
// the merged set is complete with it.
func (w *mergeWatch) settle(source int) bool {
	s := &w.sources[source]
	set := make(map[string]resolver.Endpoint, len(s.set.current.entries))
	for k, e := range s.set.current.entries {
		set[k] = e.endpoint
	}
	ok := diff(s.told, set, func(c Change, err error) bool {
		c.Key = s.prefix + c.Key
		return w.yield(c, err)
	})
	s.told = set
	if !ok || !w.configure() {
		return false
	}
	return w.complete()
}

// complete yields Synced if the merged set is complete.
func (w *mergeWatch) complete() bool {
	if !w.synced {
		endpoints, missing := 0, false
		for i := range w.sources {
			switch s := &w.sources[i]; {
			case s.set.current != nil:
				endpoints += len(s.told)
			case s.failing:
				missing = true
			default:
				return true
			}
		}
		if missing && endpoints == 0 {
			return true
		}
		w.synced = true
	}
	return w.yield(Synced(), nil)
}
