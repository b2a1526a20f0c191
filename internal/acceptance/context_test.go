// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/selector"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// dialCluster returns a channel to the servers that are balanced by belfry.p2c, with no
// interceptor but those of opts.
func dialCluster(t *testing.T, c *testserver.Cluster, metric, methodConfig string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	r := manual.NewBuilderWithScheme("cluster")
	r.InitialState(resolver.State{Endpoints: c.Endpoints()})
	config := fmt.Sprintf(`{"loadBalancingConfig":[{"belfry.p2c":{"load":{%q:{}}}}],"methodConfig":[%s]}`, metric, methodConfig)
	opts = append(append(opts, c.DialOptions()...), grpc.WithResolvers(r), grpc.WithDefaultServiceConfig(config))
	conn, err := grpc.NewClient("cluster:///"+t.Name(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func inMemory(int) []testserver.Option { return []testserver.Option{testserver.InMemory()} }

// spread makes n calls, one after the other, and returns the servers that answered.
func spread(ctx context.Context, t *testing.T, conn grpc.ClientConnInterface, n int) (servers []string) {
	t.Helper()
	for range n {
		r, err := testingv1.NewTestServiceClient(conn).Unary(ctx, &testingv1.UnaryRequest{})
		if err != nil {
			t.Fatal(err)
		}
		servers = append(servers, r.GetObserved().GetServer())
	}
	return servers
}

// keeper is a credential that keeps the first context that it was asked in.
type keeper struct {
	mu  sync.Mutex
	ctx context.Context
}

func (k *keeper) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.ctx == nil {
		k.ctx = ctx
	}
	return nil, nil
}

func (*keeper) RequireTransportSecurity() bool { return false }

// A call that is made in the context of another is balanced as any other call, whoever
// makes it and on whatever channel, and leaves nothing in flight as long as the other
// lives.
func TestCallsInTheContextOfAnAttempt(t *testing.T) {
	// By chance no server gets two calls of four in a row with 0.504 · 0.7^56 ≈ 1e-9.
	const servers, calls = 10, 60
	layer, err := retry.New(retry.Config{AllMethods: true})
	if err != nil {
		t.Fatal(err)
	}
	other := dialCluster(t, testserver.NewCluster(t, servers, inMemory), "pendingRequests", "")

	credential := new(keeper)
	var insideUnary, inside context.Context
	inner := []grpc.DialOption{
		grpc.WithPerRPCCredentials(credential),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, streamer grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			inside = ctx
			spread(ctx, t, other, 1) // Before the attempt itself has an endpoint.
			return streamer(ctx, desc, cc, method, opts...)
		}),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if insideUnary == nil {
				insideUnary = ctx
			}
			return invoker(ctx, method, req, reply, cc, opts...)
		}),
	}
	main := dialCluster(t, testserver.NewCluster(t, servers, inMemory), "constant", "",
		slices.Concat(calltest.Stack(t, layer).DialOptions(), p2c.DialOptions(), inner)...)

	ctx := testContext(t)
	stream, err := testingv1.NewTestServiceClient(main).Bidi(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&testingv1.BidiRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if ctx := stream.Context(); attempt.Hide(ctx) != ctx {
		t.Error("the context of the stream shows what is for the balancing policy")
	}
	spread(ctx, t, main, 1)
	for name, ctx := range map[string]context.Context{
		"stream": stream.Context(), "credential": credential.ctx, "interceptor": inside, "interceptor, unary": insideUnary,
	} {
		t.Run(name, func(t *testing.T) {
			for channel, conn := range map[string]*grpc.ClientConn{"the same": main, "another": other} {
				got := spread(ctx, t, conn, calls)
				repeated := false
				for i := 3; i < len(got); i++ {
					repeated = repeated || slices.Contains(got[i-3:i], got[i])
				}
				if !repeated {
					t.Errorf("on %s channel no server got two of four calls in a row: they keep from servers that were tried", channel)
				}
			}
		})
	}
	// Those that are connected late are seen late.
	for seen := map[string]bool{}; len(seen) < servers; {
		for _, s := range spread(ctx, t, other, 1) { // Until ctx ends.
			seen[s] = true
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
}

// numbered is the attempts that a server got: the values of the header with their number,
// and the authorization.
type numbered struct {
	mu      sync.Mutex
	numbers []string
	auth    []string
}

func (n *numbered) add(ctx context.Context) {
	md, _ := metadata.FromIncomingContext(ctx)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.numbers = append(n.numbers, strings.Join(md.Get("grpc-previous-rpc-attempts"), ","))
	n.auth = append(n.auth, strings.Join(md.Get("authorization"), ","))
}

// options fail all calls with err, or none if it is nil.
func (n *numbered) options(err error) []testserver.Option {
	return []testserver.Option{testserver.InMemory(), testserver.GRPC(
		grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
			if n.add(ctx); err != nil {
				return nil, err
			}
			return h(ctx, req)
		}),
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if n.add(s.Context()); err != nil {
				return err
			}
			return h(srv, s)
		}),
	)}
}

// fetcher is a credential that gets its token by a call of its own.
type fetcher struct {
	token string
	from  testingv1.TestServiceClient
}

func (f fetcher) GetRequestMetadata(ctx context.Context, _ ...string) (map[string]string, error) {
	_, err := f.from.Unary(ctx, &testingv1.UnaryRequest{})
	return map[string]string{"authorization": f.token}, err
}

func (fetcher) RequireTransportSecurity() bool { return false }

var unavailable = status.Error(codes.Unavailable, "down")

// unavailableFour is a retryPolicy of gRPC's own.
const unavailableFour = `{"name":[{}],"retryPolicy":{"maxAttempts":4,"initialBackoff":"0.0001s","maxBackoff":"0.0001s","backoffMultiplier":1,"retryableStatusCodes":["UNAVAILABLE"]}}`

// Each attempt tells the server how many came before it, once, whatever layers make them
// and whatever retryPolicy there is. A call for a credential tells of none.
func TestNumberOfAnAttempt(t *testing.T) {
	backoff := retry.Backoff{Initial: time.Microsecond}
	retries := retry.Config{MaxAttempts: 3, Backoff: backoff, AllMethods: true}
	hedges := hedge.Config{MaxAttempts: 3, Delay: time.Hour, AllMethods: true}
	for name, tc := range map[string]struct {
		layers []interceptor.Spec
		most   int
	}{
		"retry":               {[]interceptor.Spec{retries}, 3},
		"hedge":               {[]interceptor.Spec{hedges}, 3},
		"retry inside hedge":  {[]interceptor.Spec{hedges, retries}, 9},
		"retry in a selector": {[]interceptor.Spec{interceptor.Only(selector.MatchFunc(func(context.Context, interceptors.CallMeta) bool { return true }), retries)}, 3},
	} {
		for _, kind := range []interceptor.Kind{interceptor.Unary, interceptor.BidiStream} {
			t.Run(fmt.Sprint(name, "/", kind), func(t *testing.T) {
				var servers, tokens numbered
				auth := testingv1.NewTestServiceClient(testserver.Dial(t, testserver.New(t, tokens.options(nil)...)))
				cluster := testserver.NewCluster(t, 2, func(int) []testserver.Option { return servers.options(unavailable) })
				stack := calltest.Stack(t, tc.layers...)
				conn := dialCluster(t, cluster, "constant", unavailableFour,
					slices.Concat(stack.DialOptions(), p2c.DialOptions(), []grpc.DialOption{grpc.WithPerRPCCredentials(fetcher{"channel", auth})})...)
				if err := belfry.WaitReady(testContext(t), conn); err != nil { // Only then the service config is known.
					t.Fatal(err)
				}
				_, err := calltest.Exchange(testContext(t), testingv1.NewTestServiceClient(conn), kind, grpc.PerRPCCredentials(fetcher{"call", auth}))
				if status.Code(err) != codes.Unavailable {
					t.Fatal(err)
				}
				var want []string
				for i := range tc.most {
					want = append(want, strings.TrimPrefix(fmt.Sprint(i), "0"))
				}
				slices.Sort(servers.numbers) // Those of a hedge may overtake each other.
				if !slices.Equal(servers.numbers, want) {
					t.Errorf("the servers were told of %q, want %q", servers.numbers, want)
				}
				for i, a := range servers.auth {
					if a != "channel,call" {
						t.Errorf("attempt %d carries authorization %q, want that of the channel and that of the call", i, a)
					}
				}
				if len(tokens.numbers) != 2*tc.most || slices.ContainsFunc(tokens.numbers, func(s string) bool { return s != "" }) {
					t.Errorf("calls for tokens carried %q, want %d without a number", tokens.numbers, 2*tc.most)
				}
				if a := stack.Advice(); len(a) != 1 || !strings.Contains(a[0], "it is not used") {
					t.Errorf("advice is %q, want one sentence that the retryPolicy is not used", a)
				}
			})
		}
	}
}

// By hand the interceptors cannot turn a retryPolicy off, and say so.
func TestRetryPolicyOfAChannelDialledByHand(t *testing.T) {
	var servers numbered
	cluster := testserver.NewCluster(t, 1, func(int) []testserver.Option { return servers.options(unavailable) })
	stack := calltest.Stack(t, retry.Config{MaxAttempts: 2, Backoff: retry.Backoff{Initial: time.Microsecond}, AllMethods: true})
	byHand := []grpc.DialOption{grpc.WithChainUnaryInterceptor(stack.UnaryClientInterceptor())}
	for _, tc := range []struct {
		opts []grpc.DialOption
		want int
	}{{byHand, 8}, {append(byHand, grpc.WithDisableRetry()), 2}} {
		conn := dialCluster(t, cluster, "constant", unavailableFour, tc.opts...)
		servers.numbers = nil
		for range 2 {
			if _, err := testingv1.NewTestServiceClient(conn).Unary(testContext(t), &testingv1.UnaryRequest{}); status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
		}
		if got := len(servers.numbers); got != 2*tc.want {
			t.Errorf("%d attempts of two calls, want %d", got, 2*tc.want)
		}
	}
	if a := stack.Advice(); len(a) != 1 || !strings.Contains(a[0], "multiplied") {
		t.Errorf("advice is %q, want one sentence that attempts multiply", a)
	}
}

// Behind Wrap the number is metadata, which the context of the stream does not show. A stack
// behind another adds its own attempts to what that has told.
func TestNumberOfAnAttemptBehindWrap(t *testing.T) {
	twice := retry.Config{MaxAttempts: 2, Backoff: retry.Backoff{Initial: time.Microsecond}, AllMethods: true}
	for name, tc := range map[string]struct {
		behind []interceptor.Spec
		want   []string
	}{
		"a channel":                         {nil, []string{"", "1"}},
		"a channel with a stack of its own": {[]interceptor.Spec{twice}, []string{"", "1", "1", "2"}},
	} {
		t.Run(name, func(t *testing.T) {
			var servers numbered
			conn := testserver.Dial(t, testserver.New(t, servers.options(unavailable)...), calltest.Stack(t, tc.behind...).DialOptions()...)
			front := calltest.Stack(t, twice).Wrap(conn)
			ctx := metadata.AppendToOutgoingContext(testContext(t), "key", "value")
			stream, err := testingv1.NewTestServiceClient(front).ServerStream(ctx, &testingv1.ServerStreamRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
				t.Fatal(err)
			}
			if !slices.Equal(servers.numbers, tc.want) {
				t.Errorf("the server was told of %q, want %q", servers.numbers, tc.want)
			}
			if ctx := stream.Context(); attempt.Hide(ctx) != ctx {
				t.Error("the context of the stream shows what is for the balancing policy")
			}
			if md, _ := metadata.FromOutgoingContext(stream.Context()); len(md) != 1 || len(md.Get("key")) != 1 {
				t.Errorf("the context of the stream has the metadata %v, want the caller's", md)
			}
		})
	}
}
