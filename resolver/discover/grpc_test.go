// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
)

// server answers every call, and counts its connections.
type server struct {
	addr string
	stop func()

	mu          sync.Mutex
	conns       int
	authorities []string
}

func (s *server) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (s *server) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (s *server) HandleRPC(context.Context, stats.RPCStats)                         {}
func (s *server) HandleConn(_ context.Context, c stats.ConnStats) {
	if _, ok := c.(*stats.ConnBegin); ok {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.conns++
	}
}

func startServer(t *testing.T) *server {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{addr: l.Addr().String()}
	gs := grpc.NewServer(grpc.StatsHandler(s), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		md, _ := metadata.FromIncomingContext(stream.Context())
		s.mu.Lock()
		s.authorities = append(s.authorities, md.Get(":authority")...)
		s.mu.Unlock()
		var m emptypb.Empty
		if err := stream.RecvMsg(&m); err != nil {
			return err
		}
		return stream.SendMsg(&m)
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = gs.Serve(l) // ends with Stop
	}()
	s.stop = func() { gs.Stop(); <-done }
	t.Cleanup(s.stop)
	return s
}

func startServers(t *testing.T, n int) (servers []*server) {
	for range n {
		servers = append(servers, startServer(t))
	}
	return servers
}

func addrs(servers ...*server) (addrs []string) {
	for _, s := range servers {
		addrs = append(addrs, s.addr)
	}
	slices.Sort(addrs)
	return addrs
}

func dial(t *testing.T, src discover.Source, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return dialTarget(t, "belfry:///orders", append(opts, discover.WithSource(src, exact()))...)
}

func dialTarget(t *testing.T, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(target, append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// call makes a call and returns the address that answered.
func call(ctx context.Context, conn *grpc.ClientConn, opts ...grpc.CallOption) (string, error) {
	var p peer.Peer
	err := conn.Invoke(ctx, "/test.Service/Method", &emptypb.Empty{}, &emptypb.Empty{}, append(opts, grpc.Peer(&p))...)
	if err != nil {
		return "", err
	}
	return p.Addr.String(), nil
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// wantReaches makes calls until ten rounds in a row were spread by round_robin
// over just these servers.
func wantReaches(t *testing.T, conn *grpc.ClientConn, servers ...*server) {
	t.Helper()
	ctx := testContext(t)
	want := addrs(servers...)
	var got []string
	for ctx.Err() == nil {
		seen := map[string]bool{}
		for range 10 * len(servers) {
			addr, err := call(ctx, conn, grpc.WaitForReady(true))
			if err != nil {
				addr = err.Error() // a server that is going down may fail a call
			}
			seen[addr] = true
		}
		got = got[:0]
		for a := range seen {
			got = append(got, a)
		}
		slices.Sort(got)
		if slices.Equal(got, want) {
			return
		}
	}
	t.Fatalf("calls reached %q, want %q", got, want)
}

func TestCallsWaitForTheFirstSetAndReachAllOfIt(t *testing.T) {
	servers := startServers(t, 3)
	ch := make(chan discover.Change, 10)
	conn := dial(t, must(discover.Channel(ch)))
	for i, s := range servers {
		ch <- ins(fmt.Sprint(i), s.addr)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := call(ctx, conn); status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("call before the first set = %v, want DeadlineExceeded", err)
	}
	ch <- discover.Synced()
	wantReaches(t, conn, servers...)

	ch <- discover.Remove("0")
	wantReaches(t, conn, servers[1:]...)
	servers[1].stop() // one down: the others only
	wantReaches(t, conn, servers[2])
}

func TestEmptySetFailsCallsAtOnceAndThoseThatWaitForReadyWait(t *testing.T) {
	s := startServer(t)
	ch := make(chan discover.Change, 10)
	conn := dial(t, must(discover.Channel(ch)))
	ch <- discover.Synced()
	if _, err := call(testContext(t), conn); status.Code(err) != codes.Unavailable {
		t.Errorf("call with an empty set = %v, want Unavailable", err)
	}
	result := make(chan error, 1)
	go func() {
		_, err := call(testContext(t), conn, grpc.WaitForReady(true))
		result <- err
	}()
	ch <- ins("a", s.addr)
	if err := <-result; err != nil {
		t.Errorf("call that waits for ready = %v, want nil", err)
	}
}

func TestErrorOfTheSourceReachesCallsUntilThereIsASet(t *testing.T) {
	s := startServer(t)
	fail := make(chan error, 1)
	fail <- errors.New("registry unreachable")
	src := sourceFunc(func(ctx context.Context, yield func(discover.Change, error) bool) {
		select {
		case err := <-fail:
			yield(discover.Change{}, err)
			return
		default:
		}
		if !yield(ins("a", s.addr), nil) || !yield(discover.Synced(), nil) {
			return
		}
		select {
		case <-ctx.Done():
		case err := <-fail:
			yield(discover.Change{}, err)
		}
	})
	conn := dial(t, src)
	_, err := call(testContext(t), conn)
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "watching belfry:///orders: registry unreachable") {
		t.Errorf("call = %v, want Unavailable with the source's error", err)
	}
	wantReaches(t, conn, s) // after the backoff
	fail <- errors.New("lost again")
	for range 100 {
		if _, err := call(testContext(t), conn); err != nil {
			t.Fatalf("call after the watch failed = %v, want the last good set to serve", err)
		}
	}
}

func TestChannelComesBackFromIdleWithTheSetAsItIsThen(t *testing.T) {
	servers := startServers(t, 2)
	ch := make(chan discover.Change, 10)
	conn := dial(t, must(discover.Channel(ch)), grpc.WithIdleTimeout(50*time.Millisecond))
	ch <- ins("0", servers[0].addr)
	ch <- discover.Synced()
	wantReaches(t, conn, servers[0])
	for range 2 {
		ctx := testContext(t)
		for s := conn.GetState(); s != connectivity.Idle; s = conn.GetState() {
			if !conn.WaitForStateChange(ctx, s) {
				t.Fatalf("state = %v, want IDLE", s)
			}
		}
		ch <- discover.Remove("0")
		ch <- ins("1", servers[1].addr)
		wantReaches(t, conn, servers[1])
	}
}

func TestTwoConnectionsOnOneChannelSource(t *testing.T) {
	servers := startServers(t, 2)
	ch := make(chan discover.Change, 10)
	src := must(discover.Channel(ch))
	a, b := dial(t, src), dial(t, src)
	ch <- ins("0", servers[0].addr)
	ch <- discover.Synced()
	wantReaches(t, a, servers[0])
	wantReaches(t, b, servers[0])
	ch <- ins("1", servers[1].addr)
	wantReaches(t, b, servers...)
	wantReaches(t, a, servers...)
	a.Close()
	ch <- discover.Remove("0")
	wantReaches(t, b, servers[1])
}

func TestChangeOfAttributesDoesNotReconnect(t *testing.T) {
	s, other := startServer(t), startServer(t)
	ch := make(chan discover.Change)
	conn := dial(t, must(discover.Channel(ch)))
	conn.Connect() // somebody must receive
	for i := range 20 {
		ch <- ins("a", s.addr, discover.Weight(uint32(i+1)), discover.Zone(fmt.Sprint(i)))
		ch <- discover.Synced()
		if _, err := call(testContext(t), conn); err != nil {
			t.Fatal(err)
		}
	}
	ch <- ins("a", other.addr) // when this has arrived, so have the others
	ch <- discover.Synced()
	wantReaches(t, conn, other)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conns != 1 {
		t.Errorf("%d connections, want 1", s.conns)
	}
}

func TestCallsGoOnWhileTheSetChanges(t *testing.T) {
	servers := startServers(t, 3)
	ch := make(chan discover.Change)
	conn := dial(t, must(discover.Channel(ch)))
	conn.Connect()
	ch <- ins("0", servers[0].addr)
	ch <- discover.Synced()
	ctx := testContext(t)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 200 {
				if _, err := call(ctx, conn, grpc.WaitForReady(true)); err != nil {
					t.Errorf("call = %v", err)
					return
				}
			}
		})
	}
	for i := range 50 {
		ch <- ins("1", servers[1+i%2].addr)
		ch <- discover.Synced()
		ch <- discover.Remove("1")
		ch <- discover.Synced()
	}
	wg.Wait()
}

func TestServiceConfigOfTheSourceChoosesThePolicy(t *testing.T) {
	servers := startServers(t, 2)
	ch := make(chan discover.Change, 10)
	conn := dial(t, must(discover.Channel(ch)), grpc.WithDefaultServiceConfig(`{}`))
	ch <- discover.ServiceConfig(`{"loadBalancingConfig":[{"no such policy":{}}]}`) // does not disturb the set
	ch <- ins("0", servers[0].addr)
	ch <- discover.Synced()
	if _, err := call(testContext(t), conn); err != nil {
		t.Errorf("call with a bad service config = %v, want nil", err)
	}
	ch <- ins("1", servers[1].addr)
	ch <- discover.ServiceConfig(`{"loadBalancingConfig":[{"round_robin":{}}]}`)
	wantReaches(t, conn, servers...)
}

func TestAuthorityOnTheWire(t *testing.T) {
	s := startServer(t)
	conn := dialTarget(t, "belfry:///prod/payments", discover.WithSource(must(discover.List(ep(s.addr)))))
	if _, err := call(testContext(t), conn); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if want := []string{"payments.prod"}; !slices.Equal(s.authorities, want) {
		t.Errorf("authority = %q, want %q", s.authorities, want)
	}
}

func TestRegisteredSchemeOpensTheSourceOfTheTarget(t *testing.T) {
	s := startServer(t)
	scheme := fmt.Sprint("belfry-test-", time.Now().UnixNano()) // there is no way to unregister one
	err := discover.Register(scheme, func(target resolver.Target) (discover.Source, error) {
		if target.URL.Host != "registry" || target.Endpoint() != "orders" {
			return nil, fmt.Errorf("unknown: %s", target)
		}
		e, err := discover.Endpoint(s.addr, discover.Zone(target.URL.Query().Get("zone")))
		if err != nil {
			return nil, err
		}
		return discover.List(e)
	})
	if err != nil {
		t.Fatal(err)
	}
	wantReaches(t, dialTarget(t, scheme+"://registry/orders?zone=a"), s)
	_, err = call(testContext(t), dialTarget(t, scheme+"://registry/orders"))
	wantError(t, err, "zone is empty")
}

// TestProxyThatCollapsesEndpointsIsLogged runs itself in a process with a proxy
// in its environment, which net/http reads once per process.
func TestProxyThatCollapsesEndpointsIsLogged(t *testing.T) {
	const child = "BELFRY_TEST_PROXY_CHILD"
	if os.Getenv(child) != "" {
		conn, err := grpc.NewClient("belfry:///orders", grpc.WithTransportCredentials(insecure.NewCredentials()),
			discover.WithSource(must(discover.List(ep("192.0.2.1:443"), ep("192.0.2.2:443")))))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx := testContext(t)
		conn.Connect() // to the proxy, which refuses
		for s := conn.GetState(); s != connectivity.TransientFailure; s = conn.GetState() {
			if !conn.WaitForStateChange(ctx, s) {
				t.Fatalf("state = %v, want TRANSIENT_FAILURE", s)
			}
		}

		// Through grpc's own resolver, which is between with a proxy, a channel with
		// two sources is seen too.
		list := must(discover.List(ep("192.0.2.1:443")))
		two, err := grpc.NewClient("belfry:///orders", grpc.WithTransportCredentials(insecure.NewCredentials()),
			discover.WithSource(list), discover.WithSource(list))
		if err != nil {
			t.Fatal(err)
		}
		defer two.Close()
		_, err = call(ctx, two)
		wantError(t, err, "has 2 sources")
		return
	}
	cmd := exec.CommandContext(testContext(t), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), child+"=1", "HTTPS_PROXY=http://user:secret@127.0.0.1:1", "NO_PROXY=",
		"https_proxy=", "no_proxy=", "GRPC_GO_LOG_SEVERITY_LEVEL=warning")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("child: %v\n%s", err, out)
	}
	if got := strings.Count(string(out), "through the proxy http://user:xxxxx@127.0.0.1:1, which makes them one endpoint"); got != 1 {
		t.Errorf("the warning was logged %d times, want once:\n%s", got, out)
	}
}
