// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"

	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/resolver/discover"
)

// A backend holds what an endpoint is made of. It can be compared with ==.
type backend struct {
	addrs    string // separated by spaces
	zone     string
	draining bool
}

func (b backend) endpoint() resolver.Endpoint {
	var ep resolver.Endpoint
	for addr := range strings.FieldsSeq(b.addrs) {
		ep.Addresses = append(ep.Addresses, resolver.Address{Addr: addr})
	}
	if b.zone != "" {
		ep = discover.SetZone(ep, b.zone)
	}
	return discover.SetDraining(ep, b.draining)
}

// A candidate is one endpoint, put together from all slices that contain it.
type candidate struct {
	uid   types.UID // of the pod, if there is one
	addrs []netip.AddrPort
	zone  string
	ready bool     // else it is draining
	zones []string // that it is meant for
}

// backends returns the endpoints in the slices, by key, and an error if some of
// them cannot be used.
func (s source) backends(objects []any) (map[string]backend, error) {
	var all []*discoveryv1.EndpointSlice
	for _, o := range objects {
		if slice, ok := o.(*discoveryv1.EndpointSlice); ok && slice.AddressType != discoveryv1.AddressTypeFQDN {
			all = append(all, slice)
		}
	}
	// If slices disagree, the result must not depend on the order they came in.
	slices.SortFunc(all, func(a, b *discoveryv1.EndpointSlice) int { return strings.Compare(a.Name, b.Name) })
	candidates := make(map[string]*candidate)
	var fault error
	for _, slice := range all {
		for i := range slice.Endpoints {
			ep := &slice.Endpoints[i]
			ready, draining := state(ep.Conditions)
			if !ready && !draining {
				continue
			}
			addr, err := s.addrPort(slice, ep)
			if err != nil {
				fault = err
				continue
			}
			add(candidates, ep, addr, ready)
		}
	}
	s.followHints(candidates)
	set := make(map[string]backend, len(candidates))
	for key, c := range candidates {
		slices.SortFunc(c.addrs, netip.AddrPort.Compare)
		var addrs []string
		for _, a := range c.addrs {
			addrs = append(addrs, a.String())
		}
		set[key] = backend{addrs: strings.Join(addrs, " "), zone: c.zone, draining: !c.ready}
	}
	return set, fault
}

// state says whether an endpoint is ready or draining; one that is neither is left out.
// The comments of [discoveryv1.EndpointConditions] give the defaults.
func state(c discoveryv1.EndpointConditions) (ready, draining bool) {
	isReady := c.Ready == nil || *c.Ready
	serving := c.Serving == nil || *c.Serving
	if c.Terminating != nil && *c.Terminating {
		// Ready does not count: with publishNotReadyAddresses it may be true even now.
		return false, serving
	}
	return isReady, false
}

// addrPort returns the address and port of an endpoint. Addresses after the first have no
// meaning.
func (s source) addrPort(slice *discoveryv1.EndpointSlice, ep *discoveryv1.Endpoint) (netip.AddrPort, error) {
	port, err := s.portOf(slice)
	if err != nil {
		return netip.AddrPort{}, err
	}
	if len(ep.Addresses) == 0 {
		return netip.AddrPort{}, fmt.Errorf("slice %s: an endpoint has no address", slice.Name)
	}
	addr, err := netip.ParseAddr(ep.Addresses[0])
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("slice %s: address %q is not an IP address", slice.Name, ep.Addresses[0])
	}
	return netip.AddrPortFrom(addr, port), nil
}

func (s source) portOf(slice *discoveryv1.EndpointSlice) (uint16, error) {
	number, _ := strconv.ParseUint(s.port, 10, 16)
	if len(slice.Ports) == 0 && number > 0 {
		return uint16(number), nil
	}
	var found []uint16
	var names []string
	for _, p := range slice.Ports {
		if p.Port == nil || *p.Port < 1 || *p.Port > 65535 || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP {
			continue
		}
		name := ""
		if p.Name != nil {
			name = *p.Name
		}
		names = append(names, fmt.Sprintf("%s=%d", name, *p.Port))
		if s.port == "" || s.port == name || number == uint64(*p.Port) {
			found = append(found, uint16(*p.Port))
		}
	}
	switch {
	case len(names) == 0:
		return 0, errors.New("its endpoints have no TCP port")
	case len(found) == 0:
		return 0, fmt.Errorf("its endpoints have no port %q: write the name or the number of one of %s", s.port, strings.Join(names, ", "))
	case len(found) > 1:
		return 0, fmt.Errorf("its endpoints have several ports: write the name or the number of one of %s", strings.Join(names, ", "))
	}
	return found[0], nil
}

// add adds what a slice says of an endpoint to its candidate.
func add(candidates map[string]*candidate, ep *discoveryv1.Endpoint, addr netip.AddrPort, ready bool) {
	key, uid := addr.String(), types.UID("")
	if ref := ep.TargetRef; ref != nil && ref.Kind == "Pod" && ref.Name != "" {
		key, uid = ref.Name, ref.UID
	}
	c := candidates[key]
	if c == nil || c.uid != uid && ready && !c.ready {
		// A ready pod replaces a draining one of the same name, as in a StatefulSet.
		c = &candidate{uid: uid}
		candidates[key] = c
	}
	if c.uid != uid {
		return
	}
	// While an endpoint moves, one of its slices may be out of date. It is worse to
	// leave out a good endpoint than to use a bad one for a moment.
	c.ready = c.ready || ready
	if !slices.Contains(c.addrs, addr) {
		c.addrs = append(c.addrs, addr)
	}
	if ep.Zone != nil && c.zone == "" {
		c.zone = *ep.Zone
	}
	if ep.Hints != nil {
		for _, z := range ep.Hints.ForZones {
			c.zones = append(c.zones, z.Name)
		}
	}
}

// followHints removes the candidates whose hints do not name the zone, if the rule of
// [Hints] says so.
func (s source) followHints(candidates map[string]*candidate) {
	if s.zone == "" {
		return
	}
	meant := false
	for _, c := range candidates {
		if c.ready && len(c.zones) == 0 {
			return
		}
		meant = meant || c.ready && slices.Contains(c.zones, s.zone)
	}
	if !meant {
		return
	}
	for key, c := range candidates {
		if !slices.Contains(c.zones, s.zone) {
			delete(candidates, key)
		}
	}
}
