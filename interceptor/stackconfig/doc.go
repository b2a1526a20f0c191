// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package stackconfig makes a stack of layers from data, and changes it while calls run:
// service-async's make_via_ref for gRPC. Use it to change what happens to calls without
// a new release: from a flag, a control plane, or a file, which package
// resolver/file/stackfile follows.
//
//	config, err := stackconfig.Parse([]byte(`{
//		"methodConfig": [
//			{"name": [{"service": "shop.Orders", "method": "List"}],
//			 "layers": [{"timeout": {"call": "1s"}}, {"hedge": {"methods": ["/shop.Orders/List"]}}, {"shared": "all"}]},
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
// layer of an entry is the outermost; the documentation of package interceptor says what
// the order does. For each method only the entry with the most specific name counts.
//
// # Updates
//
// [Stack.Update] is all or nothing: a config in which anything is wrong changes
// nothing, not even what an adaptive limit has learnt, and the [*Error] names the field
// by its path, such as methodConfig[1].layers[2].concurrency.limit.
//
// Layers keep what they know: limits their permits and queues, budgets their balance,
// breakers their circuits, hedges and adaptive timeouts their latencies. A layer takes
// over from the layer of the same kind and name in the same entry of the previous
// config. Without a name it takes over from the one of the same kind at the same position
// among those without a name. So layers can be added, removed and reordered, and those
// that stay keep their state. Name a layer to make sure that its state survives, and
// rename it to make sure that it does not. The schema says which entries are the same,
// and what a layer cannot change. Update returns which states started and which ended.
// Look there for a limit that was renamed, because calls that hold permits of the old
// limit do not count in the new one.
//
// Calls in flight end with the layers they began with, in the order they had. A limit
// that is raised admits calls that already wait, and one that is removed admits all of
// them.
//
// # gRPC's own service config
//
// The service config that a resolver or WithDefaultServiceConfig gives a channel applies
// too. Its timeout of a method bounds the whole call, with its waiting and all its
// attempts. Its waitForReady says whether a call waits while all endpoints fail. Its
// retryPolicy is off if the config retries or hedges when DialOptions is called, for all
// methods. A config that does so only later multiplies with it: set only one of them.
//
// # What is not data
//
// The program supplies functions, observers and its own layers as options when it makes
// the stack, under names that this config and later ones refer to.
package stackconfig
