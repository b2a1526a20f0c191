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
	"time"

	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
)

var logger = grpclog.Component("belfry-discover")

const (
	// Changes after the first set wait until none has come for coalesceQuiet,
	// and at most coalesceMax: every update costs the channel a new picker, and
	// a roll-out of a hundred servers comes as two hundred changes. Calls do
	// not notice a delay of milliseconds in what took seconds to start.
	coalesceQuiet = 5 * time.Millisecond
	coalesceMax   = 50 * time.Millisecond

	// closeGrace is how long Close waits for a source that does not heed its
	// context. gRPC waits for Close when a channel is closed or goes idle.
	closeGrace = 5 * time.Second
)

// bridge is the resolver of one channel, from one Build to the next: it watches
// the source and publishes the sets.
//
// It has two goroutines and no mutex. One, watch, is inside the source and
// passes on what it yields. The other, loop, owns the state and calls the
// channel, which may take its time, or call back: nothing is held meanwhile,
// and the source waits.
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
	loopDone        chan struct{}

	// Owned by loop.

	set        tracker
	dirtySince time.Time // of the first change not published yet; zero if there is none
	flushAt    time.Time // when it will be; zero if dirtySince is
	fault      error     // the first in the data since the last flush
	faults     int       // how many there were

	published  bool                       // there was a first set
	endpoints  []resolver.Endpoint        // as last published; nobody else's slice
	parsed     *serviceconfig.ParseResult // as last published
	configJSON string                     // parsed last, with the result in config, good or bad
	config     *serviceconfig.ParseResult

	rejections int       // in a row, of published sets by the balancing policy
	nudgeAt    time.Time // when to ask the source to look again after one; zero: not

	proxied bool // gRPC puts proxies in the place of endpoints; not logged yet
}

// newBridge starts to watch. It does not block.
func newBridge(src Source, target resolver.Target, cc resolver.ClientConn, opts resolver.BuildOptions, cfg *config) *bridge {
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
		loopDone:        make(chan struct{}),
		set:             tracker{syncTimeout: cfg.syncTimeout},
		proxied:         isDelegating(cc),
	}
	go b.watch(ctx, src)
	go b.loop(ctx)
	return b
}

// ResolveNow passes the hint on to the source, if it listens.
func (b *bridge) ResolveNow(resolver.ResolveNowOptions) {
	select {
	case b.nudge <- struct{}{}:
	default:
	}
}

// Close stops the watch and waits for it. Nothing is published afterwards.
func (b *bridge) Close() {
	b.cancel()
	<-b.loopDone
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
	defer close(b.loopDone)
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if at := earliest(b.flushAt, b.set.deadline(), b.nudgeAt); at.IsZero() {
			timer.Stop()
		} else {
			timer.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return
		case ev := <-b.events:
			if ctx.Err() == nil {
				b.handle(ev, time.Now())
			}
		case <-timer.C:
			if ctx.Err() == nil {
				b.tick(time.Now())
			}
		}
	}
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

func (b *bridge) handle(ev watchEvent, now time.Time) {
	switch ev.kind {
	case eventStart:
		b.set.start(now)
	case eventChange:
		if ev.change.Op == OpSynced {
			b.set.promote()
			b.flush(now)
			return
		}
		live, err := b.set.apply(ev.change)
		if err != nil {
			b.faults++
			if b.fault == nil {
				b.fault = err
			}
		}
		if live || err != nil && b.published {
			if b.dirtySince.IsZero() {
				b.dirtySince = now
			}
			b.flushAt = earliest(now.Add(coalesceQuiet), b.dirtySince.Add(coalesceMax))
		}
	case eventError:
		b.report(ev.err)
	case eventFailed:
		b.set.fail()
	case eventEnd:
		b.set.promote()
		b.flush(now)
	}
}

func (b *bridge) tick(now time.Time) {
	if due(b.set.deadline(), now) {
		promoted, err := b.set.expire(now)
		if promoted {
			logger.Warningf("%s: the source has not said Synced within %v; taking what it inserted for the set", b.name, b.set.syncTimeout)
			b.flush(now)
		} else if err != nil {
			b.report(err)
			b.reportFaults()
		}
	}
	if due(b.flushAt, now) {
		b.flush(now)
	}
	if due(b.nudgeAt, now) {
		b.nudgeAt = time.Time{}
		b.ResolveNow(resolver.ResolveNowOptions{})
	}
}

// report tells the channel of an error. It keeps its set if it has one;
// otherwise calls begin to fail with the error instead of waiting.
func (b *bridge) report(err error) {
	err = fmt.Errorf("discover: watching %s: %w", b.name, err)
	logger.Warning(err)
	b.cc.ReportError(err)
}

// reportFaults tells the channel of faults in the data. It must not make calls
// fail that the rest of the data would let pass, so it comes after a set.
func (b *bridge) reportFaults() {
	switch {
	case b.faults == 1:
		b.report(b.fault)
	case b.faults > 1:
		b.report(fmt.Errorf("%w (and %d more faults)", b.fault, b.faults-1))
	}
	b.fault, b.faults = nil, 0
}

// flush publishes the current set, if there is one and it is not what the
// channel has already.
func (b *bridge) flush(now time.Time) {
	b.dirtySince, b.flushAt = time.Time{}, time.Time{}
	set := b.set.current
	if set == nil {
		return
	}
	endpoints := set.endpoints()
	if b.cfg.keepOnEmpty && len(endpoints) == 0 && len(b.endpoints) > 0 {
		logger.Warningf("%s: the set of endpoints became empty; keeping the last one of %d", b.name, len(b.endpoints))
		endpoints = b.endpoints
	}
	parsed, badConfig := b.parse(set.serviceConfig)
	// A set that was rejected is offered again: by the time the source has
	// something to say the policy, or its config, may be another.
	if changed := b.take(endpoints); changed || !b.published || b.rejections > 0 || parsed != b.parsed {
		b.publish(endpoints, parsed, now)
	}
	if badConfig != nil {
		b.report(badConfig)
	}
	b.reportFaults()
}

// take makes the endpoints those that were published last, and reports whether they differ
// from the ones before. It writes only what differs.
func (b *bridge) take(endpoints []resolver.Endpoint) (changed bool) {
	if len(endpoints) != len(b.endpoints) {
		b.endpoints = slices.Clone(endpoints)
		return true
	}
	for i := range endpoints {
		if !equalEndpoints(endpoints[i], b.endpoints[i]) {
			b.endpoints[i], changed = endpoints[i], true
		}
	}
	return changed
}

func (b *bridge) publish(endpoints []resolver.Endpoint, parsed *serviceconfig.ParseResult, now time.Time) {
	b.warnOfProxy(endpoints)
	if logger.V(2) {
		logger.Infof("%s: publishing %d endpoints", b.name, len(endpoints))
	}
	state := resolver.State{Endpoints: slices.Clone(endpoints), ServiceConfig: parsed}
	if b.cfg.addresses {
		state.Addresses = addressesOf(endpoints)
	}
	b.published, b.parsed = true, parsed
	err := b.cc.UpdateState(state)
	if err == nil {
		b.rejections, b.nudgeAt = 0, time.Time{}
		return
	}
	// An empty set is rejected by every policy, and the only cure, for a source
	// that cannot tell by itself, is to look again.
	b.rejections++
	b.nudgeAt = now.Add(retryDelay(b.cfg.backoff, b.rejections))
	if len(endpoints) > 0 {
		logger.Warningf("%s: the channel rejected a set of %d endpoints: %v", b.name, len(endpoints), err)
	}
}

// parse returns the service config to publish: nil if there is none, and the
// one already published, with an error the first time, if json is bad.
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

// addressesOf lists all addresses for policies that know nothing of endpoints.
// The endpoint's attributes go where gRPC puts them when it goes the other way.
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
// between ours and the channel when there is a proxy for the target. It has no
// public name.
func isDelegating(cc resolver.ClientConn) bool {
	t := reflect.TypeOf(cc)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.PkgPath() == "google.golang.org/grpc/internal/resolver/delegatingresolver"
}

// warnOfProxy logs, once, that the endpoints will not arrive as such. Two that
// go through the proxy tell as much as all of them.
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
	logger.Warningf("%s: gRPC sends every endpoint through the proxy %s, which makes them one endpoint without attributes to the balancing policy; dial with grpc.WithNoProxy(), or list them in NO_PROXY", b.name, proxy.Redacted())
}
