// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// bounded is a cluster whose servers allow so many streams for each connection, 0 for any
// number, and a channel to it.
type bounded struct {
	*testserver.Cluster
	t      *testing.T
	conn   *grpc.ClientConn
	client testingv1.TestServiceClient
	r      *manual.Resolver
	cancel context.CancelFunc
	ctx    context.Context // of streams, which cancel ends
}

func withBounded(t *testing.T, lb string, streams []uint32, f func(t *testing.T, b *bounded), specs ...interceptor.Spec) {
	withBoundedOver(t, nil, lb, streams, f, specs...)
}

// secure returns the credentials of servers, and the options of a channel to them.
type secure func(t *testing.T) (credentials.TransportCredentials, []grpc.DialOption)

// withBoundedOver is withBounded over connections that are encrypted, unless over is nil.
func withBoundedOver(t *testing.T, over secure, lb string, streams []uint32, f func(t *testing.T, b *bounded), specs ...interceptor.Spec) {
	synctest.Test(t, func(t *testing.T) {
		var server credentials.TransportCredentials
		var client []grpc.DialOption
		if over != nil {
			server, client = over(t)
		}
		b := &bounded{t: t, r: manual.NewBuilderWithScheme("bounded")}
		b.Cluster = testserver.NewCluster(t, len(streams), func(i int) []testserver.Option {
			opts := []testserver.Option{testserver.InMemory()}
			if server != nil {
				opts = append(opts, testserver.GRPC(grpc.Creds(server)))
			}
			if streams[i] > 0 {
				opts = append(opts, testserver.GRPC(grpc.MaxConcurrentStreams(streams[i])))
			}
			return opts
		})
		defer b.Cluster.Close()
		stack, err := interceptor.NewStack(specs...)
		if err != nil {
			t.Fatal(err)
		}
		b.r.InitialState(resolver.State{Endpoints: b.Endpoints()})
		opts := append(append(b.DialOptions(), client...), stack.DialOptions()...)
		opts = append(opts, p2c.DialOptions()...)
		b.conn, err = grpc.NewClient("bounded:///"+t.Name(), append(opts, grpc.WithResolvers(b.r), grpc.WithNoProxy(),
			grpc.WithDefaultServiceConfig(service(lb)))...)
		if err != nil {
			t.Fatal(err)
		}
		defer b.conn.Close()
		b.client = testingv1.NewTestServiceClient(b.conn)
		b.ctx, b.cancel = context.WithCancel(t.Context())
		defer b.cancel()
		b.conn.Connect()
		synctest.Wait()
		f(t, b)
		b.cancel()
		synctest.Wait()
	})
}

func service(lb string) string { return fmt.Sprintf(`{"loadBalancingConfig":[{"belfry.p2c":%s}]}`, lb) }

// stream opens a stream that has had an answer and stays open.
func (b *bounded) stream(ctx context.Context) error {
	s, err := b.client.Bidi(ctx)
	if err == nil {
		err = s.Send(&testingv1.BidiRequest{})
	}
	if err == nil {
		_, err = s.Recv()
	}
	return err
}

// streams opens so many at once. None of them may wait.
func (b *bounded) streams(n int) {
	b.t.Helper()
	done := make(chan error, n)
	begin := time.Now()
	for range n {
		go func() { done <- b.stream(b.ctx) }()
	}
	for range n {
		if err := <-done; err != nil {
			b.t.Fatal(err)
		}
	}
	// In virtual time the work of grpc and of these servers takes none.
	if took := time.Since(begin); took > 0 {
		b.t.Errorf("a stream waited for %v", took)
	}
}

// wantConnections fails the test unless the endpoints have so many connections.
func (b *bounded) wantConnections(when string, want ...int) {
	b.t.Helper()
	synctest.Wait()
	s := p2c.SnapshotsOf(b.conn)
	if len(s) != 1 {
		b.t.Fatalf("%s: %d snapshots, want 1", when, len(s))
	}
	for i, e := range s[0].Endpoints {
		if e.Connections != want[i] {
			b.t.Errorf("%s: endpoint %d has %d connections, want %d", when, i, e.Connections, want[i])
		}
	}
}

func TestConnections(t *testing.T) {
	t.Run("no_stream_waits_while_an_endpoint_has_room", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":2}`, []uint32{3, 0}, func(t *testing.T, b *bounded) {
			b.streams(20)
			if a := b.Server(0).Stats(); a.InFlight > 6 {
				t.Errorf("%d streams at the server that takes 3 on each of 2 connections", a.InFlight)
			}
		})
	})
	t.Run("grow_to_what_is_needed_and_shrink", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":10}`, []uint32{3, 3}, func(t *testing.T, b *bounded) {
			b.wantConnections("at first", 1, 1)
			b.streams(20)
			s := p2c.SnapshotsOf(b.conn)[0].Endpoints
			if n := s[0].Connections + s[1].Connections; n < 7 || n > 8 {
				t.Errorf("%d connections for 20 streams, 3 on each, want 7 or 8", n)
			}
			time.Sleep(time.Hour)
			if n := s[0].Connections + s[1].Connections; n < 7 {
				t.Errorf("%d connections after an hour, with streams on all", n)
			}
			b.cancel()
			time.Sleep(61 * time.Second)
			b.wantConnections("a minute after the last stream", 1, 1)
			for i, srv := range b.Servers() {
				if n := srv.Stats().Connections; n != 1 {
					t.Errorf("server %d has %d connections open, want 1", i, n)
				}
			}
		})
	})
	t.Run("all_full_wait_in_order", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":2}`, []uint32{1, 1}, func(t *testing.T, b *bounded) {
			ctx, end := context.WithCancel(b.ctx)
			defer end()
			if err := b.stream(ctx); err != nil {
				t.Fatal(err)
			}
			b.streams(3)
			order := make(chan int, 3)
			for i := range 3 {
				go func() {
					// The first one is unary, and gives the stream to the others.
					if i == 0 {
						_, _ = b.client.Unary(b.ctx, &testingv1.UnaryRequest{})
					} else if err := b.stream(b.ctx); err != nil {
						return
					}
					order <- i
				}()
				synctest.Wait()
			}
			if s := p2c.SnapshotsOf(b.conn)[0]; s.Waiting != 3 || s.Endpoints[0].PassedOver != p2c.Full {
				t.Errorf("%d calls wait, and the first endpoint is passed over because %q; want 3, full", s.Waiting, s.Endpoints[0].PassedOver)
			}
			end()
			synctest.Wait()
			if len(order) != 2 || <-order+<-order != 0+1 {
				t.Error("after the end of a stream, want the unary call and then one stream to get its place")
			}
		})
	})
	t.Run("refused_where_they_must_not_wait", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":2}`, []uint32{1}, func(t *testing.T, b *bounded) {
			b.streams(1)
			// This one makes the second connection, which may be there before it is refused.
			first := b.stream(b.ctx)
			synctest.Wait()
			if err := b.stream(b.ctx); first != nil && err != nil {
				t.Errorf("with two connections: %v", err)
			}
			err := b.stream(b.ctx)
			if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonNotReady {
				t.Errorf("the third stream ended with %v, want it refused with NOT_READY", err)
			}
		}, loadshed.Config{}, concurrency.Config{Limit: 100})
	})
	t.Run("lost_connections", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":4}`, []uint32{2}, func(t *testing.T, b *bounded) {
			for i, lose := range []func(){
				func() { _ = b.Server(0).GoAway() }, b.Server(0).CloseConnections, func() { _ = b.Server(0).GoAway() },
			} {
				b.streams(7)
				b.wantConnections(fmt.Sprint("round ", i), 4)
				lose()
				synctest.Wait()
				time.Sleep(10 * time.Second) // the back-off of a connection that broke
				b.streams(7)                 // also beside those that a GOAWAY lets end
				b.cancel()
				synctest.Wait()
				b.ctx, b.cancel = context.WithCancel(t.Context())
			}
		})
	})
	t.Run("unary_calls_share_them", func(t *testing.T) {
		withBounded(t, `{"maxConnectionsPerSubchannel":3}`, []uint32{2, 2}, func(t *testing.T, b *bounded) {
			const calls = 60
			done := make(chan error, calls)
			for range calls {
				go func() {
					_, err := b.client.Unary(b.ctx, &testingv1.UnaryRequest{})
					done <- err
				}()
			}
			for range calls {
				if err := <-done; err != nil {
					t.Fatal(err)
				}
			}
			if s := p2c.SnapshotsOf(b.conn)[0]; s.Waiting != 0 {
				t.Errorf("%d calls wait after the last", s.Waiting)
			}
		})
	})
	t.Run("change_of_the_config", func(t *testing.T) {
		withBounded(t, `{}`, []uint32{2}, func(t *testing.T, b *bounded) {
			set := func(lb string) {
				b.r.UpdateState(resolver.State{Endpoints: b.Endpoints(), ServiceConfig: b.r.CC().ParseServiceConfig(service(lb))})
				synctest.Wait()
			}
			b.streams(2)
			set(`{"maxConnectionsPerSubchannel":2}`)
			b.streams(4) // The two before are on the old connection.
			b.wantConnections("with 2", 2)
			set(`{"maxConnectionsPerSubchannel":3}`)
			b.streams(2)
			b.wantConnections("with 3", 3)
			set(`{"maxConnectionsPerSubchannel":2}`)
			b.wantConnections("none is closed for a lower number", 3)
			set(`{}`)
			b.wantConnections("without the field", 1)
			b.streams(2)
			ctx, cancel := context.WithTimeout(b.ctx, time.Second)
			defer cancel()
			if err := b.stream(ctx); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("the third stream on the one connection ended with %v, want it to wait", err)
			}
		})
	})
}
