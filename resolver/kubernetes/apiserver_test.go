// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/rest"
)

// An apiServer serves lists and watches of EndpointSlices over HTTP as
// Kubernetes' API server does: by label and resource version, with 410 Gone after
// a compaction.
type apiServer struct {
	http *httptest.Server

	// mu guards the fields below.
	mu        sync.Mutex
	old       bool // knows no watches that begin with a list
	version   int
	slices    map[string]*discoveryv1.EndpointSlice
	events    []event
	compacted int           // events up to this version are gone
	changed   chan struct{} // closed at the next change of any field
	broken    func(w http.ResponseWriter)
	conns     map[net.Conn]struct{}
	requests  int
}

type event struct {
	version int
	kind    string
	slice   *discoveryv1.EndpointSlice
}

func startAPIServer(t *testing.T) *apiServer {
	s := &apiServer{
		slices:  make(map[string]*discoveryv1.EndpointSlice),
		changed: make(chan struct{}),
		conns:   make(map[net.Conn]struct{}),
	}
	s.http = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.http.Config.ConnState = func(c net.Conn, state http.ConnState) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if state == http.StateNew {
			s.conns[c] = struct{}{}
		} else if state == http.StateClosed {
			delete(s.conns, c)
		}
	}
	s.http.Start()
	t.Cleanup(func() {
		s.http.CloseClientConnections()
		s.http.Close()
	})
	return s
}

func (s *apiServer) config() *rest.Config { return &rest.Config{Host: s.http.URL} }

// change runs f under the lock and wakes the watches.
func (s *apiServer) change(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f()
	close(s.changed)
	s.changed = make(chan struct{})
}

// put creates or replaces slices.
func (s *apiServer) put(slices ...*discoveryv1.EndpointSlice) {
	s.change(func() {
		for _, slice := range slices {
			kind := "ADDED"
			if s.slices[slice.Name] != nil {
				kind = "MODIFIED"
			}
			s.recordLocked(kind, slice)
			s.slices[slice.Name] = s.events[len(s.events)-1].slice
		}
	})
}

func (s *apiServer) remove(name string) {
	s.change(func() {
		if slice := s.slices[name]; slice != nil {
			delete(s.slices, name)
			s.recordLocked("DELETED", slice)
		}
	})
}

// recordLocked notes an event. Caller must hold mu.
func (s *apiServer) recordLocked(kind string, slice *discoveryv1.EndpointSlice) {
	slice = slice.DeepCopy()
	s.version++
	slice.ResourceVersion = strconv.Itoa(s.version)
	s.events = append(s.events, event{s.version, kind, slice})
}

// compact forgets all events.
func (s *apiServer) compact() {
	s.change(func() { s.compacted, s.events = s.version, nil })
}

// disconnect breaks all connections.
func (s *apiServer) disconnect() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.Close()
	}
}

// breakWith breaks all connections, and answers every request with f until f is
// nil.
func (s *apiServer) breakWith(f func(w http.ResponseWriter)) {
	s.change(func() { s.broken = f })
	s.disconnect()
}

// waitAsked waits until the server has been asked n more times.
func (s *apiServer) waitAsked(n int) {
	for before := -1; ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		now := s.requests
		s.mu.Unlock()
		if before < 0 {
			before = now
		}
		if now >= before+n {
			return
		}
	}
}

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(status(code, reason))
}

func status(code int, reason metav1.StatusReason) metav1.Status {
	return metav1.Status{
		TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
		Status:   metav1.StatusFailure, Code: int32(code), Reason: reason, Message: string(reason),
	}
}

func (s *apiServer) serve(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.requests++
	broken := s.broken
	s.mu.Unlock()
	if broken != nil {
		broken(w)
		return
	}
	query := r.URL.Query()
	selector, err := labels.Parse(query.Get("labelSelector"))
	if r.URL.Path != "/apis/discovery.k8s.io/v1/namespaces/prod/endpointslices" || err != nil {
		fail(w, http.StatusNotFound, metav1.StatusReasonNotFound)
		return
	}
	matches := func(slice *discoveryv1.EndpointSlice) bool { return selector.Matches(labels.Set(slice.Labels)) }
	if watch, _ := strconv.ParseBool(query.Get("watch")); watch {
		s.watch(w, r, matches)
		return
	}
	s.mu.Lock()
	list := discoveryv1.EndpointSliceList{
		TypeMeta: metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"},
		ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(s.version)},
		Items:    []discoveryv1.EndpointSlice{},
	}
	for _, slice := range s.slices {
		if matches(slice) {
			list.Items = append(list.Items, *slice)
		}
	}
	s.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(list)
}

func (s *apiServer) watch(w http.ResponseWriter, r *http.Request, matches func(*discoveryv1.EndpointSlice) bool) {
	send := func(kind string, object any) {
		_ = json.NewEncoder(w).Encode(map[string]any{"type": kind, "object": object})
		w.(http.Flusher).Flush()
	}
	typed := func(slice *discoveryv1.EndpointSlice) *discoveryv1.EndpointSlice {
		slice = slice.DeepCopy()
		slice.TypeMeta = metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"}
		return slice
	}
	from, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		s.mu.Lock()
		if s.old {
			s.mu.Unlock()
			fail(w, http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
			return
		}
		var initial []*discoveryv1.EndpointSlice
		for _, slice := range s.slices {
			if matches(slice) {
				initial = append(initial, typed(slice))
			}
		}
		from = s.version
		s.mu.Unlock()
		for _, slice := range initial {
			send("ADDED", slice)
		}
		end := typed(&discoveryv1.EndpointSlice{})
		end.ResourceVersion = strconv.Itoa(from)
		end.Annotations = map[string]string{metav1.InitialEventsAnnotationKey: "true"}
		send("BOOKMARK", end)
	}
	w.(http.Flusher).Flush()
	for {
		s.mu.Lock()
		changed, gone := s.changed, from < s.compacted
		i := slices.IndexFunc(s.events, func(e event) bool { return e.version > from })
		var events []event
		if i >= 0 {
			events = s.events[i:]
		}
		s.mu.Unlock()
		if gone {
			send("ERROR", status(http.StatusGone, metav1.StatusReasonExpired))
			return
		}
		for _, e := range events {
			from = e.version
			if matches(e.slice) {
				send(e.kind, typed(e.slice))
			}
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}

// makeSlice makes a slice of the service orders with the port grpc=8080.
func makeSlice(name string, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	return sliceWith(name, map[string]int32{"grpc": 8080}, endpoints...)
}

func sliceWith(name string, ports map[string]int32, endpoints ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "prod",
			Labels: map[string]string{discoveryv1.LabelServiceName: "orders"},
		},
		AddressType: discoveryv1.AddressTypeIPv4,
		Endpoints:   endpoints,
	}
	for name, port := range ports {
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
	}
	return s
}

// ipv4 returns addresses, all different.
func ipv4(i int) string { return fmt.Sprintf("10.0.%d.%d", i/256, i%256) }
