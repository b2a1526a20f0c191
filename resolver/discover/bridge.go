// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/belfry-go/belfry/internal/place"
)

var logger = grpclog.Component("belfry-discover")

const (
	// Changes after the first set wait until none has come for coalesceQuiet,
	// and at most coalesceMax, because every update costs the channel a new
	// picker, and a roll-out of a hundred servers is two hundred changes. A server
	// takes seconds to start, so milliseconds more do not matter.
	coalesceQuiet = 5 * time.Millisecond
	coalesceMax   = 50 * time.Millisecond

	// reportEvery is the least time between two errors reported to the channel.
	reportEvery = time.Second

	// closeGrace is how long a source may run after its context has ended before
	// that is logged.
	closeGrace = 5 * time.Second

	// restlessUpdates is the number of updates in a row that change the attributes
	// of a key's addresses before that is logged.
	restlessUpdates = 3
)

// bridge is the resolver of one channel, from Build to Close. It watches the
// source and publishes the sets.
//
// It has two goroutines and no mutex. The first, watch, runs the source and sends
// its events to the second. The second, loop, owns the state and calls the
// channel. Such a call may be slow, and may call the bridge: no lock is held, and
// the source waits.
type bridge struct {
	// Immutable after build.
	name            string
	cc              resolver.ClientConn
	cfg             *config
	noServiceConfig bool
	cancel          context.CancelFunc
	nudge           chan struct{} // capacity 1
	events          chan watchEvent
	watchDone       chan struct{}

	failing atomic.Pointer[SourceState] // how the watch failed; nil if it goes well

	// Owned by loop.

	source     follower
	dirtySince time.Time // of the first change not published yet; zero if there is none
	flushAt    time.Time // when it will be; zero if dirtySince is
	fault      error     // the first in the data since the last flush
	faults     int       // how many there were

	set        publishedSet
	differs    bool                       // set differs from what was published
	published  bool                       // there was a first set
	kept       []keyedEndpoint            // as published, if set is empty and that is not; or nil
	parsed     *serviceconfig.ParseResult // as last published
	flushed    string                     // the service config of the source at the last flush
	configJSON string                     // parsed last, with the result in config, good or bad
	config     *serviceconfig.ParseResult

	reportAt time.Time // when the next error may be reported; zero: now
	held     error     // the last that came before that
	holding  int       // how many have

	rejections int       // in a row, of published sets by the balancing policy
	nudgeAt    time.Time // when to ask the source to look again after one; zero: not

	proxied        bool           // gRPC puts proxies in the place of endpoints; not logged yet
	namesTold      bool           // of endpoints that differ in the server name only
	attributesTold bool           // of attributes that compare unequal again and again
	restless       map[string]int // updates in a row that changed the attributes of a key's addresses
}

// newBridge starts to watch. It does not block.
func newBridge(src Source, target resolver.Target, cc resolver.ClientConn, opts resolver.BuildOptions, cfg *config) *bridge {
	check := checkDialable
	if opts.Dialer != nil {
		check = checkEndpoint // What an address means is the dialer's business.
	}
	ctx, cancel := context.WithCancel(context.Background())
	b := &bridge{
		name:            target.String(),
		cc:              cc,
		cfg:             cfg,
		noServiceConfig: opts.DisableServiceConfig,
		cancel:          cancel,
		nudge:           make(chan struct{}, 1),
		events:          make(chan watchEvent),
		watchDone:       make(chan struct{}),
		source:          follow(src, check, cfg.syncTimeout, 0),
		set:             newPublishedSet(),
		proxied:         isDelegating(cc),
	}
	live.Store(b, nil)
	context.AfterFunc(ctx, func() {
		live.Delete(b)
		b.expectEnd()
	})
	go b.watch(ctx, src)
	go b.loop(ctx)
	return b
}

// ResolveNow sends the source a nudge. It does nothing if one is pending.
func (b *bridge) ResolveNow(resolver.ResolveNowOptions) {
	select {
	case b.nudge <- struct{}{}:
	default:
	}
}

// Close stops the watch. It does not wait for it, because gRPC blocks the calls of
// the channel meanwhile. The channel ignores an update that is in progress.
func (b *bridge) Close() { b.cancel() }

// expectEnd waits for the source to end, and logs an error if it does not end
// within closeGrace. It is called after Close.
func (b *bridge) expectEnd() {
	t := time.NewTimer(closeGrace)
	defer t.Stop()
	select {
	case <-b.watchDone:
	case <-t.C:
		logger.Errorf("%s: the source has not stopped %v after its context was cancelled; its goroutine is left behind", b.name, closeGrace)
	}
}

func (b *bridge) watch(ctx context.Context, src Source) {
	defer close(b.watchDone)
	env := watchEnv{nudge: b.nudge, backoff: b.cfg.backoff, syncTimeout: b.cfg.syncTimeout}
	supervise(env.context(ctx), src, b.cfg.backoff, func(ev watchEvent) bool {
		select {
		case b.events <- ev:
			return true
		case <-ctx.Done():
			return false
		}
	})
}

func (b *bridge) loop(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		at := earliest(b.flushAt, b.source.deadline(), b.nudgeAt)
		if b.held != nil {
			at = earliest(at, b.reportAt)
		}
		if at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return
		case ev := <-b.events:
			if ctx.Err() == nil {
				now := time.Now()
				b.hear(b.source.handle(ev, now), now)
			}
		case <-timer.C:
			if ctx.Err() == nil {
				b.tick(time.Now())
			}
		}
	}
}

// hear reports the errors of the source. It publishes a set that is complete at
// once, and plans to publish other changes.
func (b *bridge) hear(n news, now time.Time) {
	b.note(n, now)
	if n.err != nil {
		b.report(n.err, now)
	}
	for _, f := range n.faults {
		if b.faults++; b.fault == nil {
			b.fault = f.err
		}
	}
	switch set := b.source.set; {
	case n.synced || n.err != nil && b.faults > 0 && set == nil:
		b.flush(now)
	case set != nil && (len(b.source.dirty) > 0 || b.faults > 0 || set.serviceConfig != b.flushed):
		if b.dirtySince.IsZero() {
			b.dirtySince = now
		}
		b.flushAt = earliest(now.Add(coalesceQuiet), b.dirtySince.Add(coalesceMax))
	}
}

func (b *bridge) tick(now time.Time) {
	if b.held != nil && due(b.reportAt, now) {
		err := b.held
		if b.holding > 1 {
			err = fmt.Errorf("%w (and %d more errors)", err, b.holding-1)
		}
		b.held, b.holding = nil, 0
		b.report(err, now)
	}
	if due(b.source.deadline(), now) {
		b.hear(b.source.expire(now), now)
	}
	if due(b.flushAt, now) {
		b.flush(now)
	}
	if due(b.nudgeAt, now) {
		b.nudgeAt = time.Time{}
		b.ResolveNow(resolver.ResolveNowOptions{})
	}
}

// report reports an error to the channel, or holds it until reportEvery has
// passed since the last report. The channel keeps its set if it has one.
// Otherwise calls fail with the error from now on, instead of waiting.
func (b *bridge) report(err error, now time.Time) {
	if now.Before(b.reportAt) {
		b.held = err
		b.holding++
		return
	}
	b.reportAt = now.Add(reportEvery)
	err = fmt.Errorf("discover: watching %s: %w", b.name, err)
	logger.Warning(err)
	b.cc.ReportError(err)
}

// reportFaults reports the faults in the data to the channel. It is called after
// a set is published, so that calls do not fail if the rest of the data is good.
func (b *bridge) reportFaults(now time.Time) {
	switch {
	case b.faults == 1:
		b.report(b.fault, now)
	case b.faults > 1:
		b.report(fmt.Errorf("%w (and %d more faults)", b.fault, b.faults-1), now)
	}
	b.fault, b.faults = nil, 0
}

// flush publishes the current set, if there is one that the channel does not have
// yet. Then it reports the faults.
func (b *bridge) flush(now time.Time) {
	b.dirtySince, b.flushAt = time.Time{}, time.Time{}
	if set := b.source.set; set != nil {
		before := b.set.items
		changed, replaced := b.set.update(b.source.dirty, set.entries)
		b.differs = b.differs || changed
		b.warnOfNames(set)
		b.warnOfAttributes(replaced)
		b.source.clean()
		b.flushed = set.serviceConfig
		b.keep(set, before)
		items := b.set.items
		if b.kept != nil {
			items = b.kept
		}
		parsed, badConfig := b.parse(set.serviceConfig)
		first := !b.published && (len(items) > 0 || len(set.refused) == 0)
		// A set that was rejected is published again, because the policy or its config
		// may have changed since.
		if first || b.published && (b.differs || b.rejections > 0 || parsed != b.parsed) {
			b.publish(items, parsed, now)
		}
		if badConfig != nil {
			b.report(badConfig, now)
		}
	}
	b.reportFaults(now)
}

// keep sets kept to before, the old items, if the set has become empty and must
// not be published so. It clears kept when that has ended. It sets differs to
// match.
func (b *bridge) keep(set *snapshot, before []keyedEndpoint) {
	// If endpoints were refused the set is not really empty: they exist but cannot
	// be used.
	keeps := len(b.set.items) == 0 && (b.cfg.keepOnEmpty || len(set.refused) > 0)
	switch {
	case keeps && b.kept == nil && len(before) > 0:
		logger.Warningf("%s: the set of endpoints became empty; keeping the last one of %d", b.name, len(before))
		b.kept = before
	case !keeps && b.kept != nil:
		b.differs = !slices.EqualFunc(b.set.items, b.kept, equalKeyed)
		b.kept = nil
	}
	b.differs = b.differs && b.kept == nil
}

func (b *bridge) publish(items []keyedEndpoint, parsed *serviceconfig.ParseResult, now time.Time) {
	// It must not be nil, even if it is empty: gRPC would use Addresses instead.
	endpoints := make([]resolver.Endpoint, len(items))
	for i, it := range items {
		endpoints[i] = it.endpoint
	}
	b.warnOfProxy(endpoints)
	if logger.V(2) {
		logger.Infof("%s: publishing %d endpoints", b.name, len(endpoints))
	}
	state := resolver.State{Endpoints: endpoints, ServiceConfig: parsed}
	if b.cfg.addresses {
		state.Addresses = addressesOf(endpoints)
	}
	if b.cfg.home != "" {
		state = place.SetHome(state, b.cfg.home)
	}
	b.published, b.differs, b.parsed = true, false, parsed
	err := b.cc.UpdateState(state)
	if err == nil {
		b.rejections, b.nudgeAt = 0, time.Time{}
		return
	}
	// Every policy rejects an empty set. A source that is not told of changes must
	// then look again.
	b.rejections++
	b.nudgeAt = now.Add(retryDelay(b.cfg.backoff, b.rejections))
	if len(items) > 0 {
		logger.Warningf("%s: the channel rejected a set of %d endpoints: %v", b.name, len(items), err)
	}
}

// parse returns the service config to publish, or nil if there is none. If json
// does not parse it returns the config published last, and, the first time, an
// error.
func (b *bridge) parse(json string) (*serviceconfig.ParseResult, error) {
	if json == "" || b.noServiceConfig {
		return nil, nil
	}
	var complaint error
	if json != b.configJSON {
		b.configJSON, b.config = json, b.cc.ParseServiceConfig(json)
		if b.config != nil && b.config.Err != nil {
			complaint = fmt.Errorf("ignored a service config, keeping the one before: %w", b.config.Err)
		}
	}
	if b.config != nil && b.config.Err != nil {
		return b.parsed, complaint
	}
	return b.config, nil
}

// addressesOf lists all addresses, for policies that do not read endpoints. It
// puts the attributes of an endpoint into BalancerAttributes, from which gRPC
// takes them when it makes endpoints out of addresses.
func addressesOf(endpoints []resolver.Endpoint) []resolver.Address {
	var addrs []resolver.Address
	for _, ep := range endpoints {
		for _, a := range ep.Addresses {
			//lint:ignore SA1019 deprecated inside an endpoint only, and this one is not
			a.BalancerAttributes = ep.Attributes
			addrs = append(addrs, a)
		}
	}
	return addrs
}

// isDelegating reports whether cc belongs to the resolver that gRPC puts
// between the bridge and the channel when there is a proxy for the target. Its
// type is not exported.
func isDelegating(cc resolver.ClientConn) bool {
	t := reflect.TypeOf(cc)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.PkgPath() == "google.golang.org/grpc/internal/resolver/delegatingresolver"
}

// warnOfProxy logs, once, that gRPC replaces the endpoints by the proxy. It looks
// at the first two endpoints only, because two are enough to lose something.
func (b *bridge) warnOfProxy(endpoints []resolver.Endpoint) {
	if !b.proxied || len(endpoints) < 2 {
		return
	}
	var proxy *url.URL
	for _, ep := range endpoints[:2] {
		var err error
		proxy, err = http.ProxyFromEnvironment(&http.Request{URL: &url.URL{Scheme: "https", Host: ep.Addresses[0].Addr}})
		if err != nil || proxy == nil {
			return
		}
	}
	b.proxied = false
	logger.Errorf("%s: gRPC sends every endpoint through the proxy %s, which makes them one endpoint without attributes to the balancing policy; dial with grpc.WithNoProxy(), or list them in NO_PROXY", b.name, proxy.Redacted())
}

// warnOfNames logs, once, that endpoints differ in the server name only, so that
// gRPC uses just one of them.
func (b *bridge) warnOfNames(set *snapshot) {
	if b.namesTold {
		return
	}
	if seen, unseen, ok := b.set.hidden(b.source.dirty, set.entries); ok {
		b.namesTold = true
		logger.Errorf("%s: endpoints %q and %q have the same address, %s, and differ in the server name only (%s, %s): gRPC takes them for one, and only the first is used; give each server name a connection of its own", b.name, KeyOf(seen), KeyOf(unseen), addressID(seen), serverNames(seen), serverNames(unseen))
	}
}

// warnOfAttributes logs, once, that attributes cause needless updates, or that
// they break the connections of an endpoint in every update.
func (b *bridge) warnOfAttributes(replaced []replacement) {
	if b.attributesTold || len(replaced) == 0 {
		return
	}
	for _, r := range replaced[:min(len(replaced), 16)] {
		if reflect.DeepEqual(r.before, r.after) {
			b.attributesTold = true
			logger.Errorf("%s: the attributes of endpoint %q compare as different although they hold the same, so that every set looks like a change, and breaks connections if they are an address's: give the type of the value a method Equal(any) bool, as google.golang.org/grpc/attributes says", b.name, KeyOf(r.after))
			return
		}
	}
	restless := make(map[string]int)
	for _, r := range replaced {
		if addressID(r.before) != addressID(r.after) || equalAddresses(r.before.Addresses, r.after.Addresses) {
			continue
		}
		k := KeyOf(r.after)
		if restless[k] = b.restless[k] + 1; restless[k] == restlessUpdates {
			b.attributesTold, b.restless = true, nil
			logger.Errorf("%s: %d updates in a row changed the attributes of the addresses of endpoint %q, and each time its connection is made anew: put what changes into the attributes of the endpoint, not of its addresses", b.name, restlessUpdates, k)
			return
		}
	}
	b.restless = restless
}
