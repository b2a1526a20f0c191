// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"fmt"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestDialOptions(t *testing.T) {
	servers := newServers(t, 2)
	var es []resolver.Endpoint
	for _, s := range servers {
		es = append(es, s.Endpoint())
	}
	const rr = `{"loadBalancingConfig":[{"round_robin":{}}]}`
	const stays = "another policy balances them"
	// call dials, and returns the target and which policy picked for a call.
	call := func(t *testing.T, fromResolver string, before, after []grpc.DialOption) (target string, p2c bool) {
		t.Helper()
		r := manual.NewBuilderWithScheme("belfrytest")
		r.BuildCallback = func(_ resolver.Target, cc resolver.ClientConn, _ resolver.BuildOptions) {
			state := resolver.State{Endpoints: es}
			if fromResolver != "" {
				state.ServiceConfig = cc.ParseServiceConfig(fromResolver)
			}
			r.InitialState(state)
		}
		target = fmt.Sprintf("dialoptions/%d", targets.Add(1))
		conn, err := grpc.NewClient("belfrytest:///"+target, slices.Concat(before, DialOptions(), after, []grpc.DialOption{
			grpc.WithResolvers(r), grpc.WithTransportCredentials(insecure.NewCredentials())})...)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		client := testingv1.NewTestServiceClient(conn)
		for range 2 {
			if _, err := client.Unary(testContext(t), &testingv1.UnaryRequest{}, grpc.WaitForReady(true)); err != nil {
				t.Fatal(err)
			}
		}
		return target, len(policiesOf(target)) > 0
	}
	for _, test := range []struct {
		name, resolver string
		before, after  []grpc.DialOption
		p2c            bool
	}{
		{"select the policy", "", nil, nil, true},
		{"leave the resolver's config its policy", rr, nil, nil, false},
		{"leave an earlier default config its policy", "", []grpc.DialOption{grpc.WithDefaultServiceConfig(rr)}, nil, false},
		{"leave a later default config its policy", "", nil, []grpc.DialOption{grpc.WithDefaultServiceConfig(rr)}, false},
		{"warn of a config without a policy", `{"methodConfig":[]}`, nil, nil, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			target, p2c := call(t, test.resolver, test.before, test.after)
			if p2c != test.p2c {
				t.Errorf("belfry.p2c balances: %v, want %v", p2c, test.p2c)
			}
			want := 0
			if !test.p2c {
				want = 1
			}
			if got := logs.with(target+":", stays); len(got) != want {
				t.Errorf("warnings %q, want %d", got, want)
			}
		})
	}
}

func TestDialOptionsCostACallOneAllocation(t *testing.T) {
	i, ctx := new(interceptors), testContext(t)
	invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return io.EOF }
	if n := testing.AllocsPerRun(100, func() { _ = i.unary(ctx, "/s/m", nil, nil, nil, invoke) }); n > 1 {
		t.Errorf("%v allocations, want at most 1", n)
	}
}

func TestStreamsWithoutDialOptionsAreLoggedOnce(t *testing.T) {
	for _, untracked := range []bool{true, false} {
		w := newWire(t, newServers(t, 1), wireConfig{untracked: untracked})
		ctx := testContext(t)
		for range 3 {
			if _, err := w.call(ctx, nil); err != nil {
				t.Fatal(err)
			}
			s, err := w.client.ServerStream(ctx, &testingv1.ServerStreamRequest{})
			if err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, err = s.Recv()
			}
		}
		want := 0
		if untracked {
			want = 1
		}
		if got := logs.with(w.target+":", "has no p2c.DialOptions"); len(got) != want {
			t.Errorf("untracked %v: warnings %q, want %d", untracked, got, want)
		}
	}
}
