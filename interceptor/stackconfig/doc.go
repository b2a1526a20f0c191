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
//	err = stack.Update(next) // At any time.
//
// A config is the message belfry.config.v1.Stack, whose comments say what each
// field means, its unit, default and range. The first layer of an entry is the
// outermost; the documentation of package interceptor says what order does. The
// entry with the most specific name counts for a method, by itself.
//
// # Updates
//
// [Stack.Update] is all or nothing: a config in which anything is wrong changes
// nothing, and the [*Error] names the field by its path, such as
// methodConfig[1].layers[2].concurrency.limit.
//
// Layers keep what they know: limits their permits and queues, budgets their
// balance, breakers their circuits, hedges and adaptive timeouts their latencies.
// A layer takes over from the layer of the same kind and name in the same entry of
// the config before, or if it has no name from the one of the same kind that is in
// the same place among those without a name; so layers can be added, removed and
// put into another order, and those that stay keep their state. An entry is the
// same if it has a name in common with an entry of before. To make sure that a
// state survives, name the layer. To make sure that it does not, name it anew.
//
// What a layer cannot change (an algorithm, what calls are told apart by) makes it
// begin anew. Calls in flight end with the layers they began with, in the order they
// had; a limit that is raised admits calls that wait already.
//
// # What is not data
//
// Functions, observers and layers of the program are supplied as options when the
// stack is made, under a name to which configs refer, now and in later updates.
package stackconfig
