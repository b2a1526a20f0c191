// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package sim

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	orcapb "github.com/cncf/xds/go/xds/data/orca/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/balancer/randomsubsetting"
	_ "google.golang.org/grpc/balancer/roundrobin" // registers round_robin
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	"github.com/belfry-go/belfry/balancer/aperture"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/place"
	"github.com/belfry-go/belfry/internal/simenv"
	"github.com/belfry-go/belfry/internal/test/lbtest"
)

// A Policy decides which server a call goes to.
type Policy struct {
	Name string // of the column
	// Balancer is the name of a policy in grpc's registry, empty for the oracle.
	Balancer string
	// Config is JSON, in which $ordinal is the number of the client, and $peers how many
	// there are.
	Config string
}

// Policies returns the policies that can be compared: the oracle, then belfry's
// by metric, then what does not look at load at all. All are determined by the
// seed but round_robin, which is grpc's own and begins at an endpoint of its
// choice.
//
// reports is the default with reports that servers send with their replies, and outOfBand has
// them ten times a second from each server as well.
//
// neverAside is the default that puts no endpoints aside that fail, and slowStart the one that
// lets the share of newcomers rise over five seconds.
//
// first is the first version of the default, for which a stream was in flight until its end.
//
// zones is the default with a preference for the zone of the client.
//
// aperture and random_subsetting are the default among 12 servers or more for each client.
// The latter is not determined by the seed.
//
// peakEwma-30ms differs from peakEwma in what it takes a newcomer for: a
// latency of 1 s that is forgotten in 10 s keeps one of 10 ms starved for most of
// a minute. Tower's metric has no default for it, and its example has 30 ms.
func Policies() []Policy {
	return []Policy{
		{Name: "oracle"},
		{"default", p2c.Name, `{}`},
		{"neverAside", p2c.Name, `{"failureAccrual":{"failures":0,"successRate":0}}`},
		{"slowStart", p2c.Name, `{"slowStart":{"window":"5s"}}`},
		{"reports", p2c.Name, `{"load":{"expectedLatency":{"reports":{}}}}`},
		{"outOfBand", p2c.Name, `{"load":{"expectedLatency":{"reports":{"outOfBand":"0.1s"}}}}`},
		{"zones", p2c.Name, `{"zones":{}}`},
		{"aperture", aperture.Name, `{"ordinal":$ordinal,"peers":$peers}`},
		{"random_subsetting", randomsubsetting.Name, `{"subsetSize":12,"childPolicy":[{"belfry.p2c":{}}]}`},
		{"peakEwma", p2c.Name, `{"load":{"peakEwma":{}}}`},
		{"peakEwma-30ms", p2c.Name, `{"load":{"peakEwma":{"defaultRtt":"0.03s"}}}`},
		{"pendingRequests", p2c.Name, `{"load":{"pendingRequests":{}}}`},
		{"first", p2c.Name, first},
		{"default-2-0", p2c.Name, `{"choiceCount":2,"memory":0}`},
		{"default-2-1", p2c.Name, `{"choiceCount":2,"memory":1}`},
		{"default-5-3", p2c.Name, `{"choiceCount":5,"memory":3}`},
		{"random", p2c.Name, `{"load":{"constant":{}}}`},
		{"round_robin", "round_robin", `{}`},
	}
}

// first is the first version of the default: strictly the least cost, one mean for
// all methods, no bound on a sample, and no exploring.
const first = `{"equalAtRest":0,"equalUnderLoad":0,"equalTime":"0s","exploreEvery":0,
	"load":{"expectedLatency":{"forgetRounds":32,"spreadPrior":0,"sampleLimit":1e6,"streamAgeLimit":20,"maxMethods":0}}}`

// chooser is a policy at work in a client.
type chooser interface {
	// choose returns the server that the call is to be sent to.
	choose(*call) (*server, error)
	// finished says that the call has ended for the client, and how.
	finished(*call, error)
	// update says that the list of servers has changed.
	update() error
	close()
}

type doneFunc = func(balancer.DoneInfo)

// balanced is a real policy of grpc's, on a channel without a network. Its
// connections are READY as soon as it wants them.
type balanced struct {
	cluster  *cluster
	channel  *lbtest.Channel
	balancer balancer.Balancer
	state    balancer.ClientConnState // without the endpoints
	picker   balancer.Picker
	reports  bool // servers send reports with their replies
	report   orcapb.OrcaLoadReport

	untold bool             // streams are calls that do not end
	conn   *grpc.ClientConn // to open streams with the dial options of p2c; nil before the first
	picked balancer.PickResult
}

// newBalanced returns the policy of a client.
func newBalanced(c *cluster, p Policy, client int) (*balanced, error) {
	builder := balancer.Get(p.Balancer)
	if builder == nil {
		return nil, fmt.Errorf("unknown policy %q", p.Balancer)
	}
	b := &balanced{
		cluster: c,
		channel: &lbtest.Channel{},
		reports: strings.Contains(p.Config, `"reports"`),
		untold:  p.Config == first,
	}
	b.report.NamedMetrics = make(map[string]float64)
	b.state.ResolverState = simenv.Set(resolver.State{}, &simenv.Env{
		Now:    func() int64 { return c.now },
		Uint64: c.choice.Uint64,
		AfterFunc: func(d time.Duration, f func()) func() {
			stopped := false
			c.agenda.Add(c.now+int64(d), action(func() {
				if !stopped {
					f()
				}
			}))
			return func() { stopped = true }
		},
		Reports: b.listen,
	})
	b.state.ResolverState = place.SetHome(b.state.ResolverState, zoneName(client%len(c.zones)))
	if parser, ok := builder.(balancer.ConfigParser); ok {
		config := strings.NewReplacer("$ordinal", fmt.Sprint(client), "$peers", fmt.Sprint(c.scenario.Clients)).Replace(p.Config)
		cfg, err := parser.ParseConfig(json.RawMessage(config))
		if err != nil {
			return nil, err
		}
		b.state.BalancerConfig = cfg
	}
	b.balancer = builder.Build(b.channel, balancer.BuildOptions{})
	if err := b.update(); err != nil {
		b.close()
		return nil, err
	}
	return b, nil
}

func (b *balanced) update() error {
	state := b.state
	state.ResolverState.Endpoints = make([]resolver.Endpoint, len(b.cluster.servers))
	for i, s := range b.cluster.servers {
		e := resolver.Endpoint{Addresses: []resolver.Address{{Addr: s.addr}}}
		e = place.SetZone(e, zoneName(s.zone))
		state.ResolverState.Endpoints[i] = weight.Set(e, weight.EndpointInfo{Weight: s.weight})
	}
	if err := b.balancer.UpdateClientConnState(state); err != nil {
		return err
	}
	b.channel.Drain()
	published, _ := b.channel.State()
	if published.ConnectivityState != connectivity.Ready {
		return fmt.Errorf("the channel is %v, must be READY", published.ConnectivityState)
	}
	b.picker = published.Picker
	return nil
}

// listen hands the reports of a server to the policy, as grpc's producer does.
func (b *balanced) listen(sc balancer.SubConn, l orca.OOBListener, o orca.OOBListenerOptions) (stop func()) {
	c, s := b.cluster, b.cluster.byAddr[sc.(*lbtest.SubConn).Address.Addr]
	stopped := false
	var next func()
	next = func() {
		if stopped {
			return
		}
		requests := len(s.running) + s.waiting.Len()
		if s.behaviour != silent {
			c.after(c.scenario.transit(), func() {
				if !stopped {
					l.OnLoadReport(&orcapb.OrcaLoadReport{NamedMetrics: map[string]float64{"belfry.in_flight": float64(requests)}})
				}
			})
		}
		c.after(o.ReportInterval, next)
	}
	// Each connection was made at another time.
	c.after(time.Duration(c.choice.Int64N(int64(o.ReportInterval))), next)
	return func() { stopped = true }
}

func zoneName(zone int) string { return fmt.Sprintf("zone-%d", zone) }

func (b *balanced) close() {
	if b.conn != nil {
		b.conn.Close()
	}
	b.balancer.Close()
	b.channel.Drain()
}

// callContext is the context of a call, which ends with its deadline alone.
type callContext struct {
	context.Context
	call *call
}

func (c *callContext) Err() error {
	if c.call.over {
		return context.DeadlineExceeded
	}
	return nil
}

func (b *balanced) choose(c *call) (*server, error) {
	if c.stream && !b.untold {
		return b.open(c)
	}
	c.context = callContext{context.Background(), c}
	r, err := b.picker.Pick(balancer.PickInfo{FullMethodName: c.method, Ctx: &c.context})
	if err != nil {
		return nil, fmt.Errorf("pick: %w", err)
	}
	c.done = r.Done
	return b.server(r), nil
}

func (b *balanced) server(r balancer.PickResult) *server {
	return b.cluster.byAddr[r.SubConn.(*lbtest.SubConn).Address.Addr]
}

// open opens a stream through the real interceptors, on a channel that they do not use.
func (b *balanced) open(c *call) (*server, error) {
	if b.conn == nil {
		var err error
		b.conn, err = grpc.NewClient(b.channel.Target(), append(p2c.DialOptions(),
			grpc.WithChainStreamInterceptor(b.pick),
			grpc.WithResolvers(manual.NewBuilderWithScheme("test")),
			grpc.WithTransportCredentials(insecure.NewCredentials()))...)
		if err != nil {
			return nil, err
		}
	}
	var err error
	c.opened, err = b.conn.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, c.method)
	if err != nil {
		return nil, fmt.Errorf("pick of a stream: %w", err)
	}
	return b.server(b.picked), nil
}

// pick is the innermost interceptor of streams. What comes after it is the network.
func (b *balanced) pick(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, method string, _ grpc.Streamer, _ ...grpc.CallOption) (s grpc.ClientStream, err error) {
	b.picked, err = b.picker.Pick(balancer.PickInfo{FullMethodName: method, Ctx: ctx})
	return stream{}, err
}

// stream is a stream that is read only when its response has arrived.
type stream struct{ grpc.ClientStream }

func (stream) Header() (metadata.MD, error) { return metadata.MD{}, nil }

func (stream) RecvMsg(any) error { return nil }

func (b *balanced) finished(c *call, err error) {
	switch {
	case c.opened != nil:
		_ = c.opened.RecvMsg(nil) // as stream does
		return
	case c.done == nil, c.stream:
		return
	}
	info := balancer.DoneInfo{Err: err, BytesSent: true, BytesReceived: !c.lost}
	if b.reports && err == nil {
		b.report.NamedMetrics["belfry.in_flight"] = float64(c.requests)
		info.ServerLoad = &b.report
	}
	c.done(info)
}
