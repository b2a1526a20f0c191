// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package otelobserver reports what stacks and balancing policies do as OpenTelemetry
// metrics, and as events of the spans of calls. Use it if the program exports either.
//
//	obs, err := otelobserver.New(otel.GetMeterProvider())
//	…
//	stack, err := interceptor.NewStack(interceptor.Named("orders"), interceptor.Observe(obs), retry.Config{}, concurrency.Config{Limit: 20})
//
// # Metrics
//
// All have the attribute belfry.stack, the name of the stack ([interceptor.Named]), but those
// of endpoints. Stacks of one name are added up; for what cannot be added, the table says how.
// c stands for the attributes grpc.target and grpc.method.
//
//	name                        kind       unit       further attributes                       what
//	belfry.call.duration        histogram  s          c, belfry.kind, belfry.outcome,          calls that ended, refused ones too, from
//	                                                  grpc.status                              where they enter the stack: with all waiting
//	belfry.attempt.duration     histogram  s          c, belfry.attempt, belfry.outcome,       attempts that ended, from where they are
//	                                                  grpc.status                              handed to the connection
//	belfry.attempt.started      counter    {attempt}  c, belfry.attempt                        attempts handed to the connection
//	belfry.refused              counter    {attempt}  c, belfry.layer, belfry.reason           calls and further attempts refused
//	belfry.wait                 histogram  s          c, belfry.layer                          waits for admission that ended
//	belfry.call.retries         counter    {attempt}  c, belfry.layer, belfry.reason           attempts of retries
//	belfry.call.hedges          counter    {attempt}  c, belfry.layer, belfry.reason           attempts of hedges
//	belfry.call.hedges_won      counter    {call}     c, belfry.layer                          calls whose result is an extra attempt's
//	belfry.call.retry_delay     histogram  s          c, belfry.layer                          back-off before an attempt of a retry
//	belfry.in_flight            up-down    {call}                                              calls in the stack, waiting ones too
//	belfry.limit                gauge      {call}     belfry.layer, k                          calls that may run at a time
//	belfry.limit.in_use         gauge      {call}     belfry.layer, k                          permits that calls hold
//	belfry.limit.waiting        gauge      {call}     belfry.layer, k                          calls that wait for a permit
//	belfry.limit.baseline       gauge      s          belfry.layer, k                          latency that the algorithm compares with; greatest
//	belfry.limit.latency        gauge      s          belfry.layer, k                          mean latency of calls now; greatest
//	belfry.limit.last_sample    gauge      s          belfry.layer, k                          latency that was learnt from last; greatest
//	belfry.limit.lowered        gauge      1          belfry.layer, k, belfry.reason           1 for why the limit went down the last time
//	belfry.circuits             gauge      {circuit}  belfry.layer, belfry.state               circuits of breakers: closed, half-open, open
//	belfry.throttle.probability gauge      1          belfry.layer                             with which a throttle refuses; greatest of all keys
//	belfry.budget.balance       gauge      {attempt}  belfry.layer                             further attempts that the budget allows; least
//	belfry.layer.waiting        gauge      {call}     belfry.layer                             calls that wait in a buffer, rate limit or fail-fast
//	belfry.failfast.failing     gauge      1          belfry.layer                             1 while a fail-fast refuses without waiting; greatest
//	belfry.hedge.delay          gauge      s          belfry.layer                             before an extra attempt; greatest of all methods
//	belfry.reading              gauge      1          belfry.layer, belfry.reading             what a layer of your own reads; greatest
//	belfry.endpoints            gauge      {endpoint} grpc.target, grpc.lb.locality,           endpoints of the policy belfry.p2c
//	                                                  belfry.state
//	belfry.source.failing       gauge      {channel}  grpc.target                              channels whose source of endpoints fails
//
// and with [WithEndpoints], of each endpoint of the policy belfry.p2c:
//
//	belfry.endpoint.in_flight   gauge      {call}     grpc.target, grpc.lb.locality, belfry.endpoint  attempts and open streams
//	belfry.endpoint.latency     gauge      s          the same                                        of a call that finds nothing else in flight
//	belfry.endpoint.share       gauge      1          the same                                        part of the policy's picks
//	belfry.endpoint.failures    counter    {attempt}  the same                                        attempts that failed
//	belfry.endpoint.aside       gauge      1          the same                                        1 while it gets no calls, though it has a connection
//
// belfry.call.duration, belfry.attempt.duration, belfry.refused, belfry.limit, belfry.circuits
// and belfry.endpoints keep their names and attributes. The others may change.
//
// grpc.target, grpc.method, grpc.status and grpc.lb.locality are as gRFC A66 and A78 have
// them: grpc.method is "other" for a method that generated code does not call, and for those
// beyond [MaxMethods]. k is grpc.method or belfry.key for a limit that has a part for each
// method or other key; at most [MaxMethods] keys are told apart. belfry.attempt is "first" or
// "further", belfry.outcome is as interceptor.Outcome prints it. belfry.reason is the reason of
// a refusal, or the status of the attempt before a retry or hedge, "SLOW" if there is none.
// belfry.state of endpoints is the connectivity state, or why an endpoint that is READY gets
// no calls: ASIDE or DRAINING. The counters belfry.call.retries and belfry.call.hedges are
// what gRFC A96 has as histograms for each call; they have a reason instead.
//
// grpc.lb.backend_service is not among them, because gRPC shows it to no one but its own
// policies and plugin. The plugin's attempt metrics have it, if asked to.
//
// # Traces
//
// If the context of a call has a span that records, the span gets the events belfry.waited,
// belfry.refused, belfry.retried, belfry.hedged and belfry.picked, the last with the endpoint of each
// attempt, at the time the attempt began.
//
// # Beside gRPC's own plugin
//
// The plugin (google.golang.org/grpc/stats/opentelemetry) must be given to grpc.NewClient
// before the stack. Then its call metrics include waiting and its call span is the one that
// gets the events. After the stack, each attempt looks like a call to it, and what a call
// waits is not seen. belfry.DialOptions puts it in its place.
package otelobserver
