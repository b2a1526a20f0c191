// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package stackconfig makes a stack of layers from data, and changes it while
// calls run: service-async's make_via_ref for gRPC. Use it where what happens to
// calls is to be changed without a new release: from a file, a flag, a control
// plane.
//
//	config, err := stackconfig.Parse([]byte(`{
//		"methodConfig": [
//			{"name": [{"service": "shop.Orders", "method": "List"}],
//			 "layers": [{"timeout": {"call": "1s"}}, {"hedge": {}}, {"shared": "all"}]},
//			{"name": [{}],
//			 "layers": [{"timeout": {"call": "5s"}}, {"retry": {}}, {"shared": "all"}]}
//		],
//		"sharedLayers": {"all": {"concurrency": {"limit": 100}}}
//	}`))
//	…
//	stack, err := stackconfig.NewStackFromConfig(config)
//	…
//	conn, err := grpc.NewClient(target, append(stack.DialOptions(), creds)...)
//	…
//	changes, err := stack.Update(next) // At any time.
//
// A config is the message belfry.config.v1.Stack. Its comments, and those of the Configs
// that they name, say what each field means, its unit, default and range. The first
// layer of an entry is the outermost; the documentation of package interceptor says
// what order does. The entry with the most specific name counts for a method, by itself.
//
// # Updates
//
// [Stack.Update] is all or nothing: a config in which anything is wrong changes
// nothing, not even what an adaptive limit has learnt, and the [*Error] names the field
// by its path, such as methodConfig[1].layers[2].concurrency.limit.
//
// Layers keep what they know: limits their permits and queues, budgets their balance,
// breakers their circuits, hedges and adaptive timeouts their latencies. A layer takes
// over from the layer of the same kind and name in the same entry of the config before,
// or if it has no name from the one of the same kind in the same position among those
// without a name; so layers can be added, removed and put into another order, and those
// that stay keep their state. To make sure that a state survives, name the layer. To
// make sure that it does not, rename it. The schema says which entries are the same, and
// what a layer cannot change. Update returns what has begun with a state of its own, and
// what has ended: look there for a limit that was renamed, because the calls that hold
// the permits of the old one do not count in the new one.
//
// Calls in flight end with the layers they began with, in the order they had. A limit
// that is raised admits calls that wait already, and one that is removed admits them
// all.
//
// # gRPC's own service config
//
// The service config that a resolver or WithDefaultServiceConfig gives a channel holds
// beside this one. The timeout that it has for a method bounds the call, with its
// waiting and all its attempts, in every stack; its waitForReady says whether a call
// waits while all endpoints fail. Its retryPolicy multiplies with the retries here:
// set one of them.
//
// # What is not data
//
// Functions, observers and layers of the program are supplied as options when the
// stack is made, under a name to which configs refer, now and in later updates.
package stackconfig
