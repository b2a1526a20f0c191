// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/internal/dnsclient"
	"github.com/belfry-go/belfry/internal/dnstest"
	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/resolver/discover"
	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc/resolver"
)

// watchDNS runs f in a bubble with a channel on DNS. The server is outside, and
// the clock stands still while it is asked.
func watchDNS(t *testing.T, s *dnstest.Server, target string, f func(t *testing.T, cc *fakeConn, r resolver.Resolver)) {
	t.Helper()
	s.Questions()
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		src := must(discover.DNS(target, discover.DNSServer(s.Addr)))
		r := buildWith(t, cc, src, resolver.BuildOptions{}, exact())
		synctest.Wait()
		f(t, cc, r)
	})
}

func failure(code dnsmessage.RCode, types ...dnsmessage.Type) func(dnsmessage.Question, string) *dnstest.Reply {
	return func(q dnsmessage.Question, _ string) *dnstest.Reply {
		if len(types) > 0 && !slices.Contains(types, q.Type) {
			return nil
		}
		return &dnstest.Reply{Header: dnsmessage.Header{RCode: code}}
	}
}

func TestDNSHosts(t *testing.T) {
	const one, two, three = "10.0.0.1:80=10.0.0.1:80", "10.0.0.2:80=10.0.0.2:80", "[fd00::1]:80=[fd00::1]:80"
	t.Run("sees a change within one TTL, with jitter", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set("orders.", 10, dnstest.Addr("10.0.0.1"))
		watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			wantSets(t, cc, one)
			s.Set("orders.", 10, dnstest.Addr("fd00::1"), dnstest.Addr("10.0.0.2"), dnstest.Addr("10.0.0.1"))
			time.Sleep(9*time.Second - 1)
			synctest.Wait()
			wantSets(t, cc, one)
			time.Sleep(time.Second + 1)
			synctest.Wait()
			wantSets(t, cc, one, one+" "+two+" "+three)
			s.Questions()
			time.Sleep(1000 * time.Second)
			synctest.Wait()
			// Two questions for each look, 9 s to 10 s apart.
			if n := len(s.Questions()) / 2; n < 100 || n > 111 {
				t.Errorf("%d looks in 100 TTLs, want 100 to 111", n)
			}
			wantErrors(t, cc)
		})
	})
	t.Run("looks every second at a TTL of 0, and every 5 minutes at one of days", func(t *testing.T) {
		s := dnstest.New(t)
		for _, tt := range []struct {
			ttl  uint32
			in   time.Duration
			want int
		}{{0, 20*time.Second + 500*time.Millisecond, 20}, {86400, 51 * time.Minute, 10}} {
			s.Set("orders.", tt.ttl, dnstest.Addr("10.0.0.1"))
			watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
				s.Questions()
				time.Sleep(tt.in)
				synctest.Wait()
				if n := len(s.Questions()) / 2; n != tt.want {
					t.Errorf("%d looks in %v at a TTL of %d s, want %d", n, tt.in, tt.ttl, tt.want)
				}
			})
		}
	})
	t.Run("looks early when a connection fails, once a second", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set("orders.", 60, dnstest.Addr("10.0.0.1"))
		watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, r resolver.Resolver) {
			s.Set("orders.", 60, dnstest.Addr("10.0.0.2"))
			r.ResolveNow(resolver.ResolveNowOptions{})
			time.Sleep(time.Second)
			synctest.Wait()
			wantSets(t, cc, one, two)
		})
	})
	for name, trouble := range map[string]func(s *dnstest.Server){
		"an error of the server":     func(s *dnstest.Server) { s.Override(failure(dnsmessage.RCodeServerFailure)) },
		"a name that does not exist": func(s *dnstest.Server) { s.Override(failure(dnsmessage.RCodeNameError)) },
		"nonsense": func(s *dnstest.Server) {
			s.Override(func(dnsmessage.Question, string) *dnstest.Reply {
				return &dnstest.Reply{Header: dnsmessage.Header{Truncated: true, RCode: dnsmessage.RCodeRefused}}
			})
		},
		"an answer without records": func(s *dnstest.Server) { s.Override(failure(dnsmessage.RCodeSuccess)) },
	} {
		t.Run("keeps the last set over "+name, func(t *testing.T) {
			s := dnstest.New(t)
			s.Set("orders.", 5, dnstest.Addr("10.0.0.1"))
			watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
				trouble(s)
				time.Sleep(30 * time.Second)
				synctest.Wait()
				wantSets(t, cc, one)
				wantErrors(t, cc, "watching belfry:///orders: DNS: ") // once
				if n := len(s.Questions()); n < 6 || n > 56 {
					t.Errorf("%d questions in 30 s, want 2 to 8 for each of 3 to 7 looks", n)
				}
				s.Override(nil)
				s.Set("orders.", 5, dnstest.Addr("10.0.0.2"))
				time.Sleep(8 * time.Second) // the longest backoff
				synctest.Wait()
				wantSets(t, cc, one, two)
			})
		})
	}
	t.Run("fails calls while it knows nothing", func(t *testing.T) {
		s := dnstest.New(t)
		watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			wantSets(t, cc)
			wantErrors(t, cc, "DNS: orders: no such records: the name does not exist")
		})
	})
	t.Run("keeps the addresses of the family that cannot be had", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set("orders.", 5, dnstest.Addr("10.0.0.1"), dnstest.Addr("fd00::1"))
		watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			s.Override(failure(dnsmessage.RCodeServerFailure, dnsmessage.TypeAAAA))
			s.Set("orders.", 5, dnstest.Addr("10.0.0.2"), dnstest.Addr("fd00::2"))
			time.Sleep(5 * time.Second)
			synctest.Wait()
			wantSets(t, cc, one+" "+three, two+" "+three)
			s.Override(failure(dnsmessage.RCodeNameError, dnsmessage.TypeAAAA)) // There are none: that is known.
			time.Sleep(5 * time.Second)
			synctest.Wait()
			wantSets(t, cc, one+" "+three, two+" "+three, two)
			wantErrors(t, cc)
		})
	})
}

// TestDNSRandom changes records and breaks the server at random. What is published is
// always a set that the server has had, and at rest the one it has.
func TestDNSRandom(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	s := dnstest.New(t)
	had := map[string]bool{}
	now := ""
	change := func() {
		var records []dnsmessage.ResourceBody
		var set []string
		for i := range 8 {
			if addr := fmt.Sprint("10.0.0.", i); rng.IntN(2) == 0 || i == 7 && len(set) == 0 {
				records, set = append(records, dnstest.Addr(addr)), append(set, addr+":80="+addr+":80")
			}
		}
		rng.Shuffle(len(records), func(i, j int) { records[i], records[j] = records[j], records[i] })
		now = strings.Join(set, " ")
		had[now] = true
		s.Set("orders.", uint32(rng.IntN(4)), records...)
	}
	change()
	watchDNS(t, s, "orders:80", func(t *testing.T, cc *fakeConn, r resolver.Resolver) {
		for range 300 {
			switch rng.IntN(5) {
			case 0:
				s.Override(failure([]dnsmessage.RCode{dnsmessage.RCodeServerFailure, dnsmessage.RCodeNameError, dnsmessage.RCodeRefused, dnsmessage.RCodeSuccess}[rng.IntN(4)]))
			case 1:
				s.Override(nil)
			case 2:
				r.ResolveNow(resolver.ResolveNowOptions{})
			default:
				change()
			}
			time.Sleep(time.Duration(rng.IntN(2000)) * time.Millisecond)
			synctest.Wait()
		}
		s.Override(nil)
		time.Sleep(10 * time.Second) // the longest backoff, and the longest TTL
		synctest.Wait()
		sets := cc.sets()
		for _, set := range sets {
			if !had[set] {
				t.Errorf("published %q, which the server never had", set)
			}
		}
		if got := sets[len(sets)-1]; got != now {
			t.Errorf("at rest the set is %q, the server has %q", got, now)
		}
	})
}

func TestDNSServices(t *testing.T) {
	const service = "_grpc._tcp.orders."
	t.Run("have ports, weights and all addresses of a target", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set(service, 5, dnstest.SRV("pod-1.", 8080, 0, 3), dnstest.SRV("pod-2.", 8081, 0, 0), dnstest.SRV("gone.", 8082, 0, 1), dnstest.SRV("several.", 8083, 0, 4))
		s.Set("pod-1.", 3, dnstest.Addr("fd00::1"), dnstest.Addr("10.0.0.1"))
		s.Set("pod-2.", 9, dnstest.Addr("10.0.0.2"))
		s.Set("several.", 9, dnstest.Addr("10.0.0.4"), dnstest.Addr("10.0.0.3"))
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			state := cc.last()
			var got []string
			for _, ep := range state.Endpoints {
				got = append(got, fmt.Sprint(ep.Addresses[0].Addr, " ", len(ep.Addresses), " ", discover.WeightOf(ep)))
			}
			slices.Sort(got)
			want := []string{"10.0.0.1:8080 2 300", "10.0.0.2:8081 1 1", "10.0.0.3:8083 1 200", "10.0.0.4:8083 1 200"}
			if !slices.Equal(got, want) {
				t.Errorf("endpoints (address, addresses, weight) %q, want %q", got, want)
			}
			s.Set("pod-2.", 9, dnstest.Addr("10.0.0.9"))
			time.Sleep(3 * time.Second) // the least TTL
			synctest.Wait()
			if got := show(cc.last()); !strings.Contains(got, "10.0.0.9:8081") {
				t.Errorf("set after the least TTL = %s, want the new address of pod-2", got)
			}
		})
	})
	t.Run("use the best priority that has an address", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set(service, 5, dnstest.SRV("spare.", 80, 20, 1), dnstest.SRV("a.", 80, 10, 1), dnstest.SRV("b.", 80, 10, 1))
		for i, name := range []string{"spare.", "a.", "b."} {
			s.Set(name, 5, dnstest.Addr(fmt.Sprint("10.0.0.", i)))
		}
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			s.Set("a.", 5)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			s.Set("b.", 5)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			wantSets(t, cc, "10.0.0.1:80=10.0.0.1:80*100 10.0.0.2:80=10.0.0.2:80*100", "10.0.0.2:80=10.0.0.2:80*100", "10.0.0.0:80=10.0.0.0:80*100")
			s.Set("spare.", 5)
			time.Sleep(5 * time.Second)
			synctest.Wait()
			// There may have been a second look.
			if errs := cc.errors(); len(errs) == 0 || !strings.Contains(errs[0], "no target of the service has an address") {
				t.Errorf("errors %q, want that no target has an address", errs)
			}
			if n := len(cc.sets()); n != 3 {
				t.Errorf("%d sets, want that the last is kept", n)
			}
		})
	})
	t.Run("have a group for each priority, if asked for", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set(service, 5, dnstest.SRV("spare.", 80, 20, 1), dnstest.SRV("a.", 80, 10, 1), dnstest.SRV("gone.", 80, 0, 1), dnstest.SRV("a.", 80, 30, 1))
		s.Set("a.", 5, dnstest.Addr("10.0.0.1"))
		s.Set("spare.", 5, dnstest.Addr("10.0.0.2"))
		w := enginetest.Watch(t, must(discover.DNS("_grpc._tcp.orders", discover.DNSServer(s.Addr), discover.DNSGroups())))
		w.WaitSet(t, enginetest.Set{"10.0.0.1:80": "10.0.0.1:80*100@ group 10", "10.0.0.2:80": "10.0.0.2:80*100@ group 20"})
		s.Set("a.", 5)
		s.Set("gone.", 0, dnstest.Addr("10.0.0.3"))
		w = enginetest.Watch(t, must(discover.DNS("_grpc._tcp.orders", discover.DNSServer(s.Addr), discover.DNSGroups())))
		w.WaitSet(t, enginetest.Set{"10.0.0.3:80": "10.0.0.3:80*100@", "10.0.0.2:80": "10.0.0.2:80*100@ group 20"})
	})
	t.Run("do not shrink when a target cannot be asked for", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set(service, 5, dnstest.SRV("a.", 80, 0, 1), dnstest.SRV("b.", 80, 0, 1))
		s.Set("a.", 5, dnstest.Addr("10.0.0.1"))
		s.Set("b.", 5, dnstest.Addr("10.0.0.2"))
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			s.Override(func(q dnsmessage.Question, network string) *dnstest.Reply {
				if q.Name.String() != "b." {
					return nil
				}
				return &dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeServerFailure}}
			})
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if n := len(cc.sets()); n != 1 {
				t.Errorf("sets %q, want only the first", cc.sets())
			}
			wantErrors(t, cc, "b. from")
		})
	})
	t.Run("need no further question if the addresses came with the answer", func(t *testing.T) {
		s := dnstest.New(t)
		s.Set(service, 5, dnstest.SRV("a.", 80, 0, 1), dnstest.SRV("b.", 80, 0, 1))
		s.Glue(service, dnstest.Record("a.", 5, dnstest.Addr("10.0.0.1")), dnstest.Record("b.", 5, dnstest.Addr("10.0.0.2")))
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			wantSets(t, cc, "10.0.0.1:80=10.0.0.1:80*100 10.0.0.2:80=10.0.0.2:80*100")
			if got := s.Questions(); len(got) != 1 {
				t.Errorf("questions %q, want one", got)
			}
		})
		// In whatever order they are, which servers change from answer to answer.
		s.Glue(service, dnstest.Record("b.", 5, dnstest.Addr("fd00::2")), dnstest.Record("a.", 5, dnstest.Addr("fd00::1")),
			dnstest.Record("b.", 5, dnstest.Addr("10.0.0.2")), dnstest.Record("a.", 5, dnstest.Addr("10.0.0.1")))
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			if got := show(cc.last()); !strings.Contains(got, "10.0.0.2:80+[fd00::2]:80") {
				t.Errorf("set = %s, want the addresses in their order", got)
			}
		})
		// What came is not all there is: nothing of it is used.
		s.Glue(service, dnstest.Record("a.", 5, dnstest.Addr("10.0.0.1")), dnstest.Record("a.", 5, dnstest.Addr("fd00::1")), dnstest.Record("b.", 5, dnstest.Addr("10.0.0.2")))
		s.Set("a.", 5, dnstest.Addr("10.0.0.1"), dnstest.Addr("fd00::1"))
		s.Set("b.", 5, dnstest.Addr("10.0.0.2"), dnstest.Addr("fd00::2"))
		watchDNS(t, s, "_grpc._tcp.orders", func(t *testing.T, cc *fakeConn, _ resolver.Resolver) {
			if got := show(cc.last()); !strings.Contains(got, "10.0.0.2:80+[fd00::2]:80") {
				t.Errorf("set = %s, want both addresses of b", got)
			}
		})
	})
}

func TestDNSSearchList(t *testing.T) {
	s := dnstest.New(t)
	s.Set("orders.b.", 5, dnstest.Addr("10.0.0.1"))
	config := dnsclient.ForServer(s.Addr)
	config.Search = []string{"a.", "b.", "c."}
	defer discover.SetDNSConfig(config, nil)()
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, must(discover.DNS("orders:80")), exact())
		// asked returns the names that were asked for since, in their order.
		asked := func() string {
			synctest.Wait()
			var names []string
			for _, q := range s.Questions() {
				if name, ok := strings.CutPrefix(q, "udp A "); ok {
					names = append(names, name)
				}
			}
			return strings.Join(names, " ")
		}
		if got, want := asked(), "orders.a. orders.b."; got != want {
			t.Errorf("asked for %q, want %q", got, want)
		}
		s.Set("orders.a.", 5, dnstest.Addr("10.6.6.6"))
		time.Sleep(5 * time.Second)
		if got, want := asked(), "orders.b."; got != want {
			t.Errorf("asked for %q, want only the name that has answered", got)
		}
		// A server that does not know makes no other name right.
		s.Override(failure(dnsmessage.RCodeServerFailure))
		time.Sleep(5 * time.Second)
		if got := asked(); strings.Contains(got, "orders.a.") {
			t.Errorf("asked for %q after an error, want only the name that has answered", got)
		}
		s.Override(nil)
		time.Sleep(2 * time.Second) // the backoff
		asked()
		s.Set("orders.a.", 5)
		s.Set("orders.b.", 5)
		s.Set("orders.", 5, dnstest.Addr("10.0.0.2"))
		time.Sleep(5 * time.Second)
		if got, want := asked(), "orders.b. orders.a. orders.b. orders.c. orders."; got != want {
			t.Errorf("asked for %q, want %q", got, want)
		}
		wantSets(t, cc, "10.0.0.1:80=10.0.0.1:80", "10.0.0.2:80=10.0.0.2:80")
	})
	restore := discover.SetDNSConfig(dnsclient.Config{}, errors.New("no such file"))
	defer restore()
	synctest.Test(t, func(t *testing.T) {
		cc := &fakeConn{}
		build(t, cc, must(discover.DNS("orders:80")))
		synctest.Wait()
		wantErrors(t, cc, "no such file; name a server with DNSServer")
	})
}

func TestDNSTargets(t *testing.T) {
	for _, tt := range []struct {
		target string
		opt    discover.DNSOption
		want   string
	}{
		{"orders", discover.DNSMinInterval(time.Second), `has no port: write "orders:443"`},
		{"dns:///orders:80", discover.DNSMinInterval(time.Second), `has a scheme: write "orders:80"`},
		{"orders:99999", discover.DNSMinInterval(time.Second), "must be from 1 to 65535"},
		{"orders:https", discover.DNSMinInterval(time.Second), `port "https": must be a number`},
		{":80", discover.DNSMinInterval(time.Second), `has no host: write "host:80"`},
		{"_grpc.orders", discover.DNSMinInterval(time.Second), `write "_service._proto.domain", without a port, or "host:port"`},
		{"_grpc._tcp.orders:80", discover.DNSMinInterval(time.Second), "without a port"},
		{"orders:80", discover.DNSMinInterval(0), "DNSMinInterval 0s: must be from 100ms to 5m0s"},
		{"orders:80", discover.DNSServer("dns.example.com"), `DNSServer "dns.example.com": must be an IP address`},
		{"orders:80", discover.DNSServer("10.0.0.1:0"), "port must be from 1 to 65535"},
		{"orders:80", nil, "option 0 is nil"},
	} {
		_, err := discover.DNS(tt.target, tt.opt)
		wantError(t, err, tt.want)
	}
	for target, want := range map[string]string{
		"10.0.0.1:80":  "10.0.0.1:80=10.0.0.1:80",
		"[fd00::1]:80": "[fd00::1]:80=[fd00::1]:80",
		"localhost:80": `"127.0.0.1:80","[::1]:80"=127.0.0.1:80+[::1]:80`,
	} {
		synctest.Test(t, func(t *testing.T) {
			cc := &fakeConn{}
			buildWith(t, cc, must(discover.DNS(target)), resolver.BuildOptions{})
			synctest.Wait()
			wantSets(t, cc, want)
		})
	}
}

// All that a user has to write is the target.
func TestDNSScheme(t *testing.T) {
	servers := startServers(t, 2)
	s := dnstest.New(t)
	const service = "_grpc._tcp.orders.test."
	var records []dnsmessage.ResourceBody
	for _, srv := range servers {
		records = append(records, dnstest.SRV("pod.orders.test.", uint16(netip.MustParseAddrPort(srv.addr).Port()), 0, 1))
	}
	s.Set("pod.orders.test.", 1, dnstest.Addr("127.0.0.1"))
	s.Set(service, 1, records[:1]...)
	conn := dialTarget(t, "belfry-dns://"+s.Addr+"/_grpc._tcp.orders.test")
	wantReaches(t, conn, servers[0])
	s.Set(service, 1, records...) // a server more, although no connection fails
	wantReaches(t, conn, servers...)

	_, port, err := net.SplitHostPort(servers[0].addr)
	if err != nil {
		t.Fatal(err)
	}
	wantReaches(t, dialTarget(t, "belfry-dns://"+s.Addr+"/pod.orders.test:"+port), servers[0])
	servers[0].mu.Lock()
	defer servers[0].mu.Unlock()
	seen := slices.Compact(slices.Sorted(slices.Values(servers[0].authorities)))
	if want := []string{"orders.test", "pod.orders.test:" + port}; !slices.Equal(seen, want) {
		t.Errorf("authorities %q, want %q", seen, want)
	}

	_, err = call(testContext(t), dialTarget(t, "belfry-dns://"+s.Addr+"/orders"))
	wantError(t, err, `target: address "orders" has no port: write "orders:443"`)
}
