// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/told"
	"github.com/belfry-go/belfry/resolver/discover"
)

const (
	// readEvery is how often all keys are read again, less up to a tenth.
	readEvery = time.Minute
	// timeout is how long etcd may take to answer.
	timeout = 5 * time.Second
	// minDelay and maxDelay bound the time between two tries after a failure.
	minDelay = 500 * time.Millisecond
	maxDelay = 10 * time.Second
)

// New returns a source of the endpoints that are registered under target, in the
// layout that the package documentation shows.
//
// It returns an error if client is nil, or if target is empty or ends with a
// slash. The source may be used by any number of channels, each of which watches
// etcd separately. Do not close the client before the channels.
func New(client *clientv3.Client, target string) (discover.Source, error) {
	if err := check(client, target); err != nil {
		return nil, err
	}
	return source{client, target + "/", readEvery, timeout}, nil
}

func check(client *clientv3.Client, target string) error {
	switch {
	case client == nil:
		return errors.New("etcd: the client is nil")
	case target == "":
		return errors.New("etcd: the target is empty: must be a prefix of keys, such as services/orders")
	case strings.HasSuffix(target, "/"):
		return fmt.Errorf("etcd: target %q: must not end with a slash", target)
	}
	return nil
}

// source is immutable.
type source struct {
	client             *clientv3.Client
	prefix             string
	readEvery, timeout time.Duration // the constants, but in tests
}

// Watch implements [discover.Source].
func (s source) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		w := watch{source: s, yield: yield, stop: cancel, known: make(map[string]struct{})}
		w.run(ctx)
	}
}

// watch is one watch of a source. It belongs to one goroutine.
type watch struct {
	source
	yield func(discover.Change, error) bool
	stop  context.CancelFunc

	known  map[string]struct{} // the keys that have an endpoint
	synced bool
	told   told.Errors // since the last read without one
}

// run reads all keys, watches them until it is time to read again, and repeats
// that until ctx is done.
func (w *watch) run(ctx context.Context) {
	for failures := 0; ctx.Err() == nil; {
		began := time.Now()
		revision, err := w.read(ctx)
		if err == nil {
			err = w.follow(ctx, revision+1)
		}
		if time.Since(began) > maxDelay {
			failures = 0
		}
		if err != nil {
			w.report(ctx, err)
			sleep(ctx, delay(failures))
			failures++
		}
	}
}

// read yields the set as it is now, and returns its revision in etcd.
func (w *watch) read(ctx context.Context) (revision int64, err error) {
	got, err := w.get(clientv3.WithRequireLeader(ctx))
	if err != nil {
		if !w.synced {
			// A member that is cut off from the majority still has a set, which may
			// be old.
			if got, err := w.get(ctx, clientv3.WithSerializable()); err == nil {
				_ = w.replace(ctx, got)
			}
		}
		return 0, err
	}
	switch err := w.replace(ctx, got); {
	case err == nil:
		w.told.Forget()
	case !w.synced:
		return 0, err
	default:
		w.report(ctx, err)
	}
	return got.Header.Revision, nil
}

func (s source) get(ctx context.Context, opts ...clientv3.OpOption) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	got, err := s.client.Get(ctx, s.prefix, append(opts, clientv3.WithPrefix())...)
	if err != nil {
		return nil, fmt.Errorf("etcd: reading %q: %w", s.prefix, err)
	}
	return got, nil
}

// replace yields the set in got. It returns an error if a value is not valid.
func (w *watch) replace(ctx context.Context, got *clientv3.GetResponse) error {
	var changes []discover.Change
	var bad faults
	found := make(map[string]struct{}, len(got.Kvs))
	for _, kv := range got.Kvs {
		key := strings.TrimPrefix(string(kv.Key), w.prefix)
		found[key] = struct{}{}
		w.put(key, kv.Value, &changes, &bad)
	}
	for key := range w.known {
		if _, ok := found[key]; !ok {
			w.remove(key, &changes)
		}
	}
	// If there are values but none is valid, the set is not empty but unknown.
	if len(w.known) > 0 || bad.n == 0 {
		w.synced = true
		w.tell(ctx, append(changes, discover.Synced()))
	}
	return bad.err()
}

// follow yields the changes from a revision on. It returns nil when it is time to
// read all keys again.
func (w *watch) follow(ctx context.Context, revision int64) error {
	// Only the watch uses this context: events that have arrived are yielded even
	// after it has ended.
	watchCtx, cancel := context.WithTimeout(clientv3.WithRequireLeader(ctx), w.readEvery-rand.N(w.readEvery/10))
	defer cancel()
	for got := range w.client.Watch(watchCtx, w.prefix, clientv3.WithPrefix(), clientv3.WithRev(revision)) {
		if got.CompactRevision != 0 {
			return nil // The revisions from here on are gone.
		}
		if err := got.Err(); err != nil && watchCtx.Err() == nil {
			return fmt.Errorf("etcd: watching %q: %w", w.prefix, err)
		}
		var changes []discover.Change
		var bad faults
		for _, e := range got.Events {
			key := strings.TrimPrefix(string(e.Kv.Key), w.prefix)
			if e.Type == clientv3.EventTypeDelete {
				w.remove(key, &changes)
			} else {
				w.put(key, e.Kv.Value, &changes, &bad)
			}
		}
		if len(changes) > 0 {
			w.tell(ctx, changes)
		}
		if err := bad.err(); err != nil {
			w.report(ctx, err)
		}
	}
	if watchCtx.Err() == nil {
		return fmt.Errorf("etcd: watching %q: the client has ended the watch", w.prefix)
	}
	return nil
}

// put adds the change that a value makes to changes, or its error to bad.
func (w *watch) put(key string, value []byte, changes *[]discover.Change, bad *faults) {
	ep, err := decode(value)
	if err != nil {
		bad.add(fmt.Errorf("etcd: key %q: %w", w.prefix+key, err))
		return
	}
	w.known[key] = struct{}{}
	*changes = append(*changes, discover.Insert(key, ep))
}

func (w *watch) remove(key string, changes *[]discover.Change) {
	if _, ok := w.known[key]; ok {
		delete(w.known, key)
		*changes = append(*changes, discover.Remove(key))
	}
}

func (w *watch) tell(ctx context.Context, changes []discover.Change) {
	if ctx.Err() == nil && !w.yield(discover.Batch(changes...), nil) {
		w.stop()
	}
}

// report yields an error, unless it was reported already.
func (w *watch) report(ctx context.Context, err error) {
	if ctx.Err() != nil || !w.told.First(err.Error()) {
		return
	}
	if !w.yield(discover.Change{}, err) {
		w.stop()
	}
}

// faults counts errors and keeps the first.
type faults struct {
	first error
	n     int
}

func (f *faults) add(err error) {
	if f.n++; f.n == 1 {
		f.first = err
	}
}

func (f *faults) err() error {
	if f.n > 1 {
		return fmt.Errorf("%w (and %d more keys)", f.first, f.n-1)
	}
	return f.first
}

// A record is the value of a key.
type record struct {
	Addr     string
	Metadata json.RawMessage
}

// metadata is what belfry reads and writes in the metadata of a record.
type metadata struct {
	Weight   *uint32 `json:"weight,omitempty"`
	Zone     string  `json:"zone,omitempty"`
	Group    uint32  `json:"group,omitempty"`
	Draining bool    `json:"draining,omitempty"`
}

func decode(value []byte) (resolver.Endpoint, error) {
	var r record
	if err := json.Unmarshal(value, &r); err != nil {
		return resolver.Endpoint{}, err
	}
	var m metadata
	if len(r.Metadata) > 0 && r.Metadata[0] == '{' {
		if err := json.Unmarshal(r.Metadata, &m); err != nil {
			return resolver.Endpoint{}, fmt.Errorf("metadata: %w", err)
		}
	}
	var opts []discover.EndpointOption
	if m.Weight != nil {
		opts = append(opts, discover.Weight(*m.Weight))
	}
	if m.Zone != "" {
		opts = append(opts, discover.Zone(m.Zone))
	}
	ep, err := discover.Endpoint(r.Addr, opts...)
	return discover.SetDraining(discover.SetGroup(ep, m.Group), m.Draining), err
}

// delay returns how long to wait after a failure. failures is the number of those
// before it in a row.
func delay(failures int) time.Duration {
	d := min(minDelay<<min(failures, 10), maxDelay)
	return d - rand.N(d/5)
}

func sleep(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
