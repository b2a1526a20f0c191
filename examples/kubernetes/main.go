// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Kubernetes shows clients and servers in Kubernetes. Servers leave without a failed call.
// A client follows the EndpointSlices of a service, prefers the pods of its own zone, and
// has calls for a new pod as soon as that is ready.
//
//	cd examples/kubernetes && go run . -local
//
// With -local it needs no cluster: it starts servers on loopback, and an API server that
// knows their EndpointSlice and no more. Servers come and go while the client calls. In a
// cluster, manifests.yaml beside this file starts both:
//
//	kubernetes server -listen :8080
//	kubernetes client -target k8s:///prod/orders:grpc
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"maps"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/resolver"
	"k8s.io/client-go/rest"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/kubernetes"
)

func main() {
	listen := flag.String("listen", ":8080", "server: the address to serve at")
	leave := flag.Duration("leave", 5*time.Second, "server: how long to go on after SIGTERM, until all clients know")
	target := flag.String("target", "k8s:///prod/orders:grpc", "client: the service, as k8s:///namespace/service:port")
	local := flag.Bool("local", false, "run servers, a client and an API server here, without a cluster")
	args := os.Args[1:]
	role := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		role, args = args[0], args[1:]
	}
	_ = flag.CommandLine.Parse(args) // It ends the program itself.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	var err error
	switch {
	case *local && role == "" && flag.NArg() == 0:
		err = runLocal(ctx, os.Stdout)
	case role == "server" && flag.NArg() == 0:
		err = serve(ctx, *listen, *leave, func(string) {})
	case role == "client" && flag.NArg() == 0:
		var cfg *rest.Config
		if cfg, err = rest.InClusterConfig(); err == nil {
			err = call(ctx, os.Stdout, cfg, *target, time.Second)
		}
	default:
		fmt.Fprintln(flag.CommandLine.Output(), "needs -local, or one of the words server and client before the flags")
		flag.Usage()
		os.Exit(2)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// dial returns a channel to a service: its EndpointSlices, the policy with zones, and a
// stack.
func dial(cfg *rest.Config, target string) (*grpc.ClientConn, error) {
	k8s, err := discover.NewBuilder("k8s", func(target resolver.Target) (discover.Source, error) {
		return kubernetes.New(cfg, target.Endpoint())
	})
	if err != nil {
		return nil, err
	}
	stack, err := interceptor.NewStack(
		timeout.Config{Timeout: 10 * time.Second},
		retry.Config{Methods: []string{"/belfry.testing.v1.TestService/"}},
	)
	if err != nil {
		return nil, err
	}
	// The environment says in which zone this pod is, see manifests.yaml. Where it does not,
	// zones do not count.
	config := `{"loadBalancingConfig": [{"belfry.p2c": {"zones": {"homeEnv": "ZONE"}}}]}`
	options := append(stack.DialOptions(), p2c.DialOptions()...)
	return grpc.NewClient(target, append(options,
		grpc.WithResolvers(k8s),
		grpc.WithDefaultServiceConfig(config),
		grpc.WithTransportCredentials(insecure.NewCredentials()), // In production, TLS.
	)...)
}

// call makes calls until ctx ends, and says every so often how many each pod answered.
func call(ctx context.Context, out io.Writer, cfg *rest.Config, target string, every time.Duration) error {
	conn, err := dial(cfg, target)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := belfry.WaitReady(ctx, conn); err != nil { // It says why not.
		return err
	}
	client := testingv1.NewTestServiceClient(conn)
	counts, told := map[string]int{}, time.Now()
	for {
		r, err := client.Unary(ctx, &testingv1.UnaryRequest{})
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			counts[err.Error()]++
		default:
			counts[r.GetObserved().GetServer()]++
		}
		if time.Since(told) >= every {
			for _, who := range slices.Sorted(maps.Keys(counts)) {
				fmt.Fprintf(out, "%6d %s\n", counts[who], who)
			}
			fmt.Fprintln(out)
			counts, told = map[string]int{}, time.Now()
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return nil
		}
	}
}

// serve serves until ctx ends, and then until the calls in flight have ended. It calls
// ready with its address.
func serve(ctx context.Context, address string, leave time.Duration, ready func(addr string)) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	name, err := os.Hostname() // The name of the pod.
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	checks := health.NewServer()
	healthv1.RegisterHealthServer(server, checks)
	testingv1.RegisterTestServiceServer(server, pod{name: name})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	ready(listener.Addr().String())
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	// Now the pod is terminating and its readiness probe fails. Its EndpointSlice says so
	// to clients, which have no new calls for it then. Until they know it is still served.
	checks.Shutdown()
	time.Sleep(leave)
	server.GracefulStop()
	return <-served
}

// pod answers with its name.
type pod struct {
	testingv1.UnimplementedTestServiceServer
	name string
}

// Unary answers at once.
func (p pod) Unary(context.Context, *testingv1.UnaryRequest) (*testingv1.UnaryResponse, error) {
	return &testingv1.UnaryResponse{Observed: &testingv1.Observed{Server: p.name}}, nil
}
