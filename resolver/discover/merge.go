// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Merge returns a source of the endpoints of all the sources together. A key is
// the index of the source, a slash, and the key in that source: "0/a" and "1/a",
// or "00/a" if there are more than ten sources. So equal keys of two sources do
// not collide. If two sources have an endpoint with the same addresses, that of
// the first source is used, with its attributes. The service config is that of the
// first source that has one.
//
// The merged set is complete when the set of every source is. A source that fails
// is reported, and watched again with the backoff of [WithBackoff]. Its last set
// stays meanwhile, and the other sources continue. A source without a set that
// fails, or takes longer than [WithSyncTimeout], does not hold back the first
// merged set, unless that would be empty. The merged set is final when the set of
// every source is.
//
// Merge returns an error if there are no sources or one is nil. The source may be
// used by as many channels as each of the sources may.
func Merge(sources ...Source) (Source, error) {
	if len(sources) == 0 {
		return nil, errors.New("discover: Merge: no sources")
	}
	for i, src := range sources {
		if isnil.Value(src) {
			return nil, fmt.Errorf("discover: Merge: source %d is nil", i)
		}
	}
	m := make(merged, len(sources))
	digits := len(strconv.Itoa(len(m) - 1)) // The order of the keys is that of the sources.
	for i, src := range sources {
		m[i] = part{src: src, prefix: fmt.Sprintf("%0*d/", digits, i), name: fmt.Sprintf("source %d of %d: ", i, len(m))}
	}
	return m, nil
}

// merged is immutable. Each of its sources is supervised separately.
type merged []part

type part struct {
	src    Source
	prefix string        // of its keys
	name   string        // for its errors
	quiet  time.Duration // see Settle; 0: not settled
}

// Watch implements [Source].
func (m merged) Watch(ctx context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		env := watchEnvOf(ctx)
		w := mergeWatch{yield: yield, parts: make([]partWatch, len(m))}
		events := make(chan mergeEvent)
		nudges := make([]chan struct{}, len(m))
		var wg sync.WaitGroup
		defer wg.Wait()
		defer cancel()
		for i, p := range m {
			w.parts[i] = partWatch{part: p, follower: follow(p.src, checkEndpoint, env.syncTimeout, p.quiet)}
			nudges[i] = make(chan struct{}, 1)
			below := env
			below.nudge = nudges[i]
			wg.Go(func() {
				supervise(below.context(ctx), p.src, env.backoff, func(ev watchEvent) bool {
					select {
					case events <- mergeEvent{part: i, watchEvent: ev}:
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
		w.run(ctx, events)
	}
}

// spread sends every nudge to all sources.
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
	part int
	watchEvent
}

// mergeWatch is one watch of a merged source.
type mergeWatch struct {
	yield  func(Change, error) bool
	parts  []partWatch
	synced bool

	serviceConfig string // as last yielded
}

type partWatch struct {
	part
	follower
	final   bool
	failing bool // it has failed, or was late, before its first set
}

// run ends when all parts are final, ctx is done or yield returns false.
func (w *mergeWatch) run(ctx context.Context, events <-chan mergeEvent) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		var at time.Time
		for i := range w.parts {
			at = earliest(at, w.parts[i].deadline())
		}
		if at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		more := true
		select {
		case <-ctx.Done():
			return
		case ev := <-events:
			p := &w.parts[ev.part]
			more = w.tell(p, p.handle(ev.watchEvent, time.Now()))
		case <-timer.C:
			now := time.Now()
			for i := range w.parts {
				if p := &w.parts[i]; more && due(p.deadline(), now) {
					more = w.tell(p, p.expire(now))
				}
			}
		}
		if !more || ctx.Err() != nil {
			return
		}
	}
}

// tell yields the news of a part: an error first, if there is one, then all
// changes as one element. It reports false when the watch is over.
func (w *mergeWatch) tell(p *partWatch, n news) bool {
	p.final = p.final || n.final
	if n.err != nil {
		p.failing = true
		if !w.yield(Change{}, fmt.Errorf("%s%w", p.name, n.err)) {
			return false
		}
	}
	var changes []Change
	// The bridge finds the same faults in these changes, and reports them at the
	// right time.
	for _, f := range n.faults {
		f.change.Key = p.prefix + f.change.Key
		changes = append(changes, f.change)
	}
	for _, k := range slices.Sorted(maps.Keys(p.dirty)) {
		if e, ok := p.set.entries[k]; ok {
			changes = append(changes, Insert(p.prefix+k, e.endpoint))
		} else {
			changes = append(changes, Remove(p.prefix+k))
		}
	}
	p.clean()
	if config := w.config(); config != w.serviceConfig {
		w.serviceConfig = config
		changes = append(changes, ServiceConfig(config))
	}
	complete, final := w.complete()
	switch {
	case final:
		changes = append(changes, Final())
	case complete && (n.synced || !w.synced):
		changes = append(changes, Synced())
	}
	w.synced = w.synced || complete
	switch len(changes) {
	case 0:
		return true
	case 1:
		return w.yield(changes[0], nil) && !final
	}
	return w.yield(Batch(changes...), nil) && !final
}

// config returns the service config of the first part that has one.
func (w *mergeWatch) config() string {
	for i := range w.parts {
		if set := w.parts[i].set; set != nil && set.serviceConfig != "" {
			return set.serviceConfig
		}
	}
	return ""
}

// complete reports whether the merged set is complete, and whether it is final.
func (w *mergeWatch) complete() (complete, final bool) {
	endpoints, missing := 0, 0
	final = true
	for i := range w.parts {
		p := &w.parts[i]
		final = final && p.final
		switch {
		case p.set != nil:
			endpoints += len(p.set.entries)
		case p.failing:
			missing++
		default:
			return w.synced, false
		}
	}
	return w.synced || missing == 0 || endpoints > 0, final
}
