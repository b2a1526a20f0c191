// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/grpc/experimental/balancer/weight"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/place"
)

// An EndpointOption adds to the endpoint that [Endpoint] makes.
type EndpointOption interface {
	apply(*resolver.Endpoint) error
}

type endpointOption func(*resolver.Endpoint) error

func (o endpointOption) apply(ep *resolver.Endpoint) error { return o(ep) }

// Endpoint returns an endpoint with one address. The address is a host and
// port such as "10.0.0.1:443", "[::1]:443" or "db.internal:443", a "unix:"
// path, or whatever the channel's own dialer (grpc.WithContextDialer)
// understands; gRPC connects to it as it stands and gives it no default port.
//
// It returns an error if an address is empty or contains white space, or if
// an option's value is out of range. Each channel checks whether it can dial
// the address, because only the channel knows whether it has a dialer of its
// own. Without one, an address that has a scheme, no port, or a port that does
// not exist is reported, and the endpoint is ignored.
func Endpoint(address string, opts ...EndpointOption) (resolver.Endpoint, error) {
	var ep resolver.Endpoint
	if err := Address(address).apply(&ep); err != nil {
		return resolver.Endpoint{}, err
	}
	for i, opt := range opts {
		if opt == nil {
			return resolver.Endpoint{}, fmt.Errorf("discover: endpoint %q: option %d is nil", address, i)
		}
		if err := opt.apply(&ep); err != nil {
			return resolver.Endpoint{}, fmt.Errorf("discover: endpoint %q: %w", address, err)
		}
	}
	return ep, nil
}

// MustEndpoint is [Endpoint] for addresses written in the program. It panics
// where Endpoint returns an error.
func MustEndpoint(address string, opts ...EndpointOption) resolver.Endpoint {
	ep, err := Endpoint(address, opts...)
	if err != nil {
		panic(err)
	}
	return ep
}

// Address adds a further address of the same server, for example its IPv6
// address. gRPC connects to one address of an endpoint at a time, and tries
// them in the order given. A [ServerName] given before holds for it too.
func Address(address string) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		if address == "" {
			return errors.New("address is empty")
		}
		if strings.ContainsAny(address, " \t\r\n") {
			return fmt.Errorf("address %q contains white space", address)
		}
		a := resolver.Address{Addr: address}
		if len(ep.Addresses) > 0 {
			a.ServerName = ep.Addresses[0].ServerName
		}
		ep.Addresses = append(ep.Addresses, a)
		return nil
	})
}

// ServerName sets the name that the server's certificate must have, and the
// ":authority" of calls to the endpoint, in place of those of the channel. It
// holds for all addresses of the endpoint. The name must not be empty; it may
// have a port. Take it only from data as trustworthy as the program itself.
//
// gRPC tells endpoints apart by their addresses alone: of two with the same
// addresses and different server names only one is used.
func ServerName(name string) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		if name == "" {
			return errors.New("server name is empty: must be a name; leave the option out to use the channel's")
		}
		for i := range ep.Addresses {
			ep.Addresses[i].ServerName = name
		}
		return nil
	})
}

// Weight gives the endpoint a capacity relative to the others. It must be at
// least 1. An endpoint without a weight counts as 1.
func Weight(w uint32) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		if w == 0 {
			return errors.New("weight 0: must be at least 1; leave out an endpoint that is to get no calls")
		}
		*ep = weight.Set(*ep, weight.EndpointInfo{Weight: w})
		return nil
	})
}

// Zone says where the endpoint is: a datacentre, a region, a rack. The policy belfry.p2c
// prefers endpoints in the caller's zone if its field zones says so. The name must not be
// empty.
func Zone(name string) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		if name == "" {
			return errors.New("zone is empty: must be a name; leave the option out if there is none")
		}
		*ep = SetZone(*ep, name)
		return nil
	})
}

// Draining says that the endpoint is about to leave. The policy belfry.p2c sends it no new
// calls while another endpoint is READY. It keeps the connection, so that calls in flight
// can finish. gRPC's own policies ignore it.
func Draining() EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		*ep = SetDraining(*ep, true)
		return nil
	})
}

// Group puts the endpoint into a priority group, for the policy belfry.priority. Group 0
// gets the calls while enough of its endpoints are healthy. Otherwise the next higher
// group that has endpoints gets them. An endpoint without a group belongs to group 0.
func Group(group uint32) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		*ep = SetGroup(*ep, group)
		return nil
	})
}

// Key names the endpoint within its set, for [List], [Poll] and [FullSets]. By
// default its addresses are its key. A new set that has another address under
// the same key replaces the endpoint. The key must not be empty.
func Key(key string) EndpointOption {
	return endpointOption(func(ep *resolver.Endpoint) error {
		if key == "" {
			return errors.New("key is empty: must be a name; leave the option out to use the addresses")
		}
		*ep = SetKey(*ep, key)
		return nil
	})
}

// WeightOf returns the endpoint's weight as set by [Weight], or by
// google.golang.org/grpc/experimental/balancer/weight, and 1 if there is none.
func WeightOf(ep resolver.Endpoint) uint32 {
	return max(1, weight.FromEndpoint(ep).Weight)
}

// A key has a type of its own, so that it cannot collide with the attributes of another
// package. Attributes are compared with its Equal method.
type (
	keyKey struct{}
	key    string
)

// Equal reports whether o is the same key.
func (k key) Equal(o any) bool {
	other, ok := o.(key)
	return ok && other == k
}

// String makes logs of the attributes show the key.
func (k key) String() string { return string(k) }

func (keyKey) String() string { return "belfry.key" }

// SetZone returns a copy of the endpoint that is in the given zone. An empty
// name means that the zone is not known.
func SetZone(ep resolver.Endpoint, name string) resolver.Endpoint {
	return place.SetZone(ep, name)
}

// ZoneOf returns the endpoint's zone, or "" if it has none.
func ZoneOf(ep resolver.Endpoint) string {
	return place.Zone(ep)
}

// SetGroup returns a copy of the endpoint that belongs to the given priority group. The
// first group is 0. See [Group].
func SetGroup(ep resolver.Endpoint, group uint32) resolver.Endpoint {
	return place.SetGroup(ep, group)
}

// GroupOf returns the endpoint's priority group, or 0 if it has none.
func GroupOf(ep resolver.Endpoint) uint32 {
	return place.Group(ep)
}

// SetDraining returns a copy of the endpoint that is draining if drains is true, and is
// not draining otherwise. See [Draining].
func SetDraining(ep resolver.Endpoint, drains bool) resolver.Endpoint {
	return place.SetDraining(ep, drains)
}

// IsDraining reports whether the endpoint is draining.
func IsDraining(ep resolver.Endpoint) bool { return place.Draining(ep) }

// SetKey returns a copy of the endpoint with the given key. Every endpoint that
// this package publishes carries the key of the [Insert] it came with.
func SetKey(ep resolver.Endpoint, name string) resolver.Endpoint {
	ep.Attributes = place.SetAttribute(ep.Attributes, keyKey{}, key(name))
	return ep
}

// KeyOf returns the endpoint's key, or "" if it has none. A published endpoint
// that several keys share has the smallest of them.
func KeyOf(ep resolver.Endpoint) string {
	k, _ := ep.Attributes.Value(keyKey{}).(key)
	return string(k)
}

// checkEndpoint says why an endpoint cannot be published.
func checkEndpoint(ep resolver.Endpoint) error {
	if len(ep.Addresses) == 0 {
		return errors.New("it has no addresses")
	}
	for i, a := range ep.Addresses {
		if a.Addr == "" {
			return fmt.Errorf("address %d is empty", i)
		}
	}
	return nil
}

// checkDialable says why an endpoint cannot be used by a channel without a
// dialer of its own, and what to write instead.
func checkDialable(ep resolver.Endpoint) error {
	if err := checkEndpoint(ep); err != nil {
		return err
	}
	for _, a := range ep.Addresses {
		// gRPC's resolvers set an attribute that says what kind of address it is.
		if a.Attributes != nil || strings.HasPrefix(a.Addr, "unix:") {
			continue
		}
		if err := checkDialAddress(a.Addr); err != nil {
			return err
		}
	}
	return nil
}

func checkDialAddress(address string) error {
	if name, ok := strings.CutPrefix(address, "unix-abstract:"); ok {
		return fmt.Errorf("address %q: write %q", address, "unix:@"+name)
	}
	if _, rest, ok := strings.Cut(address, "://"); ok {
		// A target such as dns://server/orders:80 has an authority before its name.
		rest = rest[strings.LastIndexByte(rest, '/')+1:]
		return fmt.Errorf("address %q has a scheme: write %q", address, rest)
	}
	bare := address
	if strings.HasPrefix(bare, "[") && strings.HasSuffix(bare, "]") {
		bare = bare[1 : len(bare)-1]
	}
	if ip, err := netip.ParseAddr(bare); err == nil {
		return fmt.Errorf("address %q has no port: write %q", address, net.JoinHostPort(ip.String(), "443"))
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		if !strings.Contains(address, ":") {
			return fmt.Errorf("address %q has no port: write %q", address, address+":443")
		}
		if i := strings.LastIndexByte(address, ':'); i >= 0 {
			if ip, err := netip.ParseAddr(address[:i]); err == nil {
				return fmt.Errorf("address %q: write an IPv6 address in brackets, %q", address, net.JoinHostPort(ip.String(), address[i+1:]))
			}
		}
		return fmt.Errorf("address %q is not a host and port: write %q, or set a dialer that knows what it is", address, "host:443")
	}
	if n, err := strconv.ParseUint(port, 10, 16); (err != nil || n == 0) && !isServiceName(port) {
		return fmt.Errorf("address %q: port %q: must be from 1 to 65535: write %q", address, port, net.JoinHostPort(host, "443"))
	}
	return nil
}

// isServiceName reports whether a port can be the name of a service, such as
// "https", which the dialer looks up (RFC 6335, section 5.1).
func isServiceName(port string) bool {
	letter := false
	for _, c := range []byte(port) {
		switch {
		case 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z':
			letter = true
		case '0' <= c && c <= '9' || c == '-':
		default:
			return false
		}
	}
	return letter
}

// addressID identifies an endpoint as gRPC's resolver.EndpointMap does: by the
// unordered set of its addresses, without attributes.
func addressID(ep resolver.Endpoint) string {
	if len(ep.Addresses) == 1 {
		return ep.Addresses[0].Addr
	}
	addrs := make([]string, len(ep.Addresses))
	for i, a := range ep.Addresses {
		addrs[i] = strconv.Quote(a.Addr)
	}
	slices.Sort(addrs)
	return strings.Join(addrs, ",")
}

// nameOf returns the key of an endpoint in a full set: its own, or else its
// addresses.
func nameOf(ep resolver.Endpoint) string {
	if k := KeyOf(ep); k != "" {
		return k
	}
	return addressID(ep)
}

// keyed returns the endpoints of a full set by their keys. An endpoint that is
// listed twice counts once. Two endpoints with one key are an error.
func keyed(endpoints []resolver.Endpoint) (map[string]resolver.Endpoint, error) {
	set := make(map[string]resolver.Endpoint, len(endpoints))
	for i, ep := range endpoints {
		k := nameOf(ep)
		if other, ok := set[k]; ok && addressID(other) != addressID(ep) {
			return nil, fmt.Errorf("discover: endpoint %d: key %q is taken by another endpoint of the set, %s: keys must be unique", i, k, addressID(other))
		}
		ep.Addresses = slices.Clone(ep.Addresses) // full sets tend to be built in place, again and again
		set[k] = ep
	}
	return set, nil
}

// equalEndpoints reports whether two endpoints are the same for a balancing
// policy and for the connections.
func equalEndpoints(a, b resolver.Endpoint) (equal bool) {
	if len(a.Addresses) == len(b.Addresses) && len(a.Addresses) > 0 && &a.Addresses[0] == &b.Addresses[0] && a.Attributes == b.Attributes {
		return true
	}
	defer notComparable(&equal)
	return slices.EqualFunc(a.Addresses, b.Addresses, resolver.Address.Equal) && a.Attributes.Equal(b.Attributes)
}

// equalAddresses reports whether two lists of addresses would share their
// connections.
func equalAddresses(a, b []resolver.Address) (equal bool) {
	defer notComparable(&equal)
	return slices.EqualFunc(a, b, resolver.Address.Equal)
}

// notComparable is deferred where attributes are compared. Values without an
// Equal method are compared with ==, which panics on maps, slices and functions.
// Values that cannot be compared count as changed.
func notComparable(equal *bool) {
	if recover() != nil {
		*equal = false
	}
}
