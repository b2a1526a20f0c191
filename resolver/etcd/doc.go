// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package etcd is a source of the endpoints that are registered in etcd, and
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
// Addr is required, Op is ignored. The fields weight (from 1 up), zone (a name),
// group (from 0 up) and draining (a boolean) of Metadata are read, and no others.
// Metadata that is not an object is ignored.
//
// A value that is not of this form is reported once. Its key keeps the endpoint
// that it had.
//
// # Staleness and failures
//
// A source reads all keys, with the consent of a majority of the members, and
// then watches them, so that a change is seen as soon as etcd tells of it. Once a
// minute, after a compaction, and after every failure, it reads all keys again.
// That bounds how long it can miss what a watch does not tell: a connection that
// is dead without being closed, or a cluster that was restored from a backup.
// Set DialKeepAliveTime of the client to find dead connections earlier.
//
// While etcd cannot be reached, or has no leader, the last set stays. The error
// is reported once, and the source tries again after 0.5 s at first and after 10 s
// at most. A source that has no set yet takes one from any member that answers,
// although that member may be behind.
package etcd
