// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/dnsclient"
)

// DNSScheme is the URL scheme of targets that [DNS] serves without any option:
// "belfry-dns:///orders.prod.svc.cluster.local:8080". The authority of the target,
// if it has one, is the DNS server to ask, as in
// "belfry-dns://10.96.0.10/orders.prod:8080".
const DNSScheme = "belfry-dns"

func init() {
	b, err := NewBuilder(DNSScheme, func(target resolver.Target) (Source, error) {
		var opts []DNSOption
		if target.URL.Host != "" {
			opts = append(opts, DNSServer(target.URL.Host))
		}
		return DNS(target.Endpoint(), opts...)
	}, WithAuthority(dnsAuthority))
	if err != nil {
		panic(err)
	}
	resolver.Register(b)
}

// dnsAuthority returns the domain if the target is a service, and otherwise the
// authority that gRPC's own "dns" scheme uses.
func dnsAuthority(target resolver.Target) string {
	name := target.Endpoint()
	if labels := strings.SplitN(name, ".", 3); isService(labels) {
		name = labels[2]
	}
	return escapeAuthority(name)
}

// isService reports whether the labels are "_service", "_proto" and a domain.
func isService(labels []string) bool {
	return len(labels) == 3 && strings.HasPrefix(labels[0], "_") && strings.HasPrefix(labels[1], "_") && labels[2] != ""
}

// readDNSConfig is replaced in tests.
var readDNSConfig = func() (dnsclient.Config, error) { return dnsclient.ReadConfig("/etc/resolv.conf") }

const (
	defaultDNSMinInterval = time.Second
	// maxDNSInterval limits how long a moved server is missed if its TTL is days.
	maxDNSInterval = 5 * time.Minute
	dnsTimeout     = 30 * time.Second
	// A look happens earlier than the end of the TTL, by a random part of it of up
	// to this fraction, so that clients do not all ask at once.
	dnsJitter = 0.1
)

// A DNSOption changes how [DNS] asks.
type DNSOption interface{ apply(*dnsSource) error }

type dnsOption func(*dnsSource) error

func (o dnsOption) apply(s *dnsSource) error { return o(s) }

// DNSServer sets the DNS server to ask: an IP address and a port, or an IP address
// alone for port 53. There is no search list then. By default the servers of
// /etc/resolv.conf are asked.
func DNSServer(address string) DNSOption {
	return dnsOption(func(s *dnsSource) error {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			host, port = strings.Trim(address, "[]"), "53"
		}
		if _, err := netip.ParseAddr(host); err != nil {
			return fmt.Errorf("DNSServer %q: must be an IP address, with or without a port", address)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("DNSServer %q: port must be from 1 to 65535", address)
		}
		s.server = net.JoinHostPort(host, port)
		return nil
	})
}

// DNSMinInterval sets the least time from a successful look to the next one, for
// records with a TTL of 0, or to reduce the load on the server. After a failed
// look [WithBackoff] says how long to wait. By default 1 s. It must be from 100 ms
// to 5 minutes.
func DNSMinInterval(d time.Duration) DNSOption {
	return dnsOption(func(s *dnsSource) error {
		if d < 100*time.Millisecond || d > maxDNSInterval {
			return fmt.Errorf("DNSMinInterval %v: must be from 100ms to %v", d, maxDNSInterval)
		}
		s.minInterval = d
		return nil
	})
}

// DNSGroups publishes the SRV records of every priority. The number of an endpoint's
// group is the priority of its record; see [Group]. It is for the policy
// belfry.priority, which fails over from one group to the next when the servers
// cannot be reached. Other policies ignore groups, and would call the spare servers
// like all others. By default only the records of the best priority that has an
// address are published. Targets other than services have no priorities.
func DNSGroups() DNSOption {
	return dnsOption(func(s *dnsSource) error {
		s.groups = true
		return nil
	})
}

// DNS returns a source of the endpoints that DNS has for a target. It looks again
// before the TTL of the answer ends, so that it sees a change at the latest one TTL
// after it. (gRPC's own "dns" scheme looks again only when a connection breaks.)
//
//	src, err := discover.DNS("orders.prod.svc.cluster.local:8080")
//
// The target is one of
//
//   - "host:port": each A and AAAA record of the host is an endpoint;
//   - "_service._proto.domain", such as "_grpc._tcp.orders.prod.svc.cluster.local":
//     each SRV record is an endpoint, with its port, its weight, and the addresses
//     of its target. If the target has several addresses of one family, each of its
//     addresses is an endpoint, and they share the weight. [WeightOf] returns 100
//     times the weight of the record, and 1 for a record of weight 0. Only the
//     records of the best priority that has an address are used, unless [DNSGroups]
//     is given;
//   - "address:port" with an IP address, or "localhost:port": one fixed endpoint,
//     without DNS. That of localhost has the addresses 127.0.0.1 and ::1.
//
// Ports must be numbers. A relative name is tried with the search list and ndots
// of /etc/resolv.conf, which is read again for each look. The name that was
// answered is used until it no longer exists. The hosts file is not read.
//
// A look that takes longer than 30 s fails. An answer that there is no such name or
// record is an error too. The last set stays, each different error is reported once
// until a look succeeds, and the next look happens with the backoff of
// [WithBackoff], after 5 minutes at most. If only the A or only the AAAA records of
// a host cannot be looked up, the last known ones are used. The targets of a
// service then have the addresses of the other family only.
//
// The interval between looks is the TTL less up to a tenth, at least
// [DNSMinInterval] and at most 5 minutes. When a connection fails, the next look
// happens as soon as DNSMinInterval has passed since the last, unless the last
// failed.
//
// DNS returns an error if the target is none of these, or an option is bad. The
// source may be used by any number of channels, each of which looks for itself.
func DNS(target string, opts ...DNSOption) (Source, error) {
	s := dnsSource{minInterval: defaultDNSMinInterval}
	for i, opt := range opts {
		if opt == nil {
			return nil, fmt.Errorf("discover: DNS: option %d is nil", i)
		}
		if err := opt.apply(&s); err != nil {
			return nil, fmt.Errorf("discover: DNS: %w", err)
		}
	}
	if strings.HasPrefix(target, "_") {
		if !isService(strings.SplitN(target, ".", 3)) || strings.Contains(target, ":") {
			return nil, fmt.Errorf("discover: DNS: target %q: write \"_service._proto.domain\", without a port, or \"host:port\"", target)
		}
		s.name = target
		return s, nil
	}
	if err := checkDialAddress(target); err != nil {
		return nil, fmt.Errorf("discover: DNS: target: %w", err)
	}
	s.name, s.port, _ = net.SplitHostPort(target)
	if s.name == "" {
		return nil, fmt.Errorf("discover: DNS: target %q has no host: write \"host%s\"", target, target)
	}
	if _, err := strconv.Atoi(s.port); err != nil {
		return nil, fmt.Errorf("discover: DNS: target %q: port %q: must be a number", target, s.port)
	}
	if _, err := netip.ParseAddr(s.name); err == nil {
		return List(MustEndpoint(target))
	}
	if s.name == "localhost" {
		return List(MustEndpoint(net.JoinHostPort("127.0.0.1", s.port), Address(net.JoinHostPort("::1", s.port))))
	}
	return s, nil
}

// dnsSource is immutable.
type dnsSource struct {
	name        string
	port        string // "": SRV records say it
	server      string // "": those of resolv.conf
	minInterval time.Duration
	groups      bool // SRV records of all priorities count
}

// Watch implements [Source].
func (s dnsSource) Watch(ctx context.Context) iter.Seq2[Change, error] {
	w := dnsWatch{dnsSource: s}
	return fullSets(poller{look: w.look, timeout: dnsTimeout, spacing: s.minInterval}.poll).Watch(ctx)
}

// dnsWatch is one watch. Its looks do not overlap.
type dnsWatch struct {
	dnsSource
	found string // the absolute name that has answered last; "": none yet
	last  map[dnsmessage.Type][]netip.Addr
}

func (w *dnsWatch) look(ctx context.Context) ([]resolver.Endpoint, time.Duration, error) {
	endpoints, ttl, err := w.resolve(ctx)
	if err != nil {
		return nil, maxDNSInterval, fmt.Errorf("DNS: %w", err)
	}
	wait := time.Duration(float64(ttl) * (1 - dnsJitter*rand.Float64()))
	return endpoints, min(max(wait, w.minInterval), maxDNSInterval), nil
}

// resolve tries the name that was answered last, and then all names that w.name can
// mean.
func (w *dnsWatch) resolve(ctx context.Context) ([]resolver.Endpoint, time.Duration, error) {
	config := dnsclient.ForServer(w.server)
	if w.server == "" {
		var err error
		if config, err = readDNSConfig(); err != nil {
			return nil, 0, fmt.Errorf("%w; name a server with DNSServer", err)
		}
	}
	find := w.hosts
	if w.port == "" {
		find = w.services
	}
	if w.found != "" {
		endpoints, ttl, err := find(ctx, config, w.found)
		if !errors.Is(err, dnsclient.ErrNoRecords) {
			return endpoints, ttl, err
		}
	}
	var failed error // the first; one that is not an answer says more than one that is
	for _, name := range config.Names(w.name) {
		endpoints, ttl, err := find(ctx, config, name)
		if err == nil {
			w.found = name
			return endpoints, ttl, nil
		}
		err = fmt.Errorf("%s: %w", strings.TrimSuffix(name, "."), err)
		if failed == nil || errors.Is(failed, dnsclient.ErrNoRecords) && !errors.Is(err, dnsclient.ErrNoRecords) {
			failed = err
		}
	}
	return nil, 0, failed
}

// hosts returns one endpoint for each address of a name.
func (w *dnsWatch) hosts(ctx context.Context, config dnsclient.Config, name string) ([]resolver.Endpoint, time.Duration, error) {
	addrs, ttl, err := w.addresses(ctx, config, name)
	if err != nil {
		return nil, 0, err
	}
	endpoints := make([]resolver.Endpoint, len(addrs))
	for i, a := range addrs {
		endpoints[i] = MustEndpoint(net.JoinHostPort(a.String(), w.port))
	}
	return endpoints, ttl, nil
}

// addresses asks for the A and the AAAA records of a name.
func (w *dnsWatch) addresses(ctx context.Context, config dnsclient.Config, name string) ([]netip.Addr, time.Duration, error) {
	types := []dnsmessage.Type{dnsmessage.TypeA, dnsmessage.TypeAAAA}
	answers := make([]dnsclient.Answer, len(types))
	errs := make([]error, len(types))
	var wg sync.WaitGroup
	for i, typ := range types {
		wg.Go(func() { answers[i], errs[i] = config.Lookup(ctx, name, typ) })
	}
	wg.Wait()
	known := name == w.found && w.last != nil
	last := make(map[dnsmessage.Type][]netip.Addr)
	var all []netip.Addr
	ttl := time.Duration(-1)
	for i, typ := range types {
		addrs := answers[i].Addrs
		switch {
		case errs[i] == nil:
			if ttl < 0 || answers[i].TTL < ttl {
				ttl = answers[i].TTL
			}
		case !errors.Is(errs[i], dnsclient.ErrNoRecords) && known:
			addrs = w.last[typ] // Who does not answer takes nothing away.
		}
		last[typ] = addrs
		all = append(all, addrs...)
	}
	if ttl < 0 { // Neither has records.
		if errors.Is(errs[0], dnsclient.ErrNoRecords) {
			return nil, 0, errs[1]
		}
		return nil, 0, errs[0]
	}
	if w.port != "" {
		w.last = last
	}
	return all, ttl, nil
}

// services returns the endpoints of the SRV records of a name.
func (w *dnsWatch) services(ctx context.Context, config dnsclient.Config, name string) ([]resolver.Endpoint, time.Duration, error) {
	answer, err := config.Lookup(ctx, name, dnsmessage.TypeSRV)
	if err != nil {
		return nil, 0, err
	}
	srv, ttl := answer.SRV, answer.TTL
	// Servers rotate their records, so their order means nothing.
	slices.SortStableFunc(srv, func(a, b dnsclient.SRV) int {
		return cmp.Or(cmp.Compare(a.Priority, b.Priority), strings.Compare(a.Target, b.Target), cmp.Compare(a.Port, b.Port))
	})
	if !completeGlue(srv) {
		if ttl, err = w.addAddresses(ctx, config, srv, ttl); err != nil {
			return nil, 0, err
		}
	}
	var all []resolver.Endpoint
	seen := make(map[string]bool) // An endpoint with several priorities has the best.
	for len(srv) > 0 {
		group := srv
		if i := slices.IndexFunc(srv, func(r dnsclient.SRV) bool { return r.Priority != srv[0].Priority }); i >= 0 {
			group = srv[:i]
		}
		srv = srv[len(group):]
		endpoints := serviceEndpoints(group)
		if !w.groups && len(endpoints) > 0 {
			return endpoints, ttl, nil
		}
		for _, ep := range endpoints {
			if id := addressID(ep); !seen[id] {
				seen[id] = true
				all = append(all, SetGroup(ep, uint32(group[0].Priority)))
			}
		}
	}
	if len(all) > 0 {
		return all, ttl, nil
	}
	return nil, 0, fmt.Errorf("%w: no target of the service has an address", dnsclient.ErrNoRecords)
}

// completeGlue reports whether all targets came with addresses of the same
// families. Otherwise some addresses may be missing, because servers leave them out
// of an answer that is too long.
func completeGlue(srv []dnsclient.SRV) bool {
	families := func(r dnsclient.SRV) (f [2]bool) {
		for _, a := range r.Addrs {
			if a.Is4() {
				f[0] = true
			} else {
				f[1] = true
			}
		}
		return f
	}
	for _, r := range srv {
		if len(r.Addrs) == 0 || families(r) != families(srv[0]) {
			return false
		}
	}
	return true
}

// maxDNSQuestions is the largest number of targets of a service that are looked up
// at the same time.
const maxDNSQuestions = 16

// addAddresses looks up the addresses of the targets. A target that has no address,
// for example because it is being set up, is left out. A lookup that fails is an
// error.
func (w *dnsWatch) addAddresses(ctx context.Context, config dnsclient.Config, srv []dnsclient.SRV, ttl time.Duration) (time.Duration, error) {
	var (
		wg   sync.WaitGroup
		mu   sync.Mutex // guards ttl
		errs = make([]error, len(srv))
		room = make(chan struct{}, maxDNSQuestions)
	)
	for i := range srv {
		srv[i].Addrs = nil
		if srv[i].Target == "." { // "Not available at this domain" (RFC 2782).
			continue
		}
		wg.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			addrs, t, err := w.addresses(ctx, config, srv[i].Target)
			srv[i].Addrs = addrs
			switch {
			case err == nil:
				mu.Lock()
				defer mu.Unlock()
				ttl = min(ttl, t)
			case !errors.Is(err, dnsclient.ErrNoRecords):
				errs[i] = err
			}
		})
	}
	wg.Wait()
	// The first error in the order of the records, so that the next look returns the
	// same.
	return ttl, cmp.Or(errs...)
}

// weightScale multiplies the weights of SRV records. So a record of weight 0 gets
// fewer calls than one of weight 1, but not none, and several addresses can share a
// weight.
const weightScale = 100

// serviceEndpoints returns the endpoints of records of one priority.
func serviceEndpoints(group []dnsclient.SRV) (endpoints []resolver.Endpoint) {
	for _, r := range group {
		if len(r.Addrs) == 0 {
			continue
		}
		slices.SortFunc(r.Addrs, netip.Addr.Compare) // IPv4 first; servers rotate them.
		addresses := make([]string, len(r.Addrs))
		v4 := 0
		for i, a := range r.Addrs {
			addresses[i] = net.JoinHostPort(a.String(), strconv.Itoa(int(r.Port)))
			if a.Is4() {
				v4++
			}
		}
		weight := uint32(r.Weight) * weightScale
		if several := v4 > 1 || len(addresses)-v4 > 1; !several {
			// At most one address of each family: they belong to one server.
			ep := MustEndpoint(addresses[0], Weight(max(1, weight)))
			for _, a := range addresses[1:] {
				ep.Addresses = append(ep.Addresses, resolver.Address{Addr: a})
			}
			endpoints = append(endpoints, ep)
			continue
		}
		for _, a := range addresses {
			endpoints = append(endpoints, MustEndpoint(a, Weight(max(1, weight/uint32(len(addresses))))))
		}
	}
	return endpoints
}
