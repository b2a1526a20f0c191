// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Xds shows belfry.p2c as the policy that an xDS control plane asks for. A control plane
// on loopback, made of go-control-plane, tells a client of servers in three regions: near
// and far have weights of 3 and 1, and spare is of a lower priority. Then near is drained,
// and then far.
//
//	cd examples/xds && go run .
//
// A control plane of your own needs what controlplane.P2C and WRRLocality make. A client
// needs what run does, and the bootstrap file that gRPC's xDS always needs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/signal"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/xds"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/examples/xds/controlplane"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // A second signal ends the program whatever it does.
	if err := run(ctx, os.Stdout); err != nil {
		log.Fatal(err)
	}
}

// run is the program.
func run(ctx context.Context, out io.Writer) (err error) {
	cluster, err := testserver.StartCluster(6, nil)
	if err != nil {
		return err
	}
	defer cluster.Close()
	balanced, err := controlplane.P2C(`{"choiceCount": 2}`)
	if err != nil {
		return err
	}
	policy, err := controlplane.WRRLocality(balanced)
	if err != nil {
		return err
	}
	ctx, refuse := context.WithCancelCause(ctx)
	defer refuse(nil)
	plane, err := controlplane.Start("orders", policy, func(typeURL, message string) {
		refuse(fmt.Errorf("the client refused a resource of type %s: %s", typeURL, message))
	})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plane.Close()) }()

	// Two servers in each region.
	region := func(i int, name string, weight, priority uint32) controlplane.Locality {
		l := controlplane.Locality{Region: name, Weight: weight, Priority: priority}
		for _, s := range cluster.Servers()[2*i : 2*i+2] {
			l.Endpoints = append(l.Endpoints, controlplane.Endpoint{Addr: s.Addr()})
		}
		return l
	}
	near, far, spare := region(0, "near", 3, 0), region(1, "far", 1, 0), region(2, "spare", 1, 1)
	// A priority must not be missing, so one that is drained has an empty region.
	none := controlplane.Locality{Region: "far", Weight: 1}

	// A program has its bootstrap in the file that GRPC_XDS_BOOTSTRAP names, imports
	// google.golang.org/grpc/xds for its scheme, and needs no resolver.
	resolver, err := xds.NewXDSResolverWithConfigForTesting(controlplane.Bootstrap(plane.Addr()))
	if err != nil {
		return err
	}
	options := append(p2c.DialOptions(), grpc.WithResolvers(resolver))
	conn, err := grpc.NewClient("xds:///orders", append(options, cluster.DialOptions()...)...)
	if err != nil {
		return err
	}
	defer conn.Close()
	conn.Connect()
	client := testingv1.NewTestServiceClient(conn)

	for _, step := range []struct {
		title      string
		localities []controlplane.Locality
		want       []string
	}{
		{"near and far, 3 to 1", []controlplane.Locality{near, far, spare}, []string{"near", "far"}},
		{"near is drained", []controlplane.Locality{far, spare}, []string{"far"}},
		{"far is drained too", []controlplane.Locality{none, spare}, []string{"spare"}},
		{"both are back", []controlplane.Locality{near, far, spare}, []string{"near", "far"}},
	} {
		if err := plane.Set(step.localities...); err != nil {
			return err
		}
		if err := plane.Wait(ctx); err != nil {
			return context.Cause(ctx)
		}
		// Until all regions that should have calls have had some: connections take their time.
		for {
			counts, err := calls(ctx, client, 400)
			if err != nil {
				return errors.Join(context.Cause(ctx), err)
			}
			if only(counts, step.want) {
				fmt.Fprintf(out, "%-22s calls by region: %v\n", step.title, counts)
				break
			}
		}
	}
	return nil
}

// calls makes n calls, and returns how many each region answered.
func calls(ctx context.Context, client testingv1.TestServiceClient, n int) (map[string]int, error) {
	regions := []string{"near", "near", "far", "far", "spare", "spare"}
	counts := map[string]int{}
	for range n {
		r, err := client.Unary(ctx, &testingv1.UnaryRequest{}, grpc.WaitForReady(true))
		if err != nil {
			return nil, err
		}
		var i int
		if _, err := fmt.Sscanf(r.GetObserved().GetServer(), "server-%d", &i); err != nil {
			return nil, err
		}
		counts[regions[i]]++
	}
	return counts, nil
}

// only reports whether the regions have calls, and no others.
func only(counts map[string]int, regions []string) bool {
	for _, r := range regions {
		if counts[r] == 0 {
			return false
		}
	}
	return len(counts) == len(regions)
}
