// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// runLocal calls servers on loopback that come and go. It returns an error if a call fails.
func runLocal(ctx context.Context, out io.Writer) error {
	cluster, err := testserver.StartCluster(2, nil)
	if err != nil {
		return err
	}
	defer cluster.Close()
	api := newAPI()
	defer api.close()
	if err := api.set(cluster.Servers()...); err != nil {
		return err
	}
	conn, err := dial(&rest.Config{Host: api.server.URL}, "k8s:///prod/orders:grpc")
	if err != nil {
		return err
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)
	calls := 0
	// until makes calls until all that it made last were answered by the servers.
	until := func(what string, n int) error {
		for {
			seen := map[string]bool{}
			for range 50 {
				calls++
				r, err := client.Unary(ctx, &testingv1.UnaryRequest{})
				if err != nil {
					return fmt.Errorf("call %d: %w", calls, err)
				}
				seen[r.GetObserved().GetServer()] = true
			}
			if len(seen) == n {
				fmt.Fprintf(out, "%s: %d pods answer\n", what, n)
				return nil
			}
		}
	}
	if err := until("at first", 2); err != nil {
		return err
	}
	if _, err := cluster.Add(); err != nil {
		return err
	}
	if err := api.set(cluster.Servers()...); err != nil {
		return err
	}
	if err := until("a pod was added", 3); err != nil {
		return err
	}
	// A pod that is told to stop is terminating, and serves what it has.
	if err := api.set(cluster.Servers()[1:]...); err != nil {
		return err
	}
	if err := until("a pod is about to leave", 2); err != nil {
		return err
	}
	if err := cluster.Server(0).GracefulStop(ctx); err != nil {
		return err
	}
	if err := until("it has left", 2); err != nil {
		return err
	}
	fmt.Fprintf(out, "%d calls: none failed\n", calls)
	return nil
}

// api is an API server that has the EndpointSlices of one service, a slice for each pod,
// because here pods have the same address and different ports.
type api struct {
	server *httptest.Server

	mu      sync.Mutex // guards what is below
	version int
	slices  map[string]*discoveryv1.EndpointSlice
	changed chan struct{} // closed at the next change
}

func newAPI() *api {
	a := &api{slices: map[string]*discoveryv1.EndpointSlice{}, changed: make(chan struct{})}
	a.server = httptest.NewServer(a)
	return a
}

func (a *api) close() {
	a.server.CloseClientConnections() // Ends the watches.
	a.server.Close()
}

// set says which pods are ready. Those that it has and that are not among them are
// terminating from now on.
func (a *api) set(pods ...*testserver.Server) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.version++
	for _, slice := range a.slices {
		ready, yes := false, true
		slice.Endpoints[0].Conditions = discoveryv1.EndpointConditions{Ready: &ready, Serving: &yes, Terminating: &yes}
	}
	for _, p := range pods {
		host, port, err := net.SplitHostPort(p.Addr())
		if err != nil {
			return err
		}
		number, err := strconv.ParseInt(port, 10, 32)
		if err != nil {
			return err
		}
		name, portName, portNumber, ready := p.Name(), "grpc", int32(number), true
		a.slices[name] = &discoveryv1.EndpointSlice{
			ObjectMeta:  metav1.ObjectMeta{Name: name, Namespace: "prod", Labels: map[string]string{discoveryv1.LabelServiceName: "orders"}},
			AddressType: discoveryv1.AddressTypeIPv4,
			Endpoints: []discoveryv1.Endpoint{{
				Addresses: []string{host}, Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &ready},
			}},
			Ports: []discoveryv1.EndpointPort{{Name: &portName, Port: &portNumber}},
		}
	}
	for _, slice := range a.slices {
		slice.ResourceVersion = strconv.Itoa(a.version)
	}
	close(a.changed)
	a.changed = make(chan struct{})
	return nil
}

// ServeHTTP answers lists and watches as an API server does that knows no watches which
// begin with a list.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	if r.URL.Query().Get("sendInitialEvents") == "true" {
		w.WriteHeader(http.StatusUnprocessableEntity)
		_ = json.NewEncoder(w).Encode(metav1.Status{
			TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"},
			Status:   metav1.StatusFailure, Code: http.StatusUnprocessableEntity, Reason: metav1.StatusReasonInvalid,
		})
		return
	}
	if r.URL.Query().Get("watch") == "" {
		a.mu.Lock()
		defer a.mu.Unlock()
		list := discoveryv1.EndpointSliceList{
			TypeMeta: metav1.TypeMeta{Kind: "EndpointSliceList", APIVersion: "discovery.k8s.io/v1"},
			ListMeta: metav1.ListMeta{ResourceVersion: strconv.Itoa(a.version)},
		}
		for _, slice := range a.slices {
			list.Items = append(list.Items, *slice)
		}
		_ = json.NewEncoder(w).Encode(list)
		return
	}
	since, _ := strconv.Atoi(r.URL.Query().Get("resourceVersion"))
	w.(http.Flusher).Flush()
	for {
		a.mu.Lock()
		changed := a.changed
		if since < a.version {
			since = a.version
			for _, slice := range a.slices {
				object := slice.DeepCopy()
				object.TypeMeta = metav1.TypeMeta{Kind: "EndpointSlice", APIVersion: "discovery.k8s.io/v1"}
				_ = json.NewEncoder(w).Encode(map[string]any{"type": "MODIFIED", "object": object})
			}
			w.(http.Flusher).Flush()
		}
		a.mu.Unlock()
		select {
		case <-changed:
		case <-r.Context().Done():
			return
		}
	}
}
