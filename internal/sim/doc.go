// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package sim simulates clusters of clients and servers, to see what a load
// balancing policy is worth: how much later its calls are answered than those of
// an oracle that knows every queue.
//
// The policies are the real ones. A client is a fake channel with a real balancer
// in it, its picker and its meters; only time, chance and the network are not
// real. So a run takes seconds where the cluster would take minutes, depends on
// nothing but its seed, and meets the same calls and the same faults under each
// policy. Use it to judge a change of a metric, of its constants, or of the
// picker. What it cannot judge is what a pick costs, and how goroutines that
// pick at the same time get in each other's way: for that there are benchmarks.
//
//	s, p := sim.Scenarios()[1], sim.Policies()[1]
//	s.WarmUp = 2 * time.Second
//	r, err := sim.Run(s, p, sim.Options{Calls: 10_000, Seed: 1})
//	if err != nil {
//		fmt.Println(err)
//		return
//	}
//	fmt.Printf("%s, %s: p99 below 50 ms: %t\n", s.Name, p.Name, r.Percentile(0.99) < 50*time.Millisecond)
//
// The command in the directory simulate runs all scenarios and prints a table.
//
// # The model
//
// Unless a scenario says otherwise there are 10 clients, each with a policy of
// its own, and 20 servers. Calls arrive as a Poisson process and belong to the
// clients at random. A server has 4 workers and one queue before them, first
// come first served. The work of a call takes a lognormal time of mean 10 ms,
// exp(0.6 z - 0.18) times that with z standard normal. The network takes 0.25 ms
// plus exponential 0.05 ms each way. A client gives up after 1 s with
// DEADLINE_EXCEEDED, and the server continues. Calls are measured after 30 s, in
// which the policies get to know the servers. The latency is the one that the
// client sees. The load is given as a share of what the servers can do in the
// long run, with what the faults leave of them.
//
// Besides percentiles the table shows, where a scenario is about that, the mean or
// the shares of the servers: one caller who makes one call after the other, servers
// of other sizes and weights, methods of unlike cost, heavy-tailed work, streams.
//
// A stream is answered once, after its work, and is then open until the run ends, or it
// is never answered. It goes through the real dial options of package p2c, which tell the
// policy what a picker does not see.
//
// A server that is stopped or slowed down in the middle of a call continues with
// what is left of it.
//
// # Streams and long calls
//
// Three kinds of scenarios hold what a call that lasts does to others.
//
//   - Get beside Export: a Get takes 1 ms, one call in a hundred is an Export of 10 s, and
//     none waits for a worker. The table has the most Exports that a server had at once, in
//     units of the mean (crowd), and how often a Get went to a server with an Export, in
//     ratio to one without (beside). Its percentiles are those of the Gets.
//   - 2,000 long streams: the shares are those of the streams that servers have at the end.
//   - Calls beside streams: a server comes back beside three with 100 open streams each, and
//     gets its share of the calls; three of ten servers have a silent stream, and the p99 of
//     the calls stays what it is without.
package sim
