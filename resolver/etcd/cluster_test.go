// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/belfry-go/belfry/internal/test/enginetest"
)

// A cluster is an etcd of several members in this process. Clients reach each
// member through a proxy of its own, whose address stays.
type cluster struct {
	configs []*embed.Config
	members []*embed.Etcd       // nil: not running
	proxies []*enginetest.Proxy // for what is tested: they can be cut and stalled
	back    []*enginetest.Proxy // for the test itself
}

var clusters int

// startCluster starts n members. Peers talk over sockets in the working
// directory: a port that is free now may be taken when a member restarts.
func startCluster(t *testing.T, n int) *cluster {
	t.Helper()
	t.Chdir(t.TempDir())
	clusters++
	c := &cluster{members: make([]*embed.Etcd, n)}
	var initial []string
	for i := range n {
		cfg := embed.NewConfig()
		cfg.Name = fmt.Sprintf("m%d", i)
		cfg.Dir = t.TempDir()
		peer := url.URL{Scheme: "unix", Host: fmt.Sprintf("c%d-m%d:1", clusters, i)}
		cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
		cfg.ListenClientUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:0"}}
		cfg.AdvertiseClientUrls = cfg.ListenClientUrls
		cfg.InitialClusterToken = fmt.Sprintf("c%d", clusters)
		cfg.EnableGRPCGateway = false
		cfg.UnsafeNoFsync = true
		cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
		initial = append(initial, cfg.Name+"="+peer.String())
		c.configs = append(c.configs, cfg)
		c.proxies = append(c.proxies, enginetest.NewProxy(t))
		c.back = append(c.back, enginetest.NewProxy(t))
	}
	for _, cfg := range c.configs {
		cfg.InitialCluster = strings.Join(initial, ",")
	}
	t.Cleanup(func() {
		for i := range c.members {
			c.stop(i)
		}
	})
	for i := range n {
		c.start(t, i)
	}
	for i := range n {
		c.waitReady(t, i)
	}
	return c
}

// start starts a member. It is ready when a majority of them runs.
func (c *cluster) start(t *testing.T, i int) {
	t.Helper()
	m, err := embed.StartEtcd(c.configs[i])
	if err != nil {
		t.Fatal(err)
	}
	c.members[i] = m
	c.connect(i)
	c.back[i].ForwardTo(m.Clients[0].Addr().String())
}

func (c *cluster) waitReady(t *testing.T, i int) {
	t.Helper()
	select {
	case <-c.members[i].Server.ReadyNotify():
	case <-time.After(time.Minute):
		t.Fatal("etcd is not ready after a minute")
	}
}

// stop stops a member as if it had crashed. It keeps its data.
func (c *cluster) stop(i int) {
	if m := c.members[i]; m != nil {
		c.members[i] = nil
		c.proxies[i].ForwardTo("")
		c.back[i].ForwardTo("")
		// Close alone hands its lead over first, which takes seconds if nobody can
		// take it.
		m.Server.HardStop()
		m.Close()
	}
}

// connect undoes what cut did to a member that runs.
func (c *cluster) connect(i int) {
	c.proxies[i].ForwardTo(c.members[i].Clients[0].Addr().String())
}

// cut breaks the connections of what is tested to a member, and lets it make no
// more.
func (c *cluster) cut(i int) { c.proxies[i].ForwardTo("") }

// leader returns the member that leads, or -1.
func (c *cluster) leader() int {
	for i, m := range c.members {
		if m != nil && m.Server.Leader() == m.Server.MemberID() {
			return i
		}
	}
	return -1
}

// moveLeader lets another member lead. All must run.
func (c *cluster) moveLeader(t *testing.T) {
	t.Helper()
	retry(t, func(ctx context.Context) error {
		i := c.leader()
		if i < 0 {
			return errors.New("nobody leads")
		}
		next := c.members[(i+1)%len(c.members)].Server.MemberID()
		return c.members[i].Server.MoveLeader(ctx, uint64(c.members[i].Server.MemberID()), uint64(next))
	})
}

// client returns a client, for what is tested, of the given members, or of all if
// none are given.
func (c *cluster) client(t *testing.T, members ...int) *clientv3.Client {
	t.Helper()
	var addrs []string
	for i, p := range c.proxies {
		if len(members) == 0 || slices.Contains(members, i) {
			addrs = append(addrs, p.Addr())
		}
	}
	return newClient(t, addrs)
}

// admin returns a client for the test itself.
func (c *cluster) admin(t *testing.T) *clientv3.Client {
	t.Helper()
	var addrs []string
	for _, p := range c.back {
		addrs = append(addrs, p.Addr())
	}
	return newClient(t, addrs)
}

func newClient(t *testing.T, addrs []string) *clientv3.Client {
	t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: addrs, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// retry calls f until it succeeds: etcd refuses what comes while it elects a
// leader, or lets it wait for long.
func retry(t *testing.T, f func(ctx context.Context) error) {
	t.Helper()
	for end := time.Now().Add(time.Minute); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		err := f(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// put writes keys and values, two and two, in one transaction.
func put(t *testing.T, client *clientv3.Client, keyValues ...string) {
	t.Helper()
	var ops []clientv3.Op
	for i := 0; i < len(keyValues); i += 2 {
		ops = append(ops, clientv3.OpPut(keyValues[i], keyValues[i+1]))
	}
	commit(t, client, ops...)
}

// commit commits a transaction, which may be carried out twice, and returns its
// revision.
func commit(t *testing.T, client *clientv3.Client, ops ...clientv3.Op) (revision int64) {
	t.Helper()
	retry(t, func(ctx context.Context) error {
		got, err := client.Txn(ctx).Then(ops...).Commit()
		if err == nil {
			revision = got.Header.Revision
		}
		return err
	})
	return revision
}

// compact forgets all revisions before one.
func compact(t *testing.T, client *clientv3.Client, revision int64) {
	t.Helper()
	retry(t, func(ctx context.Context) error {
		_, err := client.Compact(ctx, revision, clientv3.WithCompactPhysical())
		if errors.Is(err, rpctypes.ErrCompacted) {
			return nil
		}
		return err
	})
}
