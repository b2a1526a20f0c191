// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/resolver/discover"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

type set = enginetest.Set

func newSource(t *testing.T, cfg *rest.Config, target string, opts ...Option) discover.Source {
	t.Helper()
	src, err := New(cfg, target, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return src
}

func TestArguments(t *testing.T) {
	for _, tt := range []struct {
		target string
		want   source
	}{
		{"prod/orders:grpc", source{namespace: "prod", service: "orders", port: "grpc"}},
		{"prod/orders:8080", source{namespace: "prod", service: "orders", port: "8080"}},
		{"prod/orders", source{namespace: "prod", service: "orders"}},
	} {
		if got, err := parseTarget(tt.target); err != nil || got != tt.want {
			t.Errorf("target %q is %+v, error %v, want %+v", tt.target, got, err, tt.want)
		}
	}
	for target, want := range map[string]string{
		"":                   "must be namespace/service:port",
		"orders:80":          "must be namespace/service:port",
		"/orders:80":         `namespace ""`,
		"prod/:80":           `service ""`,
		"prod/orders:":       `port ""`,
		"prod/orders:a b":    `port "a b"`,
		"prod/orders/x:80":   `service "orders/x"`,
		"Prod/orders:80":     `namespace "Prod"`,
		"prod/orders.x:grpc": `service "orders.x"`,
	} {
		if _, err := New(&rest.Config{}, target); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New(%q): error %v, want one that contains %q", target, err, want)
		}
	}
	if _, err := New(nil, "a/b"); err == nil {
		t.Error("New without a config: no error")
	}
	if _, err := New(&rest.Config{}, "a/b", nil); err == nil || !strings.Contains(err.Error(), "option 0 is nil") {
		t.Errorf("New with a nil option: error %v", err)
	}
	if _, err := New(&rest.Config{}, "a/b", Hints("")); err == nil || !strings.Contains(err.Error(), "the zone is empty") {
		t.Errorf("New with Hints of no zone: error %v", err)
	}
	if _, err := New(&rest.Config{Host: "::"}, "a/b"); err == nil {
		t.Error("New with a bad host: no error")
	}
}

func TestSource(t *testing.T) {
	orders := func() *discoveryv1.EndpointSlice { return makeSlice("orders-a", pod("p", "10.0.0.1", "")) }
	one := set{"p": "10.0.0.1:8080*1@"}
	two := set{"p": "10.0.0.1:8080*1@", "q": "10.0.0.2:8080*1@z"}
	second := func() *discoveryv1.EndpointSlice {
		return makeSlice("orders-b", pod("q", "10.0.0.2", "", inZone("z")))
	}

	for _, old := range []bool{false, true} {
		t.Run(fmt.Sprintf("follows the slices of its service, server old %v", old), func(t *testing.T) {
			t.Parallel()
			api := startAPIServer(t)
			api.change(func() { api.old = old })
			other := makeSlice("other", pod("o", "10.0.0.9", ""))
			other.Labels[discoveryv1.LabelServiceName] = "other"
			api.put(other)
			w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc"))
			w.WaitSet(t, set{}) // known to be empty
			api.put(orders())
			w.WaitSet(t, one)
			api.put(second())
			w.WaitSet(t, two)
			api.put(makeSlice("orders-a"))
			w.WaitSet(t, set{"q": "10.0.0.2:8080*1@z"})
			api.remove("orders-b")
			w.WaitSet(t, set{})
			if errs := w.Errors(); len(errs) > 0 {
				t.Errorf("errors %q", errs)
			}
		})
	}

	t.Run("says that it may not list, and follows when it may", func(t *testing.T) {
		t.Parallel()
		api := startAPIServer(t)
		api.put(orders())
		api.breakWith(func(w http.ResponseWriter) { fail(w, http.StatusForbidden, metav1.StatusReasonForbidden) })
		w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc"))
		w.WaitError(t, "kubernetes: prod/orders: failed to list")
		api.breakWith(nil)
		w.WaitSet(t, one)
	})

	for name, broken := range map[string]func(w http.ResponseWriter){
		"errors":       func(w http.ResponseWriter) { fail(w, http.StatusInternalServerError, metav1.StatusReasonInternalError) },
		"nonsense":     func(w http.ResponseWriter) { fmt.Fprint(w, "<html>nonsense</html>") },
		"no one there": func(http.ResponseWriter) { panic(http.ErrAbortHandler) },
	} {
		t.Run("survives "+name, func(t *testing.T) {
			t.Parallel()
			api := startAPIServer(t)
			api.put(orders())
			w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc"))
			w.WaitSet(t, one)
			api.breakWith(broken)
			api.put(second())
			api.compact()
			api.waitAsked(2)
			api.breakWith(nil)
			w.WaitSet(t, two)
			if errs := w.Errors(); len(errs) > 3 {
				t.Errorf("errors %q, want each once", errs)
			}
		})
	}

	t.Run("survives a compaction of what it missed", func(t *testing.T) {
		t.Parallel()
		api := startAPIServer(t)
		api.put(orders())
		w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc"))
		w.WaitSet(t, one)
		api.put(second())
		api.compact()
		api.disconnect()
		w.WaitSet(t, two)
	})

	t.Run("keeps its set while no endpoint can be used", func(t *testing.T) {
		t.Parallel()
		api := startAPIServer(t)
		api.put(sliceWith("orders-a", map[string]int32{"http": 80}, pod("p", "10.0.0.1", "")))
		w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc"))
		w.WaitError(t, `kubernetes: prod/orders: its endpoints have no port "grpc"`)
		if w.Known() {
			t.Error("there is a set, although no endpoint has the port")
		}
		api.put(orders())
		w.WaitSet(t, one)
		api.put(makeSlice("orders-a", pod("p", "nonsense", "")))
		w.WaitError(t, "is not an IP address")
		api.put(orders(), second())
		w.WaitSet(t, two)
	})

	t.Run("follows hints", func(t *testing.T) {
		t.Parallel()
		api := startAPIServer(t)
		api.put(makeSlice("orders-a", pod("p", "10.0.0.1", "", forZones("a")), pod("q", "10.0.0.2", "", forZones("b"))))
		w := enginetest.Watch(t, newSource(t, api.config(), "prod/orders:grpc", Hints("a")))
		w.WaitSet(t, one)
	})
}

func TestErrorsAreReportedOnce(t *testing.T) {
	n := 0
	w := watch{yield: func(discover.Change, error) bool { n++; return true }}
	for i := range 3 {
		w.report(context.Background(), fmt.Errorf("failed to list: %w", &url.Error{
			Op: "Get", URL: fmt.Sprint("http://host?timeoutSeconds=", i),
			Err: &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: i}, Err: syscall.ECONNRESET},
		}))
	}
	if n != 1 {
		t.Errorf("%d reports of three errors that differ in a port and a timeout, want 1", n)
	}
	w.report(context.Background(), context.DeadlineExceeded)
	if n != 2 {
		t.Errorf("%d reports after another error, want 2", n)
	}
}

// client-go says nothing of an API server that refuses connections after it was well.
func TestRefusedConnectionsAreReported(t *testing.T) {
	api := startAPIServer(t)
	cfg := api.config()
	var down atomic.Bool
	cfg.Dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if down.Load() {
			return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
		}
		return new(net.Dialer).DialContext(ctx, network, addr)
	}
	channel := enginetest.Dial(t, newSource(t, cfg, "prod/orders:grpc"))
	channel.WaitSet(t, set{})
	down.Store(true)
	api.disconnect()
	channel.WaitError(t, "connection refused")
	down.Store(false)
	channel.WaitWell(t) // although no pod says so
}

// While the API server is out of order calls go on with the last set, each error is
// reported once, and the source catches up. The flag -outage says how long that is.
func TestOutages(t *testing.T) {
	api := startAPIServer(t)
	addrs := enginetest.Serve(t, 2)
	proxy := enginetest.NewProxy(t)
	target := func() string { return api.http.Listener.Addr().String() }
	proxy.ForwardTo(target())
	n := 0
	change := func() set {
		n++
		host, port, _ := strings.Cut(addrs[n%2], ":")
		var number int32
		fmt.Sscan(port, &number)
		key := fmt.Sprint("pod-", n)
		api.put(sliceWith("orders", map[string]int32{"grpc": number}, pod(key, host, "")))
		return set{key: addrs[n%2] + "*1@"}
	}
	want := change()
	channel := enginetest.Dial(t, newSource(t, &rest.Config{Host: "http://" + proxy.Addr()}, "prod/orders:grpc"))
	channel.WaitSet(t, want)
	channel.Load(4)
	channel.Survive(t, change, append(proxy.Disturb(target), enginetest.Disturbance{
		Name: "too many requests",
		Begin: func() {
			api.breakWith(func(w http.ResponseWriter) {
				fail(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests)
			})
		},
		End:  func() { api.breakWith(nil) },
		Told: "TooManyRequests",
	}, enginetest.Disturbance{
		Name:  "restarted without its history",
		Begin: api.disconnect,
		End:   api.compact,
	})...)
}

// A store has the slices of an API server.
type store interface {
	put(slices ...*discoveryv1.EndpointSlice)
	remove(name string)
}

// addPod9 removes pod 9 and adds it again, at addr, and waits until the server behind it has
// its share of the calls.
func addPod9(t *testing.T, api store, channel *enginetest.Channel, model set, change func(int), addr, server string) {
	t.Helper()
	api.remove("orders-9-0")
	api.remove("orders-9-1")
	delete(model, "pod-9")
	channel.WaitSet(t, model)
	began := time.Now()
	for model["pod-9"] != addr+"*1@z" {
		change(9)
	}
	channel.WaitShare(t, server, len(model))
	t.Logf("a new pod had its share of the calls %v after it was ready", time.Since(began))
}

// randomPod changes a pod in one of the ways that happen, and notes it in the model. The
// pod has two slices of its own, and pod 0 is always ready.
func randomPod(rng *rand.Rand, api store, i int, addr string, model set) {
	host, port, _ := strings.Cut(addr, ":")
	var number int32
	fmt.Sscan(port, &number)
	key := fmt.Sprint("pod-", i)
	slice := func(half int, conditions ...string) *discoveryv1.EndpointSlice {
		s := sliceWith(fmt.Sprintf("orders-%d-%d", i, half), map[string]int32{"grpc": number, "other": 1})
		for _, c := range conditions {
			s.Endpoints = append(s.Endpoints, pod(key, host, c, inZone("z")))
		}
		return s
	}
	const ready, draining, unready = "rsT", "Rst", "RST"
	shown := addr + "*1@z"
	switch kind := rng.IntN(7); {
	case kind == 0 || i == 0: // pod-0 stays, so that calls need not fail.
		api.put(slice(0, ready))
		model[key] = shown
	case kind == 1: // in both slices, one of them out of date
		api.put(slice(0, ready), slice(1, draining))
		model[key] = shown
	case kind == 2:
		api.put(slice(0), slice(1, draining))
		model[key] = shown + " draining"
	case kind == 3:
		api.put(slice(0, unready), slice(1))
		delete(model, key)
	case kind == 4:
		api.remove(fmt.Sprintf("orders-%d-0", i))
		api.remove(fmt.Sprintf("orders-%d-1", i))
		delete(model, key)
	default: // It moves.
		half := rng.IntN(2)
		api.put(slice(half, ready))
		api.put(slice(1 - half))
		model[key] = shown
	}
}

// At rest the channel has what the API server has, and no call has failed, after
// 1,000 changes: pods come, drain and go, move between slices, and the server is
// disturbed in every way.
func TestRandomChanges(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	api := startAPIServer(t)
	// Each server has a port of its own, and so each pod a slice.
	addrs := enginetest.Serve(t, 10)
	model := set{}
	change := func(i int) { randomPod(rng, api, i, addrs[i], model) }
	for range 3 {
		for i := range addrs {
			change(i)
		}
	}
	channel := enginetest.Dial(t, newSource(t, api.config(), "prod/orders:grpc"))
	channel.WaitSet(t, model)
	channel.Load(4)

	disturbances := rng.Perm(6)
	for n := range 1000 {
		if n%160 == 99 {
			api.breakWith(nil)
			switch disturbances[n/160] {
			case 0:
				api.disconnect()
			case 1:
				api.compact()
				api.disconnect()
			case 2:
				api.breakWith(func(w http.ResponseWriter) {
					fail(w, http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests)
				})
			case 3:
				api.breakWith(func(w http.ResponseWriter) { fmt.Fprint(w, "nonsense") })
			case 4:
				api.breakWith(func(http.ResponseWriter) { panic(http.ErrAbortHandler) })
			default:
				api.change(func() { api.old = !api.old })
				api.compact()
				api.disconnect()
			}
			api.waitAsked(1)
		}
		change(rng.IntN(len(addrs)))
		if n%10 == 0 {
			// Let the channel see some of it.
			if _, err := channel.Call(); err != nil {
				t.Errorf("call: %v", err)
			}
		}
	}
	api.breakWith(nil)
	channel.WaitSet(t, model)
	channel.Stop(t)
	for _, err := range channel.Errors() {
		t.Log(err)
	}

	addPod9(t, api, channel, model, change, addrs[9], addrs[9])
}
