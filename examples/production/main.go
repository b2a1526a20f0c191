// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Production is a server that calls other servers, with all that a program in production
// needs: discovery, the policy and a stack from a file that may change, metrics by
// OpenTelemetry, and an end without a failed call on SIGTERM.
//
//	cd examples/production && go run . -local
//
// With -local it starts its backends itself, lists them in a file, and writes its config.
// It calls itself meanwhile, adds a backend, changes the config, and ends in the middle of
// a call. In a cluster, with client.yaml beside this file:
//
//	production -backends orders.prod.svc.cluster.local:8080 -config /etc/production/client.yaml -otlp collector:4317
//
// deployment.yaml and kustomization.yaml are the manifests: kubectl apply -k .
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/exporters/otlp/otlpmetric/otlpmetricgrpc"
	"go.opentelemetry.io/otel/exporters/stdout/stdoutmetric"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/stats/opentelemetry"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file"
	"github.com/belfry-go/belfry/resolver/file/stackfile"
)

type settings struct {
	listen    string
	backends  string        // a DNS name and a port, or
	endpoints string        // a file that lists the backends
	config    string        // the file of package stackfile
	otlp      string        // where metrics go; empty: to out when the program ends
	leave     time.Duration // from SIGTERM until no more calls are accepted
	drain     time.Duration // from then on, for what is in flight
}

func main() {
	var s settings
	flag.StringVar(&s.listen, "listen", ":8080", "the address to serve at")
	flag.StringVar(&s.backends, "backends", "", "the backends, as a DNS name and a port")
	flag.StringVar(&s.endpoints, "endpoints", "", "the backends, as a file that lists them")
	flag.StringVar(&s.config, "config", "client.yaml", "the file with the stack and the balancing config")
	flag.StringVar(&s.otlp, "otlp", "", "the address of an OpenTelemetry collector; without one metrics are printed at the end")
	flag.DurationVar(&s.leave, "leave", 10*time.Second, "how long to go on after SIGTERM, until discovery has told all clients")
	flag.DurationVar(&s.drain, "drain", 20*time.Second, "how long calls in flight may take after that")
	local := flag.Bool("local", false, "run by itself, with backends of its own")
	flag.Parse()
	if flag.NArg() > 0 || !*local && (s.backends == "") == (s.endpoints == "") {
		fmt.Fprintln(flag.CommandLine.Output(), "needs -local, or one of -backends and -endpoints")
		flag.Usage()
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	var err error
	if *local {
		err = runLocal(ctx, os.Stdout)
	} else {
		err = run(ctx, os.Stdout, s, func(string) {}, func(stackfile.Reload) {})
	}
	if err != nil {
		log.Fatal(err)
	}
}

// run serves until ctx ends. It calls ready, with its address, when calls can be served,
// and reloaded after each change of the config.
func run(ctx context.Context, out io.Writer, s settings, ready func(addr string), reloaded func(stackfile.Reload)) (err error) {
	// What was begun first ends last. Each step has its own time.
	atEnd := func(what string, patience time.Duration, end func(context.Context) error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		if e := end(ctx); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", what, e))
		}
	}

	metrics, err := newMetrics(ctx, out, s.otlp)
	if err != nil {
		return err
	}
	defer func() { atEnd("metrics", 5*time.Second, metrics.Shutdown) }() // It exports what is left.

	observer, err := otelobserver.New(metrics)
	if err != nil {
		return err
	}
	config, err := stackfile.Open(s.config, stackfile.WithStackOptions(stackconfig.WithObserver(observer)),
		stackfile.WithOnReload(func(r stackfile.Reload) {
			if r.Err != nil {
				log.Printf("the config has not changed: %v", r.Err)
			} else {
				log.Printf("the config has changed; states that started: %q, that ended: %q", r.Changes.Began, r.Changes.Ended)
			}
			reloaded(r)
		}))
	if err != nil {
		return err
	}
	defer config.Close()
	conn, err := dial(s, config, metrics)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer func() { atEnd("drain of the stack", s.drain, config.Stack().Drain) }()

	listener, err := net.Listen("tcp", s.listen)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	checks := health.NewServer()
	checks.SetServingStatus("", healthv1.HealthCheckResponse_NOT_SERVING)
	healthv1.RegisterHealthServer(server, checks)
	testingv1.RegisterTestServiceServer(server, &frontend{backend: testingv1.NewTestServiceClient(conn)})
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		atEnd("server", s.drain, func(ctx context.Context) error {
			stop := context.AfterFunc(ctx, server.Stop) // Who takes too long is cut off.
			defer stop()
			server.GracefulStop()
			return errors.Join(<-served, ctx.Err())
		})
	}()

	// Calls wait for the backends. The readiness probe does not pass before.
	if err := belfry.WaitReady(ctx, conn); err != nil {
		return fmt.Errorf("backends: %w", err)
	}
	checks.SetServingStatus("", healthv1.HealthCheckResponse_SERVING)
	fmt.Fprintf(out, "ready, with the stack %v\n", config.Stack())
	ready(listener.Addr().String())

	select {
	case err := <-served:
		served <- nil
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	// From now on the probe fails. Clients that have not heard of it are still served.
	checks.Shutdown()
	fmt.Fprintln(out, "leaving")
	time.Sleep(s.leave)
	return nil
}

// dial returns a channel to the backends: discovery, and what the config says.
func dial(s settings, config *stackfile.File, metrics *sdkmetric.MeterProvider) (*grpc.ClientConn, error) {
	source, err := newSource(s)
	if err != nil {
		return nil, err
	}
	if source, err = config.Source(source); err != nil {
		return nil, err
	}
	// gRPC's own metrics come before the stack: so they measure what callers see.
	options := []grpc.DialOption{opentelemetry.DialOption(opentelemetry.Options{MetricsOptions: opentelemetry.MetricsOptions{
		MeterProvider: metrics,
		Metrics:       opentelemetry.DefaultMetrics().Add("belfry.lb.p2c.picks", "belfry.lb.p2c.endpoints", "belfry.lb.p2c.put_aside"),
	}})}
	options = append(options, config.Stack().DialOptions()...)
	options = append(options, p2c.DialOptions()...)
	return grpc.NewClient("belfry:///backends", append(options,
		discover.WithSource(source),
		grpc.WithIdleTimeout(0),                                  // Stay connected without calls.
		grpc.WithTransportCredentials(insecure.NewCredentials()), // In production, TLS.
	)...)
}

func newSource(s settings) (discover.Source, error) {
	if s.endpoints != "" {
		return file.New(s.endpoints)
	}
	return discover.DNS(s.backends)
}

// newMetrics exports every minute to a collector, or at the end to out.
func newMetrics(ctx context.Context, out io.Writer, otlp string) (*sdkmetric.MeterProvider, error) {
	var exporter sdkmetric.Exporter
	var err error
	if otlp != "" {
		exporter, err = otlpmetricgrpc.New(ctx, otlpmetricgrpc.WithEndpoint(otlp), otlpmetricgrpc.WithInsecure())
	} else {
		exporter, err = stdoutmetric.New(stdoutmetric.WithWriter(out))
	}
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	every := time.Minute
	if otlp == "" {
		every = 24 * time.Hour
	}
	return sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewPeriodicReader(exporter, sdkmetric.WithInterval(every)))), nil
}

// frontend answers what its backends answer.
type frontend struct {
	testingv1.UnimplementedTestServiceServer
	backend testingv1.TestServiceClient
}

// Unary passes the deadline of its caller on with the context.
func (f *frontend) Unary(ctx context.Context, r *testingv1.UnaryRequest) (*testingv1.UnaryResponse, error) {
	return f.backend.Unary(ctx, r)
}
