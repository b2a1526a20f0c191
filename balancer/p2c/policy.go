// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/base"
	"google.golang.org/grpc/balancer/pickfirst"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"

	"github.com/belfry-go/belfry/internal/childpolicy"
	"github.com/belfry-go/belfry/internal/seldom"
	"github.com/belfry-go/belfry/internal/simenv"
	"github.com/belfry-go/belfry/internal/slab"
	"github.com/belfry-go/belfry/limit"
	"github.com/belfry-go/belfry/load"
)

// Name is the name of the policy in a service config.
const Name = "belfry.p2c"

var logger = grpclog.Component("belfry-p2c")

func init() { balancer.Register(builder{}) }

type builder struct{}

func (builder) Name() string { return Name }

func (builder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	return parseConfig(js)
}

func (builder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	start := time.Now()
	b := &policy{
		cc:   cc,
		opts: opts,
		//lint:ignore SA1019 the text that grpc.ClientConn.Target returns; the options have it parsed
		target:    cc.Target(),
		id:        identities.Add(1),
		children:  balancer.Get(pickfirst.Name),
		endpoints: resolver.NewEndpointMap[*endpoint](),
		now:       func() int64 { return int64(time.Since(start)) },
		random:    rand.Uint64,
		after: func(d time.Duration, f func()) func() {
			t := time.AfterFunc(d, f)
			return func() { t.Stop() }
		},
		reports: orca.RegisterOOBListener,
	}
	b.ramps.parts = 1
	b.watcher, _ = cc.(childpolicy.Watcher)
	b.queue.ready = &b.ready
	b.picks.New = func() any {
		k := &pick{pool: &b.picks}
		k.handle.pick, k.handle.done = k, k.handle.onDone
		return k
	}
	b.handles.New = func() any {
		h := &handle{pool: &b.handles}
		h.done = h.onDone
		return h
	}
	return b
}

// countedStates are the states in which an endpoint can be, in the order in
// which the best of them is the state of the channel.
var countedStates = []connectivity.State{
	connectivity.Ready, connectivity.Connecting, connectivity.Idle, connectivity.TransientFailure,
}

// policy is the balancer of one channel: a petiole with a pick_first child for
// each endpoint.
//
// It does not use grpc's endpointsharding, which collects all children again when
// one of them changes, so that N endpoints that become READY cost N² there. Here a
// change costs the same whatever the number of endpoints. The READY ones are in a
// set that the picker shares and that changes in place. The picker itself is
// published again only when the state of the channel changes, or when an endpoint
// leaves READY, because gRPC lets a call that picked such an endpoint wait for the
// next picker.
type policy struct {
	// Immutable.
	cc       balancer.ClientConn
	opts     balancer.BuildOptions
	target   string // of the channel. With id it identifies the calls of the policy.
	id       uint64
	children balancer.Builder
	watcher  childpolicy.Watcher // nil if the parent does not watch

	// Safe for concurrent use.
	putAsides, returns, ejections seldom.Log // limit how often these are logged
	picks                         sync.Pool  // of *pick
	handles                       sync.Pool  // of *handle, for trackers
	queue                         queue      // of calls that wait for an endpoint with room

	// Used only by the methods of balancer.Balancer, whose calls are serialized.
	endpoints  *resolver.EndpointMap[*endpoint]
	list       []listing              // of the last update
	refused    []*endpoint            // whose children returned an error in the last update
	received   *attributes.Attributes // of the last update
	attributes *attributes.Attributes // received, as the children get them; nil before the first
	metric     load.Metric
	updated    bool                // whether an update was received
	started    bool                // whether the resolver has listed an endpoint
	recalled   map[string]*measure // kept from an earlier policy; nil after the first endpoints are made

	// Set before the first endpoint is made.
	now       func() int64
	random    func() uint64
	after     func(d time.Duration, f func()) (stop func())
	wallClock func(limit.Instant) time.Time // nil for the machine's
	metrics   *metrics
	reports   func(balancer.SubConn, orca.OOBListener, orca.OOBListenerOptions) (stop func())

	outOfBand atomic.Int64 // the interval of reports out of band, in nanoseconds; 0 for none

	warned atomic.Bool // whether the warning about streams without a tracker was logged

	// conn is the channel; nil before the first pick for a call with a tracker.
	conn atomic.Pointer[grpc.ClientConn]

	offers    atomic.Pointer[offer] // the endpoints that calls are to try, a linked list
	slowAfter atomic.Int64          // from when on an attempt is slow, in nanoseconds; 0 if not known

	// countMu guards rotated and the counts of all endpoints, for snapshots. Nothing is
	// locked under it.
	countMu sync.Mutex
	rotated time.Time // the start of the time over which shares are counted

	// all is the endpoints of the last update. The slice is not changed.
	all atomic.Pointer[[]*endpoint]

	// mu guards the fields below, those of endpoint that say so, and writing to
	// the READY set.
	//
	// Lock order: endpoint.childMu, mu, then the locks of cc. A child reports its
	// state from within any call to it, so no child is called with mu held.
	//
	// An update from the channel sets inhibit, unlocks mu, calls the children one
	// by one, and at the end publishes once. Meanwhile the reports of children change
	// their endpoint and the READY set, but nothing is published.
	mu         sync.Mutex
	inhibit    bool
	closed     bool
	picker     *picker // the current config's
	ready      readySet
	candidates slab.Slab[candidate]
	count      [connectivity.Shutdown + 1]int
	home       string             // the caller's zone, "" if zones do not count
	homes      int                // how many endpoints are in it
	homesWell  int                // how many of these are well
	published  connectivity.State // the last state given to cc; SHUTDOWN before the first
	seating    seating
	grace      grace
	ramps      ramps
	measuring  bool // whether a timer for measureMedian is set
}

// UpdateClientConnState implements balancer.Balancer.
func (b *policy) UpdateClientConnState(ccs balancer.ClientConnState) error {
	cfg, ok := ccs.BalancerConfig.(*config)
	if !ok {
		return fmt.Errorf("%s: received config of type %T, must be what the policy parsed", Name, ccs.BalancerConfig)
	}
	if logger.V(2) {
		logger.Infof("[%p] received update with %d endpoints", b, len(ccs.ResolverState.Endpoints))
	}
	if !b.updated {
		b.firstUpdate(ccs.ResolverState)
	}
	b.recallMeters(cfg, ccs.ResolverState.Endpoints)
	if err := b.configure(cfg); err != nil {
		return err
	}
	for _, ep := range b.endpoints.All() {
		if ep.setConnections(cfg) {
			b.attributes = nil // makes updateEndpoints update all children
		}
	}
	b.setHome(cfg.zones.homeOf(ccs.ResolverState))
	err := b.updateEndpoints(ccs.ResolverState)
	b.forgetRecalled()

	b.mu.Lock()
	defer b.mu.Unlock()
	b.inhibit = false
	b.publishLocked()
	return err
}

func (b *policy) firstUpdate(state resolver.State) {
	b.updated = true
	b.published = connectivity.Shutdown
	b.metrics = newMetrics(b.cc.MetricsRecorder(), b.opts.Target.String(), state)
	if e := simenv.From(state.Attributes); e != nil {
		b.now, b.random = e.Now, e.Uint64
		if e.AfterFunc != nil {
			b.after = e.AfterFunc
		}
		if e.Reports != nil {
			b.reports = e.Reports
		}
		b.wallClock = func(at limit.Instant) time.Time { return time.Unix(0, int64(at)) }
	}
	live.Store(b, nil)
}

// configure applies a config to the existing endpoints, and sets inhibit. The meters are
// kept unless the metric is of another kind.
func (b *policy) configure(cfg *config) error {
	fresh := b.metric == nil || !cfg.metric.adopt(b.metric)
	if fresh {
		metric, err := cfg.metric.build()
		if err != nil {
			return err
		}
		b.metric = metric
	}

	b.outOfBand.Store(int64(cfg.outOfBand))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inhibit = true
	old := b.picker
	b.picker = &picker{policy: b, config: cfg, metric: b.metric, ready: &b.ready}
	if old != nil {
		b.picker.remember(old)
	}
	if fresh {
		for _, ep := range b.endpoints.All() {
			ep.measureLocked(b.picker, b.metric)
		}
	}
	if old == nil || !reflect.DeepEqual(old.config.limit, cfg.limit) || old.config.connections != cfg.connections {
		for _, ep := range b.endpoints.All() {
			ep.limitLocked(cfg.limit)
		}
		b.queue.dismiss(false)
	}
	if old != nil && !reflect.DeepEqual(old.config.accrual, cfg.accrual) {
		for _, ep := range b.endpoints.All() {
			ep.accrueLocked(cfg.accrual)
			b.seatLocked(ep)
		}
	}
	if cfg.accrual != nil && cfg.accrual.slow > 0 && !b.measuring {
		b.measuring = true
		b.after(measureEvery, b.measureMedian)
	}
	b.stepRampsLocked()
	return nil
}

// ResolverError implements balancer.Balancer. Without any endpoint calls fail with the
// error. Otherwise the children get it, and those ignore it that have not failed.
func (b *policy) ResolverError(err error) {
	if b.endpoints.Len() == 0 {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.cc.UpdateState(balancer.State{
			ConnectivityState: connectivity.TransientFailure,
			// Not wrapped: if the error of a picker has a status, gRPC ends all calls with
			// it, also calls that wait for READY.
			Picker: base.NewErrPicker(fmt.Errorf("name resolver error: %v", err)),
		})
		b.published = connectivity.TransientFailure
		return
	}
	b.forAll(func(ep *endpoint) { ep.call(func() { ep.child.ResolverError(err) }) })
}

// UpdateSubConnState implements balancer.Balancer. It is never called: SubConns
// belong to the children, which listen to them.
func (b *policy) UpdateSubConnState(sc balancer.SubConn, s balancer.SubConnState) {
	logger.Errorf("[%p] UpdateSubConnState(%v, %+v) called unexpectedly", b, sc, s)
}

// ExitIdle implements balancer.Balancer.
func (b *policy) ExitIdle() {
	b.forAll(func(ep *endpoint) { ep.call(func() { ep.child.ExitIdle() }) })
}

// Close implements balancer.Balancer. It does not end attempts in flight. Their Done
// finds its meter through the pick.
func (b *policy) Close() {
	b.mu.Lock()
	b.inhibit, b.closed = true, true
	b.grace.endLocked()
	b.mu.Unlock()
	b.queue.dismiss(true)
	live.Delete(b)
	b.keepMeters()
	for _, ep := range b.endpoints.All() {
		ep.close(b.opts.ChannelzParent != nil)
	}
}

// forAll calls f for each endpoint and publishes once.
func (b *policy) forAll(f func(*endpoint)) {
	b.mu.Lock()
	b.inhibit = true
	b.mu.Unlock()
	for _, ep := range b.endpoints.All() {
		f(ep)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.inhibit = false
	b.publishLocked()
}

// stateLocked returns the state of the channel: the best state of an endpoint, or
// CONNECTING in a grace period.
func (b *policy) stateLocked() connectivity.State {
	if b.inGraceLocked() {
		return connectivity.Connecting
	}
	if b.count[connectivity.Ready] == 0 && b.seating.seated[ejected] && b.seating.count[ejected] > 0 {
		return connectivity.Ready // Ejected endpoints are used.
	}
	for _, s := range countedStates {
		if b.count[s] > 0 {
			return s
		}
	}
	return connectivity.TransientFailure
}

// publishLocked gives cc the state and the picker. Calls that wait for a picker then pick
// again.
func (b *policy) publishLocked() {
	if b.closed || b.picker == nil {
		return
	}
	state := b.stateLocked()
	s := balancer.State{ConnectivityState: state}
	switch all := b.all.Load(); {
	case state == connectivity.Ready:
		s.Picker = b.picker
	case all == nil || len(*all) == 0:
		s.Picker = base.NewErrPicker(errNoEndpoints)
	default:
		s.Picker = &fallbackPicker{endpoints: *all, state: state}
	}
	b.published = state
	b.cc.UpdateState(s)
	if state != connectivity.Ready {
		b.queue.dismiss(false)
	}
}

// reportLocked publishes if the state of the channel has changed, or if wake is set because
// a call may wait that must pick again.
func (b *policy) reportLocked(wake bool) {
	if !b.inhibit && (wake || b.stateLocked() != b.published) {
		b.publishLocked()
	}
}
