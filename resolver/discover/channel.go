// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"iter"
	"sync"

	"google.golang.org/grpc/resolver"
)

// Channel returns a source of the changes that are sent on ch, for a program
// that knows by itself which servers there are. Send [Synced] after the first
// set. Closing ch after that ends the source, and the set stays as it is. If ch
// is closed before Synced, every watch fails.
//
// The source remembers what it has received, so any number of gRPC channels may
// use it at once. Each sees the same set, from the start. A change that is not
// valid is ignored for all of them. Nothing else may receive from ch.
//
// Nothing is received while no gRPC channel watches: before the first call, and
// whenever all channels are idle or closed. Sends then block once ch is full. A
// program that must not block gives ch a buffer for the changes of that time, or
// dials with grpc.WithIdleTimeout(0) and calls Connect.
//
// It returns an error if ch is nil.
func Channel(ch <-chan Change) (Source, error) {
	if ch == nil {
		return nil, errors.New("discover: Channel: the channel is nil")
	}
	return &channelSource{
		ch:        ch,
		reading:   make(chan struct{}, 1),
		endpoints: make(map[string]resolver.Endpoint),
		watchers:  make(map[*channelWatcher]struct{}),
	}, nil
}

// channelSource has no goroutine of its own. Its watchers take turns to receive.
// The one that holds reading receives for all of them, in the order of the sends.
type channelSource struct {
	ch      <-chan Change
	reading chan struct{} // capacity 1; full while a watcher receives

	// mu guards the fields below and those of the watchers. It is held briefly:
	// nothing else is locked, received or yielded under it.
	mu            sync.Mutex
	endpoints     map[string]resolver.Endpoint
	serviceConfig string
	synced        bool
	final         bool
	closed        bool
	watchers      map[*channelWatcher]struct{}
}

// channelWatcher holds what one watch has not been told yet. However far the
// watch falls behind, each key is queued at most once.
type channelWatcher struct {
	wake chan struct{} // capacity 1

	keys          []string // whose state is to be told
	queued        map[string]struct{}
	serviceConfig bool
	synced        bool
	bad           *Change // one that was ignored
}

// Watch implements [Source].
func (s *channelSource) Watch(ctx context.Context) iter.Seq2[Change, error] {
	return func(yield func(Change, error) bool) {
		w := s.add()
		defer s.remove(w)
		// Start with the set as it is now, not as it was when the last watcher left.
		select {
		case s.reading <- struct{}{}:
			s.receiveReady()
			<-s.reading
		default:
		}
		for {
			changes, closed := s.take(w)
			if ctx.Err() != nil || len(changes) > 0 && !yield(Batch(changes...), nil) {
				return
			}
			if closed {
				yield(Change{}, errClosed)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-w.wake:
			case s.reading <- struct{}{}:
				ok := s.receive(ctx)
				<-s.reading
				if !ok {
					return
				}
			}
		}
	}
}

var errClosed = errors.New("the Go channel was closed before Synced")

// add adds a watcher that is to be told everything.
func (s *channelSource) add() *channelWatcher {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := &channelWatcher{
		wake:          make(chan struct{}, 1),
		queued:        make(map[string]struct{}, len(s.endpoints)),
		serviceConfig: s.serviceConfig != "",
		synced:        s.synced,
	}
	for k := range s.endpoints {
		w.queue(k)
	}
	s.watchers[w] = struct{}{}
	return w
}

func (s *channelSource) remove(w *channelWatcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.watchers, w)
}

// queue adds the key to those that the watch must be told of. Caller must hold
// the source's mu.
func (w *channelWatcher) queue(key string) {
	if _, ok := w.queued[key]; !ok {
		w.queued[key] = struct{}{}
		w.keys = append(w.keys, key)
	}
}

// take returns and forgets what w has not been told yet. It also reports whether
// the Go channel was closed before Synced.
func (s *channelSource) take(w *channelWatcher) (changes []Change, closed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range w.keys {
		if ep, ok := s.endpoints[k]; ok {
			changes = append(changes, Insert(k, ep))
		} else {
			changes = append(changes, Remove(k))
		}
	}
	if w.serviceConfig {
		changes = append(changes, ServiceConfig(s.serviceConfig))
	}
	if w.bad != nil {
		changes = append(changes, *w.bad)
	}
	switch {
	case s.final:
		changes = append(changes, Final())
	case w.synced:
		changes = append(changes, Synced())
	}
	w.keys, w.serviceConfig, w.synced, w.bad = nil, false, false, nil
	clear(w.queued)
	return changes, s.closed && !s.final
}

// receive waits for a change, and applies it and those that are ready after it.
// It reports false if ctx ended first. Caller must hold reading.
func (s *channelSource) receive(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case c, ok := <-s.ch:
		s.apply(c, ok)
		s.receiveReady()
		return true
	}
}

// receiveReady applies the changes that can be received without waiting. It
// stops after a bound, because a sender that never pauses would keep the watches
// from being told. Caller must hold reading.
func (s *channelSource) receiveReady() {
	for range 1024 {
		select {
		case c, ok := <-s.ch:
			s.apply(c, ok)
			if !ok {
				return
			}
		default:
			return
		}
	}
}

// apply applies a change, or the close of the Go channel if ok is false, and
// wakes the watchers.
func (s *channelSource) apply(c Change, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !ok {
		s.closed = true
		s.final = s.final || s.synced
	}
	for c := range c.All() {
		if ok {
			s.applyOneLocked(c)
		}
	}
	for w := range s.watchers {
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// applyOneLocked applies a change that is not a batch, and queues it for the
// watchers. Caller must hold s.mu.
func (s *channelSource) applyOneLocked(c Change) {
	tell := func(w *channelWatcher) { w.queue(c.Key) }
	switch c.Op {
	case OpInsert:
		if checkEndpoint(c.Endpoint) != nil {
			tell = func(w *channelWatcher) { w.bad = &c }
			break
		}
		s.endpoints[c.Key] = c.Endpoint
	case OpRemove:
		if _, known := s.endpoints[c.Key]; !known {
			return
		}
		delete(s.endpoints, c.Key)
	case OpServiceConfig:
		s.serviceConfig = c.ServiceConfig
		tell = func(w *channelWatcher) { w.serviceConfig = true }
	case OpSynced, OpFinal:
		s.synced, s.final = true, s.final || c.Op == OpFinal
		tell = func(w *channelWatcher) { w.synced = true }
	default:
		tell = func(w *channelWatcher) { w.bad = &c }
	}
	for w := range s.watchers {
		tell(w)
	}
}
