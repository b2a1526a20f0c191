// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/file/stackfile"
)

//go:embed client.yaml
var clientYAML string

// runLocal is run with backends on loopback and files in a temporary directory. It makes
// calls, adds a backend, changes the config, and ends in the middle of a call.
func runLocal(ctx context.Context, out io.Writer) error {
	dir, err := os.MkdirTemp("", "belfry-production")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	backends, err := testserver.StartCluster(3, nil)
	if err != nil {
		return err
	}
	defer backends.Close()
	s := settings{
		listen: "127.0.0.1:0", endpoints: filepath.Join(dir, "endpoints.yaml"), config: filepath.Join(dir, "client.yaml"),
		leave: 100 * time.Millisecond, drain: time.Minute,
	}
	if err := errors.Join(replace(s.endpoints, list(backends)), replace(s.config, clientYAML)); err != nil {
		return err
	}

	ctx, terminate := context.WithCancel(ctx) // As SIGTERM does.
	defer terminate()
	ready, reloads, ended := make(chan string, 1), make(chan stackfile.Reload, 10), make(chan error, 1)
	go func() {
		err := run(ctx, out, s, func(addr string) { ready <- addr }, func(r stackfile.Reload) { reloads <- r })
		terminate() // Wakes the tour if run has failed.
		ended <- err
	}()
	select {
	case err := <-ended:
		return err
	case addr := <-ready:
		err := tour(ctx, out, s, backends, addr, reloads, terminate)
		terminate()
		return errors.Join(err, <-ended)
	}
}

// tour is what happens while run serves at addr.
func tour(ctx context.Context, out io.Writer, s settings, backends *testserver.Cluster, addr string, reloads <-chan stackfile.Reload, terminate func()) error {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)
	calls := 0
	call := func() (string, error) {
		calls++
		r, err := client.Unary(ctx, &testingv1.UnaryRequest{})
		return r.GetObserved().GetServer(), err
	}
	for range 100 {
		if _, err := call(); err != nil {
			return err
		}
	}

	added, err := backends.Add()
	if err != nil {
		return err
	}
	if err := replace(s.endpoints, list(backends)); err != nil {
		return err
	}
	for server := ""; server != added.Name(); {
		if server, err = call(); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, added.Name(), "was added, and answers")

	if err := replace(s.config, strings.Replace(clientYAML, "limit: 100", "limit: 200", 1)); err != nil {
		return err
	}
	select {
	case r := <-reloads:
		if r.Err != nil {
			return r.Err
		}
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	fmt.Fprintln(out, "the config has changed")

	// A call that is in flight when the program is told to stop ends as if it were not.
	slow := make(chan error, 1)
	go func() {
		_, err := client.Unary(context.WithoutCancel(ctx), &testingv1.UnaryRequest{
			Behaviour: &testingv1.Behaviour{Delay: durationpb.New(500 * time.Millisecond)},
		})
		slow <- err
	}()
	for inFlight := int64(0); inFlight == 0; time.Sleep(time.Millisecond) {
		for _, b := range backends.Servers() {
			inFlight += b.Stats().InFlight
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	terminate()
	if err := <-slow; err != nil {
		return err
	}
	fmt.Fprintf(out, "%d calls, and one while it left: none failed\n", calls)
	return nil
}

// list is the file that lists the backends.
func list(backends *testserver.Cluster) string {
	return "- " + strings.Join(backends.Addrs(), "\n- ") + "\n"
}

// replace writes a file so that no half of it is ever seen.
func replace(path, text string) error {
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
