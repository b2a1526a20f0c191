// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/resolver/discover"
)

func register(t *testing.T, client *clientv3.Client, target, addr string, ttl time.Duration) (r *Registration) {
	t.Helper()
	retry(t, func(ctx context.Context) (err error) {
		r, err = Register(ctx, client, target, discover.MustEndpoint(addr), ttl)
		return err
	})
	t.Cleanup(func() { _ = r.Leave(context.Background()) })
	return r
}

// waitLease waits until the key has a lease for which ok is true.
func waitLease(t *testing.T, client *clientv3.Client, key string, ok func(*clientv3.LeaseTimeToLiveResponse) bool) clientv3.LeaseID {
	t.Helper()
	for end := time.Now().Add(time.Minute); time.Now().Before(end); {
		got, err := client.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if len(got.Kvs) == 1 && got.Kvs[0].Lease != 0 {
			lease, err := client.TimeToLive(t.Context(), clientv3.LeaseID(got.Kvs[0].Lease), clientv3.WithAttachedKeys())
			if err == nil && ok(lease) {
				return lease.ID
			}
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("%q has no such lease", key)
	panic("unreachable")
}

func TestRegister(t *testing.T) {
	c := startCluster(t, 1)
	client := c.admin(t)

	t.Run("holds the key by a lease", func(t *testing.T) {
		register(t, client, "ttl", "a:1", 9500*time.Millisecond)
		register(t, client, "ttl", "b:1", 0)
		for key, want := range map[string]int64{"ttl/a:1": 10, "ttl/b:1": 15} {
			waitLease(t, client, key, func(l *clientv3.LeaseTimeToLiveResponse) bool {
				if l.GrantedTTL != want || len(l.Keys) != 1 {
					t.Errorf("%s: lease %+v, want %d s for one key", key, l, want)
				}
				return true
			})
		}
	})

	t.Run("renews the lease", func(t *testing.T) {
		register(t, client, "renew", "a:1", 6*time.Second)
		var last clientv3.LeaseTimeToLiveResponse
		waitLease(t, client, "renew/a:1", func(l *clientv3.LeaseTimeToLiveResponse) bool {
			renewed := l.ID == last.ID && l.TTL > last.TTL
			last = *l
			return renewed
		})
	})

	t.Run("registers again when the lease is lost", func(t *testing.T) {
		register(t, client, "lost", "a:1", time.Second)
		first := waitLease(t, client, "lost/a:1", func(*clientv3.LeaseTimeToLiveResponse) bool { return true })
		if _, err := client.Revoke(t.Context(), first); err != nil {
			t.Fatal(err)
		}
		waitLease(t, client, "lost/a:1", func(l *clientv3.LeaseTimeToLiveResponse) bool { return l.ID != first })
	})

	t.Run("leaves the key to its successor", func(t *testing.T) {
		older := register(t, client, "two", "a:1", 0)
		newer := register(t, client, "two", "a:1", 0)
		w := enginetest.Watch(t, newSource(client, "two"))
		w.WaitSet(t, set{"a:1": "a:1*1@"})
		if err := older.Leave(t.Context()); err != nil {
			t.Fatal(err)
		}
		waitLease(t, client, "two/a:1", func(*clientv3.LeaseTimeToLiveResponse) bool { return true })
		if err := newer.Leave(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.WaitSet(t, set{})
	})

	t.Run("survives a cluster that lost its data", func(t *testing.T) {
		fresh := startCluster(t, 1)
		far := fresh.client(t)
		register(t, far, "moved", "a:1", time.Second)
		fresh.proxies[0].ForwardTo(c.members[0].Clients[0].Addr().String())
		w := enginetest.Watch(t, newSource(client, "moved"))
		w.WaitSet(t, set{"a:1": "a:1*1@"})
	})

	t.Run("says that etcd cannot be reached", func(t *testing.T) {
		c.cut(0)
		defer c.connect(0)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := Register(ctx, c.client(t), "down", discover.MustEndpoint("a:1"), 0)
		if err == nil {
			t.Error("Register: no error")
		}
	})
}
