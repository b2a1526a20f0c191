// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"cmp"
	"fmt"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/connectivity"

	"github.com/belfry-go/belfry/limit"
	"github.com/belfry-go/belfry/load"
)

// A Snapshot is what a policy knows of its endpoints at one moment.
type Snapshot struct {
	// Target is the target of the channel, as it was given to grpc.NewClient.
	Target string
	// CanonicalTarget is the target with its scheme, as metrics name it.
	CanonicalTarget string
	// Channel is how channelz and the log of gRPC name the channel, such as "Channel #3".
	Channel string
	// Locality is the locality whose endpoints the policy balances, if a parent policy
	// divides the endpoints by locality, else "".
	Locality string
	// State is the state that the policy reports to the channel.
	State connectivity.State
	// Picks is the number of attempts that the policy has sent to the endpoints that are
	// listed now.
	Picks uint64
	// Home is the caller's zone, "" if it is not known or the config has no zones.
	// PrefersHome is whether its endpoints are preferred now. See the field zones of the
	// config.
	Home        string
	PrefersHome bool
	// Waiting is the number of calls that wait for an endpoint with room. See the fields
	// endpointLimit and maxConnectionsPerSubchannel of the config.
	Waiting int
	// Panic is whether so many endpoints are put aside that all are used. See the field
	// failureAccrual of the config.
	Panic bool
	// Endpoints are in the order in which the resolver lists them.
	Endpoints []EndpointSnapshot
}

// An EndpointSnapshot is what a policy knows of an endpoint.
type EndpointSnapshot struct {
	// Addresses are those of the endpoint, the preferred one first. They must not be
	// changed.
	Addresses []string
	// State is the state of the connection, or TRANSIENT_FAILURE if a health check or an
	// outlier detector has ejected the endpoint. Only READY endpoints get calls, and with
	// useEjected also ejected ones if no other is left.
	State connectivity.State
	// Err says why the state is TRANSIENT_FAILURE, and is nil in other states.
	Err error
	// Weight is the relative capacity, at least 1. For an endpoint that is listed several
	// times it is the sum of the weights.
	Weight uint32
	// Zone is where the endpoint is, "" if discovery does not say.
	Zone string
	// InFlight is the number of attempts in flight, open streams not counted.
	InFlight int
	// Streams is the number of open streams: those that have had a response.
	Streams int
	// Limit is how many attempts and open streams together may be in flight, 0 if there
	// is no limit. Algorithm is the state of the algorithm that finds the limit, zero if
	// the limit is fixed.
	Limit     int64
	Algorithm limit.State
	// Connections is the number of READY connections. See the field
	// maxConnectionsPerSubchannel of the config.
	Connections int
	// Load is what one more attempt costs, according to the metric. It is at least 0, in the
	// unit of the metric: nanoseconds for expectedLatency and peakEwma, attempts for
	// pendingRequests, none for constant.
	Load float64
	// Latency is how long the metric expects a call to take if nothing else is in flight.
	// Samples is the number of latencies from which that follows; a latency that is half
	// forgotten counts as half. Both are 0 for a metric that does not measure them.
	Latency time.Duration
	Samples float64
	// Picks is the number of attempts that were sent to the endpoint since it was listed.
	Picks uint64
	// Share is the part of the policy's recent picks that the endpoint got, from 0 to 1. It
	// covers the last 1 to 2 seconds if snapshots are taken often, else the time since the
	// snapshot before, or since the policy began.
	Share float64
	// Failures is the number of attempts that failed. LastFailure is the error of the last
	// one that was noted, nil if there was none, and FailedAt its time. A failure within
	// 100 ms after a noted one is not noted.
	Failures    uint64
	LastFailure error
	FailedAt    time.Time
	// AsideUntil is when a call may try an endpoint that is put aside. It is zero for other
	// endpoints. In a panic an endpoint that is put aside gets calls before that time too.
	AsideUntil time.Time
	// AsideWhy is why the endpoint is put aside, "" if it is not.
	AsideWhy string
	// Draining is whether discovery says that the endpoint is about to leave.
	Draining bool
	// ShareAllowed is the part of its share of the calls that the endpoint may get now, from
	// 0.01 to 1. It is below 1 only during a slow start.
	ShareAllowed float64
	// PassedOver says why calls go to other endpoints now.
	PassedOver PassedOver
}

// Condition returns the state of the endpoint for a report: ASIDE for a READY endpoint that
// failure accrual has put aside, DRAINING for one that is about to leave, else State.
func (e *EndpointSnapshot) Condition() string {
	switch {
	case e.State != connectivity.Ready:
		return e.State.String()
	case !e.AsideUntil.IsZero():
		return "ASIDE"
	case e.Draining:
		return "DRAINING"
	}
	return e.State.String()
}

// PassedOver says why calls go to other endpoints. It is "" for an endpoint that may be picked.
type PassedOver string

const (
	// NotReady is an endpoint without a connection, or one that is ejected.
	NotReady PassedOver = "not READY"
	// Aside is an endpoint that is put aside because it failed or was slow.
	Aside PassedOver = "put aside"
	// Draining is an endpoint that is about to leave.
	Draining PassedOver = "draining"
	// OnlyFailed is an endpoint that has answered nothing yet, but failed.
	OnlyFailed PassedOver = "all attempts have failed"
	// Full is an endpoint with as many attempts and streams as its Limit, or the streams of
	// its Connections, allow.
	Full PassedOver = "full"
	// CostsMore is an endpoint whose Load is above that of the cheapest by more than the
	// metric's error.
	CostsMore PassedOver = "costs more"
	// Away is an endpoint outside the caller's zone, while an endpoint at home is cheaper than
	// all others, whose costs are multiplied by awayCost.
	Away PassedOver = "in another zone"
	// MoreInFlight is an endpoint with more attempts in flight than another of equal cost.
	MoreInFlight PassedOver = "more in flight"
)

// live is the set of the policies that had an update and are not closed: *policy → nil.
var live sync.Map

// Snapshots returns a snapshot of every policy belfry.p2c in the process, in the order of
// their targets. A channel has no policy before its first call or Connect, and while it is
// idle. It has several if a parent policy divides the endpoints, such as by locality.
//
// Snapshots delays calls and updates only for short. It may be called each second: it takes
// some 4 ms and 2.6 MB for 10,000 endpoints (BenchmarkSnapshot). It is safe for concurrent
// use.
func Snapshots() []Snapshot { return snapshots(func(*policy) bool { return true }) }

// SnapshotsOf returns the snapshots of the policies of a channel. See [Snapshots].
//
// If the channel has no [DialOptions], or has made no call since it was idle, only its
// target is known. Then the snapshots are those of all such channels with the same target.
func SnapshotsOf(conn *grpc.ClientConn) []Snapshot {
	return snapshots(func(b *policy) bool {
		if c := b.conn.Load(); c != nil {
			return c == conn
		}
		return b.target == conn.Target()
	})
}

func snapshots(of func(*policy) bool) []Snapshot {
	var policies []*policy
	live.Range(func(k, _ any) bool {
		if b := k.(*policy); of(b) {
			policies = append(policies, b)
		}
		return true
	})
	slices.SortFunc(policies, func(a, b *policy) int { return cmp.Or(cmp.Compare(a.target, b.target), cmp.Compare(a.id, b.id)) })
	var all []Snapshot
	for _, b := range policies {
		all = append(all, b.snapshot())
	}
	return all
}

// counts is the picks of an endpoint, as snapshots count them.
type counts struct {
	seen  uint32 // candidate.picks at the last snapshot
	picks uint64 // all picks; candidate.picks has only 32 bits
	last  uint64 // picks at policy.rotated
	prior uint64 // picks at the rotation before that one
}

// shareAfter is the shortest time between two rotations of counts.
const shareAfter = time.Second

func (b *policy) snapshot() Snapshot {
	b.mu.Lock()
	p := b.picker
	s := Snapshot{Target: b.target, CanonicalTarget: b.opts.Target.String(), Locality: b.metrics.locality, State: b.published, Home: b.home, PrefersHome: b.ready.home.Load() > 0}
	if c, ok := b.opts.ChannelzParent.(fmt.Stringer); ok {
		s.Channel = c.String()
	}
	s.Panic = b.seating.seated[aside] && b.seating.count[aside] > 0
	eps := b.all.Load()
	now, wall := load.Instant(b.now()), time.Now()
	if eps != nil {
		s.Endpoints = make([]EndpointSnapshot, len(*eps))
		for i, ep := range *eps {
			e := &s.Endpoints[i]
			e.Zone, e.Weight, e.Draining, e.ShareAllowed = ep.zone, ep.weight, ep.draining, ep.partLocked()
			if a := ep.accrual(); a != nil && a.aside.Load() {
				e.AsideWhy = a.why
				e.AsideUntil = wall.Add(time.Duration(a.until - int64(now)))
			}
		}
	}
	b.mu.Unlock()
	s.Waiting = int(b.queue.waiting.Load())
	if p == nil || eps == nil || len(*eps) == 0 {
		return s
	}
	estimates := make([]load.Estimate, len(*eps))

	away := func(i int) bool { return s.PrefersHome && s.Endpoints[i].Zone != s.Home }
	cost := func(i int) float64 {
		if away(i) {
			return float64(p.awayCost(float32(s.Endpoints[i].Load)))
		}
		return s.Endpoints[i].Load
	}
	least, leastQueue := -1, 0.0
	for i, ep := range *eps {
		e, c := &s.Endpoints[i], ep.candidate
		reported := ep.reported.Load()
		m := c.meter.Load()
		q := c.query(p, now, 0)
		details := m.Inspect(q)
		estimates[i] = m.Load(q)
		e.Addresses = ep.addresses
		e.State = reported.ConnectivityState
		e.InFlight, e.Streams = q.InFlight, q.Streams
		e.Load = estimates[i].Cost
		e.Latency, e.Samples = details.Latency, details.Samples
		e.Failures = m.room.failures.Load()
		e.Limit, e.Algorithm = m.room.state()
		if conns := m.room.connections.Load(); conns != nil {
			e.Connections = conns.ready()
		} else if e.State == connectivity.Ready {
			e.Connections = 1
		}
		if f := m.room.failure.Load(); f != nil {
			e.LastFailure, e.FailedAt = f.err, wall.Add(time.Duration(f.at-now))
		}
		if e.State == connectivity.TransientFailure {
			_, e.Err = reported.Picker.Pick(balancer.PickInfo{})
		}
		seated := c.slot.Load() != notReady
		switch {
		case !seated && e.State == connectivity.Ready && e.Draining:
			e.PassedOver = Draining
		case !seated && e.State == connectivity.Ready && !e.AsideUntil.IsZero():
			e.PassedOver = Aside
		case !seated:
			e.PassedOver = NotReady
		case !c.hasRoom():
			e.PassedOver = Full
		case m.onlyFailed():
			e.PassedOver = OnlyFailed
		case least < 0 || cost(i) < cost(least):
			least = i
		}
	}
	equal := func(i int) bool {
		within := min(estimates[i].Error, float64(p.config.equalUnderLoad))
		return s.Endpoints[i].PassedOver == "" && away(i) == away(least) && cost(i) <= cost(least)*(1+within)
	}
	if least >= 0 {
		leastQueue = estimates[least].Queue
		for i := range estimates {
			if equal(i) {
				leastQueue = min(leastQueue, estimates[i].Queue)
			}
		}
	}
	for i := range s.Endpoints {
		switch e := &s.Endpoints[i]; {
		case e.PassedOver != "":
		case away(i) && !away(least):
			e.PassedOver = Away
		case !equal(i):
			e.PassedOver = CostsMore
		case estimates[i].Queue > leastQueue:
			e.PassedOver = MoreInFlight
		}
	}
	b.countPicks(&s, *eps, wall)
	return s
}

// countPicks sets the picks and shares of a snapshot.
func (b *policy) countPicks(s *Snapshot, eps []*endpoint, now time.Time) {
	b.countMu.Lock()
	defer b.countMu.Unlock()
	rotate := now.Sub(b.rotated) >= shareAfter
	if rotate {
		b.rotated = now
	}
	var recent uint64
	for i, ep := range eps {
		k := &ep.counts
		picks := ep.candidate.picks()
		if d := int32(picks - k.seen); d > 0 { // negative if picked has not added a lap yet
			k.picks += uint64(d)
			k.seen = picks
		}
		if rotate {
			k.prior, k.last = k.last, k.picks
		}
		s.Endpoints[i].Picks = k.picks
		s.Picks += k.picks
		recent += k.picks - k.prior
	}
	for i, ep := range eps {
		if recent > 0 {
			s.Endpoints[i].Share = float64(ep.counts.picks-ep.counts.prior) / float64(recent)
		}
	}
}
