// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/resolver/discover"
)

var logger = grpclog.Component("belfry-etcd")

// defaultTTL is how long a server that stopped without Leave is still listed.
const defaultTTL = 15 * time.Second

// A Registration keeps an endpoint registered.
type Registration struct {
	// Immutable.
	client  *clientv3.Client
	manager endpoints.Manager
	key     string
	value   endpoints.Endpoint
	seconds int64
	stop    context.CancelFunc
	done    chan struct{} // closed when keep has returned

	// Owned by keep; no longer written once done is closed.
	lease clientv3.LeaseID // 0: none
}

// Register registers an endpoint under target and keeps it registered until
// [Registration.Leave]. The registration is lost if etcd cannot be reached for
// longer than ttl, or loses its data. Then a goroutine registers the endpoint
// again. It tries until it succeeds, waits at most 10 s between two tries, and
// logs that.
//
// The endpoint must have exactly one address, without a server name. Its key is
// the one it was given with discover.Key, or else the address. Its weight, zone,
// group and whether it is draining are registered with it. If two registrations
// have the same key, the later one replaces the earlier one, and stays when the
// earlier one leaves.
//
// The ttl is how long a server that stopped without Leave is still listed. It must
// be at least 1 s, and is rounded up to whole seconds. 0 means 15 s. etcd raises a
// ttl that is shorter than its election timeout.
//
// Register returns when the endpoint is registered. It returns an error if an
// argument is not valid, etcd refuses, or ctx ends first. The context is not used
// afterwards. Do not close the client before Leave.
func Register(ctx context.Context, client *clientv3.Client, target string, ep resolver.Endpoint, ttl time.Duration) (*Registration, error) {
	if err := check(client, target); err != nil {
		return nil, err
	}
	if ttl == 0 {
		ttl = defaultTTL
	}
	switch {
	case len(ep.Addresses) != 1:
		return nil, fmt.Errorf("etcd: the endpoint has %d addresses: must be one", len(ep.Addresses))
	case ep.Addresses[0].ServerName != "":
		return nil, fmt.Errorf("etcd: endpoint %q has a server name, which cannot be registered", ep.Addresses[0].Addr)
	case ttl < time.Second:
		return nil, fmt.Errorf("etcd: ttl %v: must be at least 1s", ttl)
	}
	addr := ep.Addresses[0].Addr
	// Those who read the key must be able to make an endpoint of it.
	if _, err := discover.Endpoint(addr); err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	key := discover.KeyOf(ep)
	if key == "" {
		key = addr
	}
	manager, err := endpoints.NewManager(client, target)
	if err != nil {
		return nil, fmt.Errorf("etcd: %w", err)
	}
	keepCtx, stop := context.WithCancel(context.Background())
	r := &Registration{
		client:  client,
		manager: manager,
		key:     target + "/" + key,
		value:   endpoints.Endpoint{Addr: addr, Metadata: metadataOf(ep)},
		seconds: int64((ttl + time.Second - 1) / time.Second),
		stop:    stop,
		done:    make(chan struct{}),
	}
	if err := r.enter(ctx); err != nil {
		stop()
		return nil, err
	}
	go r.keep(keepCtx)
	return r, nil
}

// metadataOf returns the metadata to register, or nil if all of it is the default.
func metadataOf(ep resolver.Endpoint) any {
	m := metadata{Zone: discover.ZoneOf(ep), Group: discover.GroupOf(ep), Draining: discover.IsDraining(ep)}
	if w := discover.WeightOf(ep); w != 1 {
		m.Weight = &w
	}
	if m == (metadata{}) {
		return nil
	}
	return m
}

// enter writes the endpoint with the lease, or with a new lease if there is none
// or it has expired.
func (r *Registration) enter(ctx context.Context) error {
	for {
		if r.lease == 0 {
			granted, err := r.client.Grant(ctx, r.seconds)
			if err != nil {
				return fmt.Errorf("etcd: registering %q: %w", r.key, err)
			}
			r.lease = granted.ID
		}
		err := r.manager.AddEndpoint(ctx, r.key, r.value, clientv3.WithLease(r.lease))
		switch {
		case err == nil:
			return nil
		case errors.Is(err, rpctypes.ErrLeaseNotFound):
			r.lease = 0
		default:
			return fmt.Errorf("etcd: registering %q: %w", r.key, err)
		}
	}
}

// keep keeps the lease alive, and registers the endpoint again when the lease is
// lost, until ctx is done.
func (r *Registration) keep(ctx context.Context) {
	defer close(r.done)
	for {
		if alive, err := r.client.KeepAlive(ctx, r.lease); err == nil {
			for range alive { //nolint:revive // until it is closed
			}
		}
		for failures := 0; ; failures++ {
			if ctx.Err() != nil {
				return
			}
			if failures == 0 {
				logger.Warningf("%q: the lease is lost; registering again", r.key)
			}
			try, cancel := context.WithTimeout(ctx, timeout)
			err := r.enter(try)
			cancel()
			if err == nil {
				logger.Infof("%q: registered again", r.key)
				break
			}
			if failures == 0 && ctx.Err() == nil {
				logger.Warning(err)
			}
			sleep(ctx, delay(failures))
		}
	}
}

// Leave ends the registration and removes the endpoint from etcd, so that clients
// stop calling it as soon as they see that. Calls in flight are not disturbed; let
// them finish with GracefulStop afterwards. If another server has registered the
// key since, that registration stays.
//
// Leave returns an error if it cannot reach etcd before ctx ends. Then the endpoint
// is listed until the ttl has passed, and Leave may be called again. It may be
// called concurrently.
func (r *Registration) Leave(ctx context.Context) error {
	r.stop()
	<-r.done
	if _, err := r.client.Revoke(ctx, r.lease); err != nil && !errors.Is(err, rpctypes.ErrLeaseNotFound) {
		return fmt.Errorf("etcd: leaving %q: %w", r.key, err)
	}
	return nil
}
