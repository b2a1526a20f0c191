// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package otelobserver reports what a stack does as OpenTelemetry metrics. Use it if the
// program exports metrics; without an exporter it costs little and shows nothing.
//
//	obs, err := otelobserver.New(otel.GetMeterProvider())
//	…
//	stack, err := interceptor.NewStack(interceptor.Observe(obs), retry.Config{}, concurrency.Config{Limit: 20})
//
// The instruments, with their attributes:
//
//	belfry.calls           counter    rpc.method, belfry.kind, belfry.outcome, rpc.grpc.status   calls that were admitted and have ended
//	belfry.admitted        counter    rpc.method, belfry.kind, belfry.attempt                    calls and further attempts that passed the gates
//	belfry.refused         counter    rpc.method, belfry.layer, belfry.reason                    calls and further attempts refused
//	belfry.wait            histogram  rpc.method, belfry.layer                                   seconds waited for admission
//	belfry.attempts        counter    rpc.method, belfry.attempt                                 attempts handed to the connection
//	belfry.further_attempts counter   rpc.method, belfry.layer, belfry.reason                    attempts of retries and hedges
//	belfry.hedges.fired    counter    rpc.method, belfry.layer                                   extra attempts of hedges
//	belfry.hedges.won      counter    rpc.method, belfry.layer                                   calls whose result is an extra attempt's
//	belfry.in_flight       up-down    none                                                       calls in the stack, waiting ones included
//	belfry.budget.balance  gauge      belfry.layer                                               further attempts that the budget allows now
//
// and of each limit of package concurrency, as long as its stack is in use:
//
//	belfry.limit             gauge  calls that may run at a time
//	belfry.limit.in_use      gauge  permits that calls hold
//	belfry.limit.waiting     gauge  calls that wait for a permit
//	belfry.limit.baseline    gauge  seconds: the latency that the algorithm compares with
//	belfry.limit.latency     gauge  seconds: the mean latency of calls now
//	belfry.limit.last_sample gauge  seconds: the latency of the last call that the algorithm learnt from
//	belfry.limit.lowered     gauge  1 for the belfry.reason why the limit went down the last time
//
// with belfry.layer, and with rpc.method or belfry.key if each method or other key has a
// limit of its own. If limits share these, the first three are their sums, and the times
// the greatest of theirs.
//
// rpc.method is the full name of the method: of the first [MaxMethods] of them, and
// "other" of further ones. belfry.key is bounded likewise. belfry.attempt is "first" or "further", belfry.outcome is
// as interceptor.Outcome prints it, and rpc.grpc.status the name of the status code.
package otelobserver
