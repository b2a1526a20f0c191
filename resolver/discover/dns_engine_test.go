// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/dnsclient"
	"github.com/belfry-go/belfry/internal/dnstest"
	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/resolver/discover"
)

// While calls run, 1,000 random changes of the records, and then a server that is silent,
// slow, or answers nonsense: no call fails, each error is reported once, and at rest the
// channel has what DNS has.
func TestDNSUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	s := dnstest.New(t)
	config := dnsclient.ForServer(s.Addr)
	config.Timeout = 100 * time.Millisecond
	defer discover.SetDNSConfig(config, nil)()
	const service, pod = "_grpc._tcp.orders.test.", "pod.orders.test."
	addrs := enginetest.Serve(t, 10)
	weights := make([]uint16, len(addrs)) // 0: not there
	weights[0] = 1
	publish := func() enginetest.Set {
		set := enginetest.Set{}
		var records []dnsmessage.ResourceBody
		for _, i := range rng.Perm(len(addrs)) {
			if w := weights[i]; w > 0 {
				records = append(records, dnstest.SRV(pod, netip.MustParseAddrPort(addrs[i]).Port(), 0, w))
				set[addrs[i]] = fmt.Sprintf("%s*%d@", addrs[i], 100*w)
			}
		}
		s.Set(service, 0, records...)
		return set
	}
	change := func() enginetest.Set {
		// The first stays, so that calls need not fail.
		i := 1 + rng.IntN(len(addrs)-1)
		weights[i] = (weights[i] + 1 + uint16(rng.IntN(2))) % 3
		return publish()
	}
	s.Set(pod, 0, dnstest.Addr("127.0.0.1"))
	channel := enginetest.Dial(t, must(discover.DNS("_grpc._tcp.orders.test", discover.DNSMinInterval(100*time.Millisecond))))
	channel.WaitSet(t, change())
	channel.Load(4)
	for range 10 {
		var set enginetest.Set
		for range 100 {
			set = change()
			time.Sleep(time.Millisecond)
		}
		channel.WaitSet(t, set)
	}
	back := func() { s.Override(nil) }
	reply := func(name, told string, r dnstest.Reply) enginetest.Disturbance {
		return enginetest.Disturbance{Name: name, Told: told, End: back, Begin: func() {
			s.Override(func(dnsmessage.Question, string) *dnstest.Reply { each := r; return &each })
		}}
	}
	channel.Survive(t, change,
		reply("silent", "i/o timeout", dnstest.Reply{Silent: true}),
		enginetest.Disturbance{Name: "slow", End: back, Begin: func() {
			s.Override(func(dnsmessage.Question, string) *dnstest.Reply { time.Sleep(50 * time.Millisecond); return nil })
		}},
		reply("nonsense", "i/o timeout", dnstest.Reply{Raw: []byte("nonsense")}),
		reply("the answer to another question", "i/o timeout", dnstest.Reply{Header: dnsmessage.Header{ID: 1}}),
		reply("restarted without its zones", "ServerFailure", dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeServerFailure}}),
		reply("an empty zone", "the name does not exist", dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeNameError}}),
	)
}

// A server that is added to a name gets its share of the calls within a TTL and a second,
// although no connection breaks. The channel beside it, with gRPC's own resolver, never
// asks again.
func TestDNSBesideGRPCs(t *testing.T) {
	first := enginetest.Serve(t, 1)[0]
	_, port, err := net.SplitHostPort(first)
	if err != nil {
		t.Fatal(err)
	}
	second, err := enginetest.ServeAt(t, "127.0.0.2:"+port)
	if err != nil {
		t.Skipf("no second address of this host: %v", err)
	}
	const ttl = 1
	ours, theirs := dnstest.New(t), dnstest.New(t)
	both := func(records ...dnsmessage.ResourceBody) {
		for _, s := range []*dnstest.Server{ours, theirs} {
			s.Set("orders.test.", ttl, records...)
		}
	}
	both(dnstest.Addr("127.0.0.1"))
	channel := enginetest.Dial(t, must(discover.DNS("orders.test:"+port, discover.DNSServer(ours.Addr))))
	beside := dialTarget(t, "dns://"+theirs.Addr+"/orders.test:"+port)
	channel.WaitSet(t, enginetest.Set{first: first + "*1@"})
	ctx := testContext(t)
	if got, err := call(ctx, beside, grpc.WaitForReady(true)); err != nil || got != first {
		t.Fatalf("gRPC's channel reached %s, error %v, want %s", got, err, first)
	}
	theirs.Questions()

	began := time.Now()
	both(dnstest.Addr("127.0.0.1"), dnstest.Addr("127.0.0.2"))
	channel.WaitShare(t, second, 2)
	t.Logf("the new server had its share %v after it was in DNS, with a TTL of %d s", time.Since(began), ttl)
	for range 100 {
		if got, err := call(ctx, beside); err != nil || got != first {
			t.Fatalf("gRPC's channel reached %s, error %v, want only %s, as it looks once", got, err, first)
		}
	}
	if asked := theirs.Questions(); len(asked) > 0 {
		t.Errorf("gRPC's resolver has asked %q, want nothing while no connection breaks", asked)
	}
}
