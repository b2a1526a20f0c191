// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package p2c is the load-balancing policy belfry.p2c: every call goes to the
// endpoint that will likely answer soonest.
//
// A pick looks at a few READY endpoints, drawn at random, and takes the one with
// the least load: the power of d choices (Mitzenmacher, "The power of two choices
// in randomized load balancing", 2001). What load is, package load says; the
// default, the expected latency, needs no tuning. Use the policy wherever
// round_robin or least_request would be used, and above all where servers are not
// equally fast, slow down at times, or fail.
//
// DialOptions choose it, and let it see what a picker does not:
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
//	 "memory": 0,                                 // of the last pick that it looks at besides: 0 to 8
//	 "failureCodes": ["UNAVAILABLE", "INTERNAL"], // what counts as a failure of the endpoint
//	 "endpointLimit": {"fixed": 100},             // attempts in flight to each endpoint
//	 "load": {"peakEwma": {"decay": "10s"}}}      // expectedLatency, peakEwma, pendingRequests or constant
//
// Without choiceCount and memory they are 8 and 2 for expectedLatency, and 2 and 0
// for the other metrics, as in Tower. Without failureCodes they are UNKNOWN,
// DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE and
// DATA_LOSS. A value out of its range is an error that names field, value and
// rule, and so is a load that names no known metric; other unknown fields are ignored and
// logged. A new config takes effect at once, and the
// meters keep what they know unless the kind of metric changes.
//
// The weight of an endpoint (google.golang.org/grpc/experimental/balancer/weight)
// is its share: endpoints are drawn in proportion to their weights, and what is in
// flight counts per weight. One of weight 2 gets about twice the calls of one of
// weight 1, with few calls in flight and with many.
//
// # Limits
//
// With endpointLimit an endpoint has at most so many attempts in flight, streams that are
// open included: a fixed number, or as many as the algorithm Auto of package limit finds
// for it. Full endpoints are passed over. If all are full a call waits, first come first
// served, as long as its context lives and, with [DialOptions], as its stack allows: a
// load shed refuses it with NOT_READY. A limit for each endpoint keeps a slow one from
// collecting calls where the metric does not see that it is slow, and from using up a
// limit that all endpoints share: of ten endpoints picked at random, one of which became
// twenty times slower, 96 % of the calls succeeded with a limit for each, and less than
// half with one limit for all (TestEndpointLimitOfOneSlowEndpoint in internal/acceptance).
//
// # Connections
//
// A server may bound how many streams a connection has at a time (the setting
// MAX_CONCURRENT_STREAMS of HTTP/2), and gRPC lets calls beyond that wait, where no policy
// sees them. With maxConnectionsPerSubchannel above 1, the name that gRFC A105 has for it, an
// endpoint gets another connection when the streams of those that it has are used up:
//
//	{"maxConnectionsPerSubchannel": 4}
//
// The policy reads the setting from what the server sends, and counts the calls on each
// connection, so it knows how many streams are free and does not infer it from times. While
// an endpoint has none free, it is full: calls go to others. Where all are full calls wait
// as with endpointLimit, but in any number. Connections that are idle are closed again.
//
// # Zones
//
// With zones the policy prefers endpoints in the caller's zone: those elsewhere cost twice
// as much, and four draws of a pick are from home. So calls stay at home while it has
// capacity, and only what it cannot take leaves:
//
//	{"zones": {"homeEnv": "ZONE"}}
//
// Discovery says where an endpoint is, and may say where the caller is. In simulation
// (internal/sim) 99 % of the calls stay at 70 % load, 64 % without the setting, and the p99
// is lower, because less goes over the longer way; where a zone is asked for 140 % of what
// it can do 28 % of its calls leave. While fewer than half of the endpoints at home are well,
// all zones count alike. The metric constant knows no load, and never spills over.
//
// # Endpoints
//
// Each endpoint is a pick_first child: endpoints connect without waiting for a
// call and connect again when they lose their connection; an endpoint may have
// several addresses; client-side health checks work, and so does ejection by
// outlier_detection. The policy may be the child of any other (outlier_detection,
// random_subsetting, weighted_target, priority), also through xDS by a TypedStruct
// of its name (gRFC A52).
//
// An endpoint is the set of its addresses. What its meter knows lives as long as
// the resolver lists it, through reconnects, ejections and updates. gRPC closes the policy
// when the channel goes idle, by default after 30 minutes without a call; what the meters
// know is kept for ten minutes more, for up to 100,000 endpoints of all channels.
//
// A call that is repeated, by grpc's own retryPolicy or by a layer of belfry, goes
// elsewhere: the endpoints that it was sent to before cost 10 times as much. So it goes
// back to one of them only where all others are much busier.
//
// A server that fails an attempt may say when to come back, by the trailer
// grpc-retry-pushback-ms or a RetryInfo in its status. Until then, and for a minute at most,
// its endpoint costs 10 times as much.
//
// # Endpoints that fail
//
// The metric makes an endpoint that fails dear, and tries it again now and then. While all
// that is READY has only failed and other endpoints connect, the channel is CONNECTING, and
// calls wait, for half a second at most. Without that an endpoint that fails at once and is
// READY before the others would get all calls until they are.
//
// With failureAccrual an endpoint that fails gets no calls at all for a while: it is put aside
// after five failures in a row, or when a fifth of its attempts in ten seconds fail. Then one
// call tries it, and if that fails it is aside for longer.
//
//	{"failureAccrual": {"failures": 5, "successRate": 0.8, "baseTime": "3s", "maxAside": 0.5}}
//
// Where more than half of the READY endpoints would be aside, all are used: the fault is
// likely to be common to them.
//
// Outlier detection above the policy does the same with other means, and the two do not
// disturb each other. An endpoint that it has ejected is not READY, and is no part of the half. When it
// lets the endpoint in, one call tries it if it was aside too. An endpoint that is aside gets
// no calls that outlier detection could judge. What the policy adds is that it uses
// ejected endpoints, whose connections still stand, once none is left.
//
// # Endpoints that come and go
//
// With slowStart an endpoint that is new, or was away, gets a part of its share of the calls
// that rises over a window:
//
//	{"slowStart": {"window": "30s", "floor": 0.1}}
//
// An endpoint that discovery marks as draining gets no new calls while another is READY. Its
// connection stays, also while its last calls end after discovery has removed it.
//
// # Reports of servers
//
// A client of many sends each server few calls, and cannot tell what others have in flight
// there. Servers can say so with each answer, by the ORCA protocol (gRFC A51): package orca
// makes them do it, and the config takes it in:
//
//	{"load": {"expectedLatency": {"reports": {}}}}
//
// With reports a pick looks at more endpoints: 12 random ones and 8 remembered ones, unless
// choiceCount and memory say otherwise. In simulation the p99 in ratio to the oracle is
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
// Without reports, and ten seconds after the last, the metric is what it is without the
// setting, but for the field queueExponent of reports. A client whose calls are all that
// servers have keeps as many samples as without reports, too.
//
// # Proxies
//
// With a proxy in the environment (HTTPS_PROXY) grpc replaces the addresses of all
// endpoints by the proxy's, and there is but one endpoint left to choose. Use
// grpc.WithNoProxy, or NO_PROXY, for servers that are balanced here.
//
// # What it cannot see without DialOptions
//
// Grpc tells a policy little about calls. Without [DialOptions] the policy works,
// but the latency of a stream is its whole life; a call that the server rejects
// before it has read the request may count as a fast success; and grpc's own
// retries may go to the endpoint that just failed.
//
// # Looking inside
//
// [SnapshotsOf] says what the policy of a channel knows of each endpoint, and why it is
// passed over.
//
// # Metrics
//
// With a stats plugin, such as grpc's OpenTelemetry plugin, the policy records
// belfry.lb.p2c.picks, .tried_picks, .away_picks, .added_connections, .full_picks by result, .endpoints by state, .endpoint_conditions by
// condition, .put_aside by reason, .panics and .dropped_samples by
// reason. They are off until enabled by name.
package p2c
