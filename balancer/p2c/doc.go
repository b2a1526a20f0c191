// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package p2c is the load-balancing policy belfry.p2c: every call goes to the
// endpoint that will likely answer soonest.
//
// A pick looks at a few READY endpoints, drawn at random, and takes the one with
// the least load: the power of d choices (Mitzenmacher, "The power of two choices
// in randomized load balancing", 2001). Package load defines what load is. The
// default, the expected latency, needs no tuning. Use the policy wherever you would
// use round_robin or least_request, and above all where servers are not equally
// fast, slow down at times, or fail.
//
// [DialOptions] select it, and show it what a picker cannot see:
//
//	conn, err := grpc.NewClient("example:///orders", append(p2c.DialOptions(),
//		grpc.WithTransportCredentials(insecure.NewCredentials()),
//		grpc.WithResolvers(discovery),
//	)...)
//
// To configure it, name it in the service config, which the resolver delivers or an
// option gives:
//
//	grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"choiceCount":4}}]}`)
//
// A program that does not use DialOptions must import the package, because the policy
// registers itself:
//
//	import _ "github.com/belfry-go/belfry/balancer/p2c"
//
// Without that import gRPC fails on a loadBalancingConfig that lists no other
// policy, and silently takes pick_first for the old loadBalancingPolicy field.
//
// # Config
//
// The config is the message belfry.config.v1.P2C in its JSON form. All fields are
// optional, and {} is the best default:
//
//	{"choiceCount": 2,                            // endpoints that a pick looks at: 2 to 16
//	 "memory": 0,                                 // best endpoints of the last pick, looked at too: 0 to 8
//	 "failureCodes": ["UNAVAILABLE", "INTERNAL"], // what counts as a failure of the endpoint
//	 "endpointLimit": {"fixed": 100},             // attempts in flight to each endpoint
//	 "load": {"peakEwma": {"decay": "10s"}}}      // expectedLatency, peakEwma, pendingRequests or constant
//
// The defaults of choiceCount and memory are 8 and 2 for expectedLatency, 12 and 8 for
// expectedLatency with reports, and 2 and 0 for the other metrics, as in Tower. While the
// channel has nothing in flight, a pick with a memory draws 4 endpoints at most. The
// default of failureCodes is UNKNOWN, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED,
// UNIMPLEMENTED, INTERNAL, UNAVAILABLE and DATA_LOSS. A value out of its range is an error
// that names field, value and rule. A load that names no known metric is an error too.
// Other unknown fields are ignored and logged. A new config takes effect at once. The
// meters keep what they know unless the kind of metric changes.
//
// The weight of an endpoint (google.golang.org/grpc/experimental/balancer/weight)
// is its share: endpoints are drawn in proportion to their weights, and attempts in
// flight count per weight. An endpoint of weight 2 gets about twice the calls of one
// of weight 1, with few calls in flight and with many.
//
// # Limits
//
// endpointLimit bounds the attempts in flight to each endpoint, open streams included. The
// bound is a fixed number, or what the algorithm Auto of package limit finds. Full endpoints
// are passed over. If all are full the call waits, first come first served, until its
// context ends. With [DialOptions] its stack may end the wait earlier: a load shed refuses
// the call with NOT_READY.
//
// With a limit for each endpoint a slow one does not collect calls where the metric does
// not see that it is slow, and does not use up a limit that all endpoints share. In a test
// ten endpoints are picked at random, and one becomes twenty times slower. Then 96 % of the
// calls succeed with a limit for each endpoint, and less than half with one limit for all
// (TestEndpointLimitOfOneSlowEndpoint in internal/acceptance).
//
// # Connections
//
// A server may bound how many streams a connection has at a time (the setting
// MAX_CONCURRENT_STREAMS of HTTP/2). In gRPC further calls wait where no policy sees them.
// With maxConnectionsPerSubchannel above 1, named as in gRFC A105, an endpoint gets another
// connection when the streams of its connections are used up:
//
//	{"maxConnectionsPerSubchannel": 4}
//
// The policy reads the setting from what the server sends, and counts the calls on each
// connection. So it knows how many streams are free. An endpoint without a free stream is
// full, and calls go to others. If all are full calls wait as with endpointLimit, but in any
// number. A connection without calls for 30 to 60 seconds is closed, unless it is the last.
//
// # Zones
//
// With zones the policy prefers endpoints in the caller's zone, home: endpoints elsewhere
// cost twice as much, and a pick draws four more endpoints from home. So calls stay at home
// while it has capacity, and only the calls that are too many leave:
//
//	{"zones": {"homeEnv": "ZONE"}}
//
// Discovery says where an endpoint is, and may say where the caller is. In simulation
// (internal/sim) at 70 % load 99 % of the calls stay at home, and 64 % without the setting.
// The p99 is lower, because fewer calls go to a distant zone. At 140 % of what a zone can
// do, 28 % of its calls leave. While fewer than half of the endpoints at home are well, all
// zones count alike. With the metric constant no call leaves because home is busy.
//
// # Endpoints
//
// Each endpoint is a pick_first child. It connects without waiting for a call, and
// connects again when it loses its connection. It may have several addresses. Client-side
// health checks and ejection by outlier_detection work. The policy may be the child of any
// other policy (outlier_detection, random_subsetting, weighted_target, priority), also
// through xDS by a TypedStruct of its name (gRFC A52).
//
// The set of its addresses identifies an endpoint. Its meter keeps what it knows as long
// as the resolver lists the endpoint, through reconnects, ejections and updates. gRPC
// closes the policy when the channel goes idle, by default after 30 minutes without a
// call. The meters are kept for ten minutes more, for up to 100,000 endpoints of all
// channels.
//
// A call that is repeated, by gRPC's own retryPolicy or by a layer of belfry, prefers
// other endpoints: an endpoint that the call was sent to before costs 10 times as much. So
// the call goes back to one of them only if the others are much busier, and only once.
//
// A server that fails an attempt may say when to try again, by the trailer
// grpc-retry-pushback-ms or a RetryInfo in its status. Until then, and for a minute at most,
// its endpoint costs 10 times as much.
//
// # Endpoints that fail
//
// By its metric an endpoint that fails costs more, and is tried again now and then. While
// all READY endpoints have only failed and others connect, the channel is CONNECTING and
// calls wait, for half a second at most. Otherwise an endpoint that fails at once, and is
// READY before the others, would get all calls until they are READY.
//
// By failureAccrual an endpoint that fails gets no calls at all for some time: it is put
// aside after five failures in a row, or when more than a fifth of its attempts in ten
// seconds fail. Then one call tries it. If that call fails, the endpoint stays aside for
// twice as long. These are the defaults:
//
//	{"failureAccrual": {"failures": 5, "successRate": 0.8, "baseTime": "3s", "maxAside": 0.5}}
//
// It is on by default because it makes nothing worse: in simulation no scenario's p99
// differs by 1 %. While one of ten servers fails at once for three seconds, five calls fail
// instead of dozens. With failures 0 and successRate 0 it is off.
//
// If more than half of the READY endpoints would be aside, all are used (a panic), because
// then they are likely to have a common fault.
//
// Outlier detection above the policy ejects endpoints by other rules, and the two work
// together. An ejected endpoint is not READY, and does not count in that half. When outlier
// detection takes it back and it was put aside too, one call tries it. An endpoint that is
// aside gets no calls that outlier detection could judge. With useEjected the policy uses
// ejected endpoints that are still connected if no other is left.
//
// # Endpoints that come and go
//
// With slowStart an endpoint that is new, or comes back, gets a part of its share of the
// calls, which rises over a window:
//
//	{"slowStart": {"window": "30s", "floor": 0.1}}
//
// An endpoint that discovery marks as draining gets no new calls while another is READY. Its
// connection stays until its last calls end, even if discovery removes it before.
//
// # Reports of servers
//
// Where a server has many clients, each sends it few calls, and does not know what the
// others have in flight there. Servers can report it with each answer, by the ORCA protocol
// (gRFC A51). Package orca makes a server do so, and this config uses the reports:
//
//	{"load": {"expectedLatency": {"reports": {}}}}
//
// With reports a pick looks at more endpoints: 12 random ones and 8 remembered ones, unless
// choiceCount and memory say otherwise. In simulation the p99, divided by that of the oracle,
// is
//
//	                                                  with reports   without
//	the capacity of servers changes each second               1.20      1.37
//	the same, and their calls share the processors            1.13      1.35
//	the same, 100 clients and 100 servers                     1.70      4.34
//	some servers are fast and others slow                     1.10      1.10
//	the load doubles for 300 ms                               1.10      1.06
//
//	go run ./internal/sim/simulate -policies oracle,default,reports -seed 31 -calls 100000
//
// Reports out of band, ten a second from each server, add next to nothing to those with each
// answer: 1.61 for 1.62 with 100 clients and 100 servers (-policies oracle,reports,outOfBand
// -scenarios Prequal -seed 31 -calls 60000 -warmup 20s). They are for servers with few calls.
//
// Ten seconds after the last report the metric is what it is without the setting, except that
// the field queueExponent of reports stays in effect. A client that is the only one of its
// servers keeps as many samples as without reports.
//
// # Proxies
//
// With a proxy in the environment (HTTPS_PROXY) gRPC replaces the addresses of all
// endpoints by the proxy's, so only one endpoint is left. Use grpc.WithNoProxy, or NO_PROXY,
// for servers that the policy balances.
//
// # What it cannot see without DialOptions
//
// gRPC tells a policy little about calls. Without [DialOptions] the policy works, but
//
//   - the latency of a stream is its whole duration;
//   - a call that the server rejects before it has read the request may count as a
//     fast success;
//   - gRPC's own retries may go to the endpoint that just failed.
//
// # Snapshots
//
// [SnapshotsOf] returns what the policy of a channel knows of each endpoint, and why the
// endpoint is passed over.
//
// # Metrics
//
// With a stats plugin, such as gRPC's OpenTelemetry plugin, the policy records these
// metrics, whose names start with belfry.lb.p2c. They are off until they are enabled by
// name.
//
//	.picks .tried_picks .away_picks  attempts, and those to a tried or a distant endpoint
//	.full_picks                      picks that found all endpoints full, by result
//	.endpoints                       endpoints by state
//	.endpoint_conditions             endpoints by condition: aside, draining, ejected, slow_start
//	.put_aside                       how often an endpoint was put aside, by reason
//	.panics                          1 while so many are put aside that all are used
//	.added_connections               connections besides the first of each endpoint
//	.dropped_samples                 attempts without a known latency, by reason
package p2c
