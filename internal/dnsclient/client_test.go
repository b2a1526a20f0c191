// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package dnsclient_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/belfry-go/belfry/internal/dnsclient"
	"github.com/belfry-go/belfry/internal/dnstest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func lookup(t *testing.T, s *dnstest.Server, name string, typ dnsmessage.Type) (dnsclient.Answer, error) {
	t.Helper()
	c := dnsclient.ForServer(s.Addr)
	return c.Lookup(t.Context(), name, typ)
}

func wantAddrs(t *testing.T, a dnsclient.Answer, err error, ttl time.Duration, want ...string) {
	t.Helper()
	var got []string
	for _, addr := range a.Addrs {
		got = append(got, addr.String())
	}
	if err != nil || !slices.Equal(got, want) || a.TTL != ttl {
		t.Errorf("addresses %v for %v, error %v, want %v for %v", got, a.TTL, err, want, ttl)
	}
}

func TestLookup(t *testing.T) {
	s := dnstest.New(t)
	s.Set("orders.", 30, dnstest.Addr("10.0.0.1"), dnstest.Addr("10.0.0.2"), dnstest.Addr("fd00::1"))
	s.Set("alias.", 20, dnstest.CNAME("Other."))
	s.Set("other.", 10, dnstest.CNAME("orders."))
	s.Set("circle.", 10, dnstest.CNAME("circle."))

	t.Run("A and AAAA, with the TTL", func(t *testing.T) {
		a, err := lookup(t, s, "orders.", dnsmessage.TypeA)
		wantAddrs(t, a, err, 30*time.Second, "10.0.0.1", "10.0.0.2")
		a, err = lookup(t, s, "ORDERS.", dnsmessage.TypeAAAA)
		wantAddrs(t, a, err, 30*time.Second, "fd00::1")
	})
	t.Run("follows aliases, with the least TTL", func(t *testing.T) {
		a, err := lookup(t, s, "alias.", dnsmessage.TypeA)
		wantAddrs(t, a, err, 10*time.Second, "10.0.0.1", "10.0.0.2")
	})
	for _, name := range []string{"no-such-name.", "circle."} {
		t.Run("has no records for "+name, func(t *testing.T) {
			if _, err := lookup(t, s, name, dnsmessage.TypeA); !errors.Is(err, dnsclient.ErrNoRecords) {
				t.Errorf("error %v, want ErrNoRecords", err)
			}
		})
	}
	t.Run("has no records of another type", func(t *testing.T) {
		if _, err := lookup(t, s, "orders.", dnsmessage.TypeSRV); !errors.Is(err, dnsclient.ErrNoRecords) {
			t.Errorf("error %v, want ErrNoRecords", err)
		}
	})
	t.Run("SRV, with what comes with it", func(t *testing.T) {
		s.Set("_grpc._tcp.orders.", 30, dnstest.SRV("Pod-1.", 8080, 1, 2), dnstest.SRV("pod-2.", 8081, 3, 4))
		s.Glue("_grpc._tcp.orders.", dnstest.Record("pod-1.", 5, dnstest.Addr("10.0.0.1")), dnstest.Record("pod-1.", 6, dnstest.Addr("fd00::1")))
		a, err := lookup(t, s, "_grpc._tcp.orders.", dnsmessage.TypeSRV)
		got := fmt.Sprint(a.SRV, a.TTL, err)
		if want := "[{pod-1. 8080 1 2 [10.0.0.1 fd00::1]} {pod-2. 8081 3 4 []}] 5s <nil>"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	})
	t.Run("is not a name", func(t *testing.T) {
		for _, name := range []string{".", "a..b.", strings.Repeat("a", 64) + ".", strings.Repeat("a.", 200)} {
			if _, err := lookup(t, s, name, dnsmessage.TypeA); err == nil || !strings.Contains(err.Error(), "is not a DNS name") {
				t.Errorf("error of %q = %v, want one that says so", name, err)
			}
		}
	})
	t.Run("a TTL with the highest bit is none", func(t *testing.T) {
		s.Set("odd.", 1<<31, dnstest.Addr("10.0.0.1"))
		a, err := lookup(t, s, "odd.", dnsmessage.TypeA)
		wantAddrs(t, a, err, 0, "10.0.0.1")
	})
}

func TestLargeAnswers(t *testing.T) {
	s := dnstest.New(t)
	var want []string
	set := func(n int) {
		want = nil
		var records []dnsmessage.ResourceBody
		for i := range n {
			ip := fmt.Sprintf("10.0.%d.%d", i/256, i%256)
			records, want = append(records, dnstest.Addr(ip)), append(want, ip)
		}
		s.Set("orders.", 1, records...)
		s.Questions()
	}
	t.Run("come by UDP with EDNS", func(t *testing.T) {
		set(50) // more than 512 bytes
		a, err := lookup(t, s, "orders.", dnsmessage.TypeA)
		wantAddrs(t, a, err, time.Second, want...)
		if got := s.Questions(); len(got) != 1 || !strings.HasPrefix(got[0], "udp") {
			t.Errorf("questions %q, want one by UDP", got)
		}
	})
	t.Run("come by TCP when they are truncated", func(t *testing.T) {
		set(1000)
		a, err := lookup(t, s, "orders.", dnsmessage.TypeA)
		wantAddrs(t, a, err, time.Second, want...)
		if got := s.Questions(); len(got) != 2 || !strings.HasPrefix(got[1], "tcp") {
			t.Errorf("questions %q, want one by UDP and one by TCP", got)
		}
	})
	t.Run("come by TCP alone if the config says so", func(t *testing.T) {
		set(2)
		c := dnsclient.ForServer(s.Addr)
		c.TCP = true
		a, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA)
		wantAddrs(t, a, err, time.Second, want...)
		if got := s.Questions(); len(got) != 1 || !strings.HasPrefix(got[0], "tcp") {
			t.Errorf("questions %q, want one by TCP", got)
		}
	})
}

func TestServersThatDoNotKnow(t *testing.T) {
	bad, good := dnstest.New(t), dnstest.New(t)
	good.Set("orders.", 30, dnstest.Addr("10.0.0.1"))
	for _, tt := range []struct {
		name  string
		reply dnstest.Reply
		want  string
	}{
		{"SERVFAIL", dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeServerFailure}}, "the server said ServerFailure"},
		{"REFUSED", dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeRefused}}, "the server said Refused"},
		{"lame", dnstest.Reply{}, "the server does not answer for the name"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			bad.Override(func(dnsmessage.Question, string) *dnstest.Reply { r := tt.reply; return &r })
			c := dnsclient.ForServer(bad.Addr)
			_, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA)
			if err == nil || errors.Is(err, dnsclient.ErrNoRecords) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one that says %q", err, tt.want)
			}
			if n := len(bad.Questions()); n != c.Attempts {
				t.Errorf("asked %d times, want %d", n, c.Attempts)
			}
			c.Servers = []string{bad.Addr, good.Addr}
			a, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA)
			wantAddrs(t, a, err, 30*time.Second, "10.0.0.1")
			bad.Questions()
		})
	}
	t.Run("silent", func(t *testing.T) {
		bad.Override(func(dnsmessage.Question, string) *dnstest.Reply { return &dnstest.Reply{Silent: true} })
		c := dnsclient.ForServer(bad.Addr)
		c.Timeout = time.Millisecond
		_, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA)
		if !errors.Is(err, os.ErrDeadlineExceeded) && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v, want that of a deadline", err)
		}
		bad.Override(nil)
		ctx, cancel := context.WithCancel(t.Context())
		bad.Override(func(dnsmessage.Question, string) *dnstest.Reply { cancel(); return &dnstest.Reply{Silent: true} })
		c.Timeout = time.Hour // Only the context ends it.
		if _, err := c.Lookup(ctx, "orders.", dnsmessage.TypeA); err == nil {
			t.Error("no error after the context was cancelled")
		}
	})
	t.Run("from before EDNS", func(t *testing.T) {
		calls := 0
		good.Override(func(dnsmessage.Question, string) *dnstest.Reply {
			if calls++; calls > 1 {
				return nil
			}
			return &dnstest.Reply{Header: dnsmessage.Header{RCode: dnsmessage.RCodeFormatError}}
		})
		defer good.Override(nil)
		a, err := lookup(t, good, "orders.", dnsmessage.TypeA)
		wantAddrs(t, a, err, 30*time.Second, "10.0.0.1")
	})
	t.Run("that are no DNS servers", func(t *testing.T) {
		bad.Override(func(_ dnsmessage.Question, network string) *dnstest.Reply {
			return &dnstest.Reply{Raw: []byte("HTTP/1.1 400 Bad Request")}
		})
		c := dnsclient.ForServer(bad.Addr)
		c.TCP = true
		if a, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA); err == nil || errors.Is(err, dnsclient.ErrNoRecords) {
			t.Errorf("answer %v, error %v, want an error", a, err)
		}
	})
}

// An answer counts only if it is one to the question: others may be forged.
func TestOtherAnswersAreIgnored(t *testing.T) {
	s := dnstest.New(t)
	s.Set("orders.", 30, dnstest.Addr("10.0.0.1"))
	s.Override(func(q dnsmessage.Question, network string) *dnstest.Reply {
		return &dnstest.Reply{Header: dnsmessage.Header{ID: 1, RCode: dnsmessage.RCodeNameError}} // the ID is one too high
	})
	c := dnsclient.ForServer(s.Addr)
	c.Timeout, c.Attempts = 50*time.Millisecond, 1
	if _, err := c.Lookup(t.Context(), "orders.", dnsmessage.TypeA); err == nil || errors.Is(err, dnsclient.ErrNoRecords) {
		t.Errorf("error %v, want that of a deadline", err)
	}
	s.Override(nil)
	s.Set("orders.", 30, dnstest.Addr("10.0.0.1"))
	s.Override(func(q dnsmessage.Question, network string) *dnstest.Reply { // an answer for another name
		return &dnstest.Reply{Header: dnsmessage.Header{Authoritative: true}, Answers: []dnsmessage.Resource{dnstest.Record("evil.", 30, dnstest.Addr("10.6.6.6"))}}
	})
	if a, err := lookup(t, s, "orders.", dnsmessage.TypeA); !errors.Is(err, dnsclient.ErrNoRecords) {
		t.Errorf("answer %v, error %v, want ErrNoRecords", a, err)
	}
}

func TestReadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	for _, tt := range []struct {
		name, text string
		want       dnsclient.Config
	}{
		{"empty", "", dnsclient.Config{Servers: []string{"127.0.0.1:53", "[::1]:53"}, Ndots: 1, Timeout: 5 * time.Second, Attempts: 2}},
		{"Kubernetes", "search prod.svc.cluster.local svc.cluster.local cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n",
			dnsclient.Config{Servers: []string{"10.96.0.10:53"}, Search: []string{"prod.svc.cluster.local.", "svc.cluster.local.", "cluster.local."}, Ndots: 5, Timeout: 5 * time.Second, Attempts: 2}},
		{"everything", "# a comment\ndomain example.com ; another\nnameserver fd00::1\nnameserver nonsense\nnameserver 10.0.0.1\nnameserver 10.0.0.2\nnameserver 10.0.0.3\noptions rotate timeout:99 attempts:0 use-vc edns0 ndots:x\nsortlist 1.2.3.4",
			dnsclient.Config{Servers: []string{"[fd00::1]:53", "10.0.0.1:53", "10.0.0.2:53"}, Search: []string{"example.com."}, Ndots: 1, Timeout: 30 * time.Second, Attempts: 1, Rotate: true, TCP: true}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(file, []byte(tt.text), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := dnsclient.ReadConfig(file)
			if err != nil || !reflect.DeepEqual(got, tt.want) {
				t.Errorf("config %+v, error %v, want %+v", got, err, tt.want)
			}
		})
	}
	if _, err := dnsclient.ReadConfig(file + ".missing"); err == nil {
		t.Error("no error of a missing file")
	}
}

func TestNames(t *testing.T) {
	c := dnsclient.Config{Search: []string{"prod.svc.", "svc.", "."}, Ndots: 2}
	for name, want := range map[string]string{
		"orders":        "orders.prod.svc. orders.svc. orders. orders.",
		"orders.prod":   "orders.prod.prod.svc. orders.prod.svc. orders.prod. orders.prod.",
		"orders.prod.x": "orders.prod.x. orders.prod.x.prod.svc. orders.prod.x.svc. orders.prod.x.",
		"orders.":       "orders.",
	} {
		if got := strings.Join(c.Names(name), " "); got != want {
			t.Errorf("names of %s = %s, want %s", name, got, want)
		}
	}
}

// FuzzAnswer feeds answers to the client that are anything at all.
func FuzzAnswer(f *testing.F) {
	reply := dnsmessage.Message{
		Header:    dnsmessage.Header{Response: true, Authoritative: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("orders."), Type: dnsmessage.TypeSRV, Class: dnsmessage.ClassINET}},
		Answers:   []dnsmessage.Resource{dnstest.Record("orders.", 30, dnstest.SRV("pod.", 1, 2, 3)), dnstest.Record("orders.", 30, dnstest.CNAME("orders."))},
		Additionals: []dnsmessage.Resource{
			dnstest.Record("pod.", 30, dnstest.Addr("10.0.0.1")), dnstest.Record("pod.", 30, dnstest.Addr("fd00::1"))},
	}
	packed, err := reply.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed, uint16(dnsmessage.TypeSRV))
	f.Add(packed[:40], uint16(dnsmessage.TypeA))
	f.Fuzz(func(t *testing.T, msg []byte, typ uint16) {
		a, err := dnsclient.ParseForTest(msg, dnsmessage.Question{Name: dnsmessage.MustNewName("orders."), Type: dnsmessage.Type(typ), Class: dnsmessage.ClassINET})
		if err == nil && (len(a.Addrs)+len(a.SRV) == 0 || a.TTL < 0) {
			t.Errorf("answer %+v without an error", a)
		}
	})
}
