// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package discover tells a gRPC channel which endpoints exist, change by
// change.
//
// It is the counterpart of Tower's discover: a [Source] yields [Change] values
// (this key now has that endpoint, this key is gone, the snapshot is complete)
// and the package turns them into what gRPC's resolver API wants: complete,
// deduplicated, ordered sets, published no more often than they change.
//
// Endpoints come from DNS, a static list, a registry, a file, a control plane, or
// a program that starts servers itself. It works with every balancing policy.
//
// For a headless service of Kubernetes, or any name in DNS, this is all:
//
//	src, err := discover.DNS("orders.prod.svc.cluster.local:8080")
//
// and "belfry-dns:///orders.prod.svc.cluster.local:8080" is, for a program that
// has a target and no more. A list is
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
// [DNS] follows a name, [List] is a fixed set, [Channel] a Go channel of changes,
// [Poll] a function that is called again and again, [FullSets] a watcher that
// delivers complete sets, [Merge] the union of several sources, and [Settle]
// makes a source of a stream of changes that never says where its snapshot ends.
// Anything else implements [Source], which is one method.
//
// A source is passed by value with [WithSource]. One that has an address, and
// is to be named in the target string, is registered under a URL scheme with
// [Register].
//
// # What the channel sees, and when
//
//   - Nothing is published before the first [Synced]: a set that is half there
//     would send the whole start-up burst to the first few endpoints. A source
//     that does not say it within [WithSyncTimeout] has what it inserted so far
//     taken for the set, or, if that is nothing, an error reported, so that calls
//     fail instead of hanging. A complete set that is empty is published as empty.
//   - After that, changes are published when the source has been quiet for
//     5 ms, and at the latest 50 ms after the first of them. A further Synced
//     publishes at once, so a source that receives its changes in groups ends
//     each group with it, and yields them as one [Batch]. A set equal to the
//     published one, attributes included, is not published again.
//   - Endpoints are ordered by key. Keys whose endpoints have the same set of
//     addresses are published as one endpoint, that of the smallest key: gRPC
//     tells endpoints apart by address alone. Removing one of the keys leaves
//     the others in place. If they differ in the server name, an error is logged.
//   - A watch that fails is reported to the channel (calls fail with it only
//     if there is no set yet) and started again with backoff. So is one that
//     ends without [Final], and one that panics. The last complete set stays,
//     whole, until the new watch says Synced, however long that takes; then it
//     is replaced, and keys that were not inserted again are gone.
//   - Errors are reported at most once a second, the last of them with the number
//     of the others.
//   - An endpoint that cannot be used is ignored, logged and reported to the
//     channel, after the set, which it does not disturb: one without an address,
//     and, unless the channel has a dialer of its own, with an address without a
//     port, with a scheme, or with a port that cannot be. A set of which nothing
//     else is left is not published. A service config that does not parse is
//     treated in the same way.
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
// Each keeps its last complete set as long as it has to. DNS and Poll look early
// when a connection fails.
//
// # Idle channels, and several channels
//
// A channel that has had no call for grpc.WithIdleTimeout (30 minutes unless
// set) closes its resolver and builds a new one at the next call. Every
// channel, and every such rebuild, is a new [Source.Watch] on the same source,
// which starts with the full set again; sources of this package do that, and
// may be shared by any number of channels.
//
// # Attributes
//
// Weight, zone, group and key travel in the attributes of the endpoint, where a
// change of them reaches the balancing policy without a reconnect. The weight
// is that of google.golang.org/grpc/experimental/balancer/weight, so that
// policies read it without knowing this package.
//
// Values of attributes are compared with their Equal method. Without one, a value
// that is made again for every set counts as changed every time, and attributes
// of an address that change break its connection. Both are logged once, as
// errors, with what to do.
//
// # Proxies
//
// If the environment names a proxy for the target (HTTPS_PROXY, NO_PROXY),
// gRPC replaces the address of every endpoint by the proxy's and drops the
// attributes, so that any number of endpoints become one, without weight or
// zone. This package logs an error when it sees that happen. Dial with
// grpc.WithNoProxy, or list the endpoints in NO_PROXY.
//
// # Errors
//
// Calls that fail for want of endpoints fail with UNAVAILABLE, as the
// balancing policy decides; the text carries the source's error. Calls that
// wait for ready wait.
package discover
