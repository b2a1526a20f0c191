// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package enginetest helps to test a source of endpoints on a real discovery
// engine: a Watcher follows the source alone, and a Channel is a gRPC channel
// under load that tells which set its balancing policy was given.
package enginetest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/resolver/discover"
)

// patience is how long a set may take to come on a busy machine.
const patience = time.Minute

// A Set maps the key of each endpoint to what [Show] says of it.
type Set map[string]string

// Show returns an endpoint as text: addresses, weight, zone, group, and whether it
// drains.
func Show(ep resolver.Endpoint) string {
	var addrs []string
	for _, a := range ep.Addresses {
		addrs = append(addrs, a.Addr)
	}
	text := fmt.Sprintf("%s*%d@%s", strings.Join(addrs, "+"), discover.WeightOf(ep), discover.ZoneOf(ep))
	if g := discover.GroupOf(ep); g != 0 {
		text += fmt.Sprint(" group ", g)
	}
	if discover.IsDraining(ep) {
		text += " draining"
	}
	return text
}

// A view is what somebody knows of a source.
type view struct {
	// mu guards the fields below.
	mu      sync.Mutex
	set     Set
	errs    []string
	changed chan struct{} // closed at the next change
}

func newView() *view { return &view{changed: make(chan struct{})} }

func (v *view) update(set Set, err error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if err != nil {
		v.errs = append(v.errs, err.Error())
	}
	if set != nil {
		v.set = set
	}
	close(v.changed)
	v.changed = make(chan struct{})
}

// wait waits until done, which may look at set and errs, and reports false if it
// takes too long.
func (v *view) wait(done func() bool) bool {
	timeout := time.After(patience)
	for {
		v.mu.Lock()
		changed, ok := v.changed, done()
		v.mu.Unlock()
		if ok {
			return true
		}
		select {
		case <-changed:
		case <-timeout:
			return false
		}
	}
}

// WaitSet waits until the set is complete and equals want.
func (v *view) WaitSet(t *testing.T, want Set) {
	t.Helper()
	if !v.wait(func() bool { return v.set != nil && maps.Equal(v.set, want) }) {
		v.mu.Lock()
		defer v.mu.Unlock()
		t.Fatalf("the set is\n%v\nwant\n%v\nerrors %q", v.set, want, v.errs)
	}
}

// WaitKey waits until the set has the key.
func (v *view) WaitKey(t *testing.T, key string) {
	t.Helper()
	if !v.wait(func() bool { _, ok := v.set[key]; return ok }) {
		t.Fatalf("the set has no %q", key)
	}
}

// WaitError waits for an error that contains text.
func (v *view) WaitError(t *testing.T, text string) {
	t.Helper()
	if !v.wait(func() bool {
		return slices.ContainsFunc(v.errs, func(err string) bool { return strings.Contains(err, text) })
	}) {
		t.Fatalf("errors %q, want one that contains %q", v.Errors(), text)
	}
}

// WaitWell waits until the channel's source does not fail.
func (c *Channel) WaitWell(t *testing.T) {
	t.Helper()
	var err error
	for end := time.Now().Add(patience); time.Now().Before(end); time.Sleep(time.Millisecond) {
		err = nil
		for _, s := range discover.Sources() {
			if s.Target == c.target {
				err = s.Err
			}
		}
		if err == nil {
			return
		}
	}
	t.Fatalf("the source still fails: %v", err)
}

// Known reports whether there was a complete set yet.
func (v *view) Known() bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.set != nil
}

// Errors returns the errors so far.
func (v *view) Errors() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.errs)
}

// A Watcher follows a source as the resolver does.
type Watcher struct {
	*view
	cancel context.CancelFunc
	done   chan struct{}
}

// Watch follows src until Stop or the end of the test.
func Watch(t *testing.T, src discover.Source) *Watcher {
	ctx, cancel := context.WithCancel(context.Background())
	w := &Watcher{view: newView(), cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		set, synced := Set{}, false
		for element, err := range src.Watch(ctx) {
			if err != nil {
				w.update(nil, err)
				continue
			}
			for c := range element.All() {
				switch c.Op {
				case discover.OpInsert:
					set[c.Key] = Show(c.Endpoint)
				case discover.OpRemove:
					delete(set, c.Key)
				case discover.OpSynced:
					synced = true
				}
			}
			if synced {
				w.update(maps.Clone(set), nil)
			}
		}
	}()
	t.Cleanup(w.Stop)
	return w
}

// Stop ends the watch and waits for it.
func (w *Watcher) Stop() {
	w.cancel()
	<-w.done
}

// Serve starts n servers, on ports of their own, that answer every call until
// the end of the test, and returns their addresses.
func Serve(t *testing.T, n int) (addrs []string) {
	t.Helper()
	for range n {
		addr, err := ServeAt(t, "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addrs = append(addrs, addr)
	}
	return addrs
}

// ServeAt is Serve of one server at an address that may not be free. It returns the
// address.
func ServeAt(t *testing.T, addr string) (string, error) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return "", err
	}
	s := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var m emptypb.Empty
		if err := stream.RecvMsg(&m); err != nil {
			return err
		}
		return stream.SendMsg(&m)
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l) // ends with Stop
	}()
	t.Cleanup(func() { s.Stop(); <-done })
	return l.Addr().String(), nil
}

// A Channel is a gRPC channel under load.
type Channel struct {
	*view
	target string
	conn   *grpc.ClientConn
	stop   chan struct{}
	calls  sync.WaitGroup

	// failuresMu guards failures.
	failuresMu sync.Mutex
	failures   []error
	made       atomic.Int64
}

// Dial makes a channel that finds its endpoints through src. Load begins with
// the first complete set that is not empty. What fails is tried again sooner than by
// default.
func Dial(t *testing.T, src discover.Source, opts ...grpc.DialOption) *Channel {
	t.Helper()
	target := fmt.Sprintf("%s:///%s-%d", discover.Scheme, "enginetest", channels.Add(1))
	c := &Channel{view: newView(), target: target, stop: make(chan struct{})}
	views.Store(target, c.view)
	conn, err := grpc.NewClient(target, append([]grpc.DialOption{
		discover.WithSource(src, discover.WithBackoff(backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.5, MaxDelay: time.Second})),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"` + policy + `": {}}]}`),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	c.conn = conn
	conn.Connect()
	t.Cleanup(func() {
		c.Stop(t)
		conn.Close()
		views.Delete(target)
	})
	return c
}

// Load makes calls, n at a time, until Stop.
func (c *Channel) Load(n int) {
	for range n {
		c.calls.Go(func() {
			for {
				select {
				case <-c.stop:
					return
				default:
				}
				if _, err := c.Call(); err != nil {
					c.failuresMu.Lock()
					c.failures = append(c.failures, err)
					c.failuresMu.Unlock()
				}
				time.Sleep(time.Millisecond) // The load is there to be disturbed, not to fill the machine.
			}
		})
	}
}

// Call makes a call and returns the address of the server that answered.
func (c *Channel) Call() (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var p peer.Peer
	err := c.conn.Invoke(ctx, "/test.Service/Method", &emptypb.Empty{}, &emptypb.Empty{}, grpc.Peer(&p))
	c.made.Add(1)
	if err != nil {
		return "", err
	}
	return p.Addr.String(), nil
}

// WaitShare makes calls until the server at addr has answered at least half of what is
// its share among n.
func (c *Channel) WaitShare(t *testing.T, addr string, n int) {
	t.Helper()
	const share = 20
	for end := time.Now().Add(patience); ; {
		answered := 0
		for range share * n {
			if got, err := c.Call(); err == nil && got == addr {
				answered++
			}
		}
		if answered >= share/2 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s answered %d of the last %d calls, want its share among %d", addr, answered, share*n, n)
		}
	}
}

// Stop ends the load and fails the test if a call has failed.
func (c *Channel) Stop(t *testing.T) {
	t.Helper()
	select {
	case <-c.stop:
		return
	default:
	}
	close(c.stop)
	c.calls.Wait()
	if len(c.failures) > 0 {
		t.Errorf("%d of %d calls failed: %v", len(c.failures), c.made.Load(), c.failures[0])
	}
}

// policy is p2c, and tells the view of the channel what it is given.
const policy = "belfry_enginetest"

var (
	channels atomic.Int64
	views    sync.Map // of *view by target
)

func init() {
	b := balancer.Get(p2c.Name)
	balancer.Register(builder{b, b.(balancer.ConfigParser)})
}

type builder struct {
	balancer.Builder
	balancer.ConfigParser
}

func (builder) Name() string { return policy }

func (b builder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	v, _ := views.Load(opts.Target.String())
	return recorder{b.Builder.Build(cc, opts), v.(*view)}
}

type recorder struct {
	balancer.Balancer
	view *view
}

func (r recorder) UpdateClientConnState(s balancer.ClientConnState) error {
	set := Set{}
	for _, ep := range s.ResolverState.Endpoints {
		set[discover.KeyOf(ep)] = Show(ep)
	}
	err := r.Balancer.UpdateClientConnState(s)
	r.view.update(set, err)
	return err
}

func (r recorder) ResolverError(err error) {
	r.Balancer.ResolverError(err)
	r.view.update(nil, err)
}
