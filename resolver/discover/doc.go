// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package discover tells a gRPC channel which endpoints exist, change by
// change.
//
// It is the counterpart of Tower's discover: a [Source] yields [Change] values
// (this key now has that endpoint, this key is gone, the snapshot is complete)
// and the package turns them into the sets that gRPC's resolver API expects. A
// published set is complete and ordered, has no duplicates, and differs from the
// one before it.
//
// Endpoints come from DNS, a static list, a registry, a file, a control plane, or
// a program that starts servers itself. Every balancing policy can use them.
//
// For a headless service of Kubernetes, or any name in DNS, one line is enough:
//
//	src, err := discover.DNS("orders.prod.svc.cluster.local:8080")
//
// A program that can set only a target writes
// "belfry-dns:///orders.prod.svc.cluster.local:8080". A fixed list is
//
//	src, err := discover.List(
//		discover.MustEndpoint("10.0.0.1:443", discover.Weight(2), discover.Zone("a")),
//		discover.MustEndpoint("10.0.0.2:443", discover.Zone("b")),
//	)
//	if err != nil {
//		return err
//	}
//	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src), creds)
//
// # Sources
//
//   - [DNS] follows a name.
//   - [List] is a fixed set.
//   - [Channel] receives changes from a Go channel.
//   - [Poll] calls a function at an interval.
//   - [FullSets] takes complete sets from a watcher.
//   - [Merge] is the union of several sources.
//   - [Settle] is for a stream of changes that never says where its snapshot ends.
//
// For anything else implement [Source], which has one method.
//
// [WithSource] gives a source to one channel. [Register] serves a URL scheme in
// all channels, for sources that are named in the target string.
//
// # What the channel sees, and when
//
//   - Nothing is published before the first [Synced], because an incomplete set
//     would send the whole start-up burst to the first few endpoints. If a source
//     does not say Synced within [WithSyncTimeout] (15 s unless set), the
//     endpoints it has inserted so far are published. If there are none, an error
//     is reported, so that calls fail instead of hanging. A complete set that is
//     empty is published as empty.
//   - After that, changes are published when the source has been quiet for
//     5 ms, and at the latest 50 ms after the first of them. A further Synced
//     publishes at once. A source that receives its changes in groups yields each
//     group as one [Batch] that ends with Synced. A set equal to the published
//     one, attributes included, is not published again.
//   - Endpoints are ordered by key. Keys whose endpoints have the same set of
//     addresses are published as one endpoint, that of the smallest key, because
//     gRPC tells endpoints apart by address alone. Removing one of the keys
//     leaves the others in place. If the endpoints differ in the server name, an
//     error is logged.
//   - A watch that fails is reported to the channel and started again with
//     backoff. A watch that ends without [Final], or panics, has failed too. Calls
//     fail with the error only if there is no set yet. The whole last set stays
//     until the new watch says Synced, however long that takes. Then the new set
//     replaces it, and keys that were not inserted again are gone.
//   - At most one error a second is reported. Errors that come sooner wait: then
//     the last of them is reported, with the number of the others.
//   - An endpoint that cannot be used is ignored and logged, and reported to the
//     channel after the rest of the set is published. Such an endpoint has no
//     address. Or the channel has no dialer of its own, and an address has a
//     scheme, no port, or a port that does not exist. If no other endpoint is
//     left, the set is not published. A service config that does not parse is
//     ignored, logged and reported too.
//
// # The sources in a table
//
//	         needs            survives                          may be behind by
//	DNS      /etc/resolv.conf errors, lost packets, negative     one TTL (1 s to 5 min)
//	         or a server      answers, one family missing
//	List     nothing          everything                        nothing
//	Channel  a sender         changes that are not valid         5 ms to 50 ms, 0 after Synced
//	Poll     a function       its errors, panics and delays      one interval and a tenth
//	file     YAML or JSON     broken, missing, replaced files    100 ms to 1 s; 5 s unreported
//	etcd     a client of      lost majority, restart, lost data, what etcd takes to tell;
//	         etcd             compaction, values not valid       1 min if its watch is dead
//	k8s      the API server,  API server down, restarted or     what the API server takes
//	         list and watch   compacted, slices in motion        to tell; 45 s if it is silent
//
// The last three are modules of their own: resolver/file, resolver/etcd and
// resolver/kubernetes.
//
// With each of them the last complete set stays until there is a new one. DNS and
// Poll ask again early when a connection fails.
//
// # Idle channels, and several channels
//
// A channel that has had no call for grpc.WithIdleTimeout (30 minutes unless
// set) closes its resolver and builds a new one at the next call. Every
// channel, and every such rebuild, calls [Source.Watch] again on the same
// source, and each watch starts with the full set. The constructors say how
// many channels may share a source.
//
// # Attributes
//
// Weight, zone, group, key and whether it is draining are attributes of the
// endpoint. A change of them reaches the balancing policy without a reconnect.
// The weight is that of google.golang.org/grpc/experimental/balancer/weight, so
// that policies can read it without this package.
//
// Attribute values are compared with their Equal method, or with == if they have
// none. Without Equal, a pointer, map or slice that is created again for every
// set counts as changed every time. A change in the attributes of an address
// breaks its connection. The first of these faults that is seen again and again
// is logged once, as an error that says what to do.
//
// # Proxies
//
// If the environment names a proxy for the target (HTTPS_PROXY, NO_PROXY),
// gRPC replaces the address of every endpoint by the proxy's and drops the
// attributes. All endpoints then become one, without weight or zone. This
// package logs an error once when it sees that happen. Dial with
// grpc.WithNoProxy, or list the endpoints in NO_PROXY.
//
// # Errors
//
// Calls that fail because there are no endpoints fail with UNAVAILABLE, as the
// balancing policy decides. Their message contains the source's error. Calls
// that wait for ready wait.
package discover
