// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
)

// pod makes an endpoint. The conditions are letters: r ready, s serving, t
// terminating; upper case for false; none is not set.
func pod(name, addr, conditions string, more ...func(*discoveryv1.Endpoint)) discoveryv1.Endpoint {
	ep := discoveryv1.Endpoint{Addresses: []string{addr}}
	if name != "" {
		ep.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: name, UID: types.UID("uid-" + name)}
	}
	yes, no := true, false
	for _, c := range conditions {
		switch c {
		case 'r':
			ep.Conditions.Ready = &yes
		case 'R':
			ep.Conditions.Ready = &no
		case 's':
			ep.Conditions.Serving = &yes
		case 'S':
			ep.Conditions.Serving = &no
		case 't':
			ep.Conditions.Terminating = &yes
		case 'T':
			ep.Conditions.Terminating = &no
		}
	}
	for _, f := range more {
		f(&ep)
	}
	return ep
}

func inZone(zone string) func(*discoveryv1.Endpoint) {
	return func(ep *discoveryv1.Endpoint) { ep.Zone = &zone }
}

func forZones(zones ...string) func(*discoveryv1.Endpoint) {
	return func(ep *discoveryv1.Endpoint) {
		ep.Hints = &discoveryv1.EndpointHints{}
		for _, z := range zones {
			ep.Hints.ForZones = append(ep.Hints.ForZones, discoveryv1.ForZone{Name: z})
		}
	}
}

func withUID(uid types.UID) func(*discoveryv1.Endpoint) {
	return func(ep *discoveryv1.Endpoint) { ep.TargetRef.UID = uid }
}

// v6 makes a slice one of IPv6 addresses.
func v6(s *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	s.AddressType = discoveryv1.AddressTypeIPv6
	return s
}

func ofType(addressType discoveryv1.AddressType, s *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
	s.AddressType = addressType
	return s
}

func TestBackends(t *testing.T) {
	udp := sliceWith("a", nil, pod("p", "10.0.0.1", ""))
	proto, name, number := corev1.ProtocolUDP, "grpc", int32(8080)
	udp.Ports = []discoveryv1.EndpointPort{{Name: &name, Port: &number, Protocol: &proto}}
	two := map[string]int32{"grpc": 8080, "http": 9090}
	type list = []*discoveryv1.EndpointSlice
	for _, tt := range []struct {
		name         string
		source       source
		slices       list
		want, wantEr string
	}{
		{"none", source{}, nil, "", ""},
		{"of a service without pods", source{port: "grpc"}, list{sliceWith("a", nil)}, "", ""},
		{"conditions that are not set", source{}, list{makeSlice("a", pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:8080", ""},
		{"not ready", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "RST"), pod("q", "10.0.0.2", "rsT"))}, "q=10.0.0.2:8080", ""},
		{"serving and not ready", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "RsT"))}, "", ""},
		{"terminating", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "Rst"), pod("q", "10.0.0.2", "RSt"))}, "p=10.0.0.1:8080 draining", ""},
		{"terminating, published although not ready", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "rst"), pod("q", "10.0.0.2", "rSt"))}, "p=10.0.0.1:8080 draining", ""},
		{"zone", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "", inZone("z")))}, "p=10.0.0.1:8080 in z", ""},
		{"without a pod", source{}, list{makeSlice("a", pod("", "10.0.0.1", ""))}, "10.0.0.1:8080=10.0.0.1:8080", ""},
		{"dual stack", source{}, list{v6(makeSlice("a", pod("p", "fd00::1", ""))), makeSlice("b", pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:8080 [fd00::1]:8080", ""},
		{"names of hosts", source{}, list{ofType(discoveryv1.AddressTypeFQDN, makeSlice("a", pod("p", "example.org", "")))}, "", ""},
		{"in two slices", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "")), makeSlice("b", pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:8080", ""},
		{"in two slices, one out of date", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "Rst")), makeSlice("b", pod("p", "10.0.0.1", "rsT"))}, "p=10.0.0.1:8080", ""},
		{"in two slices, the last one out of date", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "rsT")), makeSlice("b", pod("p", "10.0.0.1", "Rst"))}, "p=10.0.0.1:8080", ""},
		{"successor of the same name", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "Rst", withUID("old"))), makeSlice("b", pod("p", "10.0.0.2", ""))}, "p=10.0.0.2:8080", ""},
		{"successor in the first slice", source{}, list{makeSlice("a", pod("p", "10.0.0.2", "")), makeSlice("b", pod("p", "10.0.0.1", "Rst", withUID("old")))}, "p=10.0.0.2:8080", ""},
		{"named port", source{port: "http"}, list{sliceWith("a", two, pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:9090", ""},
		{"named port with two numbers", source{port: "grpc"}, list{makeSlice("a", pod("p", "10.0.0.1", "")), sliceWith("b", map[string]int32{"grpc": 8081}, pod("q", "10.0.0.2", ""))}, "p=10.0.0.1:8080, q=10.0.0.2:8081", ""},
		{"number", source{port: "9090"}, list{sliceWith("a", two, pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:9090", ""},
		{"number, and slices that list no ports", source{port: "9090"}, list{sliceWith("a", nil, pod("p", "10.0.0.1", ""))}, "p=10.0.0.1:9090", ""},
		{"number that is not there", source{port: "80"}, list{makeSlice("a", pod("p", "10.0.0.1", ""))}, "", `no port "80": write the name or the number of one of grpc=8080`},
		{"one slice without the port", source{port: "grpc"}, list{makeSlice("a", pod("p", "10.0.0.1", "")), sliceWith("b", map[string]int32{"http": 1}, pod("q", "10.0.0.2", ""))}, "p=10.0.0.1:8080", `no port "grpc"`},
		{"no port chosen of two", source{}, list{sliceWith("a", two, pod("p", "10.0.0.1", ""))}, "", "several ports: write the name"},
		{"UDP", source{}, list{udp}, "", "no TCP port"},
		{"address that is none", source{}, list{makeSlice("a", pod("p", "nonsense", ""), pod("q", "10.0.0.2", ""))}, "q=10.0.0.2:8080", `address "nonsense" is not an IP address`},
		{"without an address", source{}, list{makeSlice("a", discoveryv1.Endpoint{})}, "", "has no address"},
		{"hints", source{zone: "z"}, list{makeSlice("a", pod("p", "10.0.0.1", "", forZones("z")), pod("q", "10.0.0.2", "", forZones("y")))}, "p=10.0.0.1:8080", ""},
		{"hints, not asked for", source{}, list{makeSlice("a", pod("p", "10.0.0.1", "", forZones("z")), pod("q", "10.0.0.2", "", forZones("y")))}, "p=10.0.0.1:8080, q=10.0.0.2:8080", ""},
		{"hints, one without", source{zone: "z"}, list{makeSlice("a", pod("p", "10.0.0.1", "", forZones("z")), pod("q", "10.0.0.2", ""))}, "p=10.0.0.1:8080, q=10.0.0.2:8080", ""},
		{"hints, none for the zone", source{zone: "x"}, list{makeSlice("a", pod("p", "10.0.0.1", "", forZones("z")), pod("q", "10.0.0.2", "", forZones("y")))}, "p=10.0.0.1:8080, q=10.0.0.2:8080", ""},
		{"hints, a draining one without", source{zone: "z"}, list{makeSlice("a", pod("p", "10.0.0.1", "", forZones("z")), pod("q", "10.0.0.2", "Rst"))}, "p=10.0.0.1:8080", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var objects []any
			for _, s := range tt.slices {
				objects = append(objects, s)
			}
			set, err := tt.source.backends(objects)
			if got := show(set); got != tt.want {
				t.Errorf("endpoints %q, want %q", got, tt.want)
			}
			if (err == nil) != (tt.wantEr == "") || err != nil && !strings.Contains(err.Error(), tt.wantEr) {
				t.Errorf("error %v, want %q", err, tt.wantEr)
			}
		})
	}
}

func show(set map[string]backend) string {
	var parts []string
	for _, key := range slices.Sorted(maps.Keys(set)) {
		b := set[key]
		part := key + "=" + b.addrs
		if b.zone != "" {
			part += " in " + b.zone
		}
		if b.draining {
			part += " draining"
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ", ")
}

// The controller puts 100 endpoints into a slice, and one that is used last is not
// all there are.
func TestAllSlicesOfAServiceCount(t *testing.T) {
	var objects []any
	want := make(map[string]backend)
	for n := range 3 {
		s := makeSlice(fmt.Sprint("orders-", n))
		for i := n * 100; i < min(n*100+100, 250); i++ {
			name := fmt.Sprint("pod-", i)
			s.Endpoints = append(s.Endpoints, pod(name, ipv4(i), "rsT"))
			want[name] = backend{addrs: ipv4(i) + ":8080"}
		}
		objects = append(objects, s)
	}
	got, err := source{}.backends(objects)
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%d endpoints, error %v, want %d", len(got), err, len(want))
	}
}
