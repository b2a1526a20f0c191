// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package etcd is a source of the endpoints that are registered in etcd. It also
// registers servers there. It reads and writes the layout of
// go.etcd.io/etcd/client/v3/naming/endpoints, so that both can be used together.
//
// A client:
//
//	src, err := etcd.New(client, "services/orders")
//	if err != nil {
//		return err
//	}
//	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src), creds)
//
// A server:
//
//	reg, err := etcd.Register(ctx, client, "services/orders", discover.MustEndpoint("10.0.0.1:8080"), 0)
//	if err != nil {
//		return err
//	}
//	// On SIGTERM, before GracefulStop:
//	err = reg.Leave(ctx)
//
// To name the service in a target, "etcd:///services/orders", register the
// scheme:
//
//	err := discover.Register("etcd", func(target resolver.Target) (discover.Source, error) {
//		return etcd.New(client, target.Endpoint())
//	})
//
// # Layout
//
// The endpoints of the target T are the keys that begin with "T/". The rest of
// the key is the key of the endpoint. The value is JSON:
//
//	{"Op": 0, "Addr": "10.0.0.1:8080", "Metadata": {"weight": 2, "zone": "a"}}
//
// Addr is required, Op is ignored. These fields of Metadata are read, and no others:
// weight (at least 1, by default 1), zone (a name, by default none), group (at least
// 0, by default 0) and draining (a boolean, by default false). Metadata that is not
// an object is ignored.
//
// A value that is not of this form is reported once. Its key keeps the endpoint
// that it had. If no value is valid, the last set stays.
//
// # Staleness and failures
//
// A source reads all keys, with the consent of a majority of the members. Then it
// watches them, so that it sees a change as soon as etcd reports it. It reads all
// keys again once a minute, after a compaction, and after every failure. So it
// notices within a minute what a watch does not report: a connection that is dead
// but not closed, or a cluster that was restored from a backup. Set
// DialKeepAliveTime of the client to find dead connections earlier.
//
// While etcd cannot be reached, does not answer within 5 s, or has no leader, the
// last set stays. Each different error is reported once until etcd answers. The
// source tries again after 0.5 s at first and after at most 10 s, less up to a
// fifth. A source that has no set yet takes one from any member that answers,
// although that member may be behind.
package etcd
