// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"sigs.k8s.io/yaml"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func TestLocal(t *testing.T) {
	var out bytes.Buffer
	if err := runLocal(t.Context(), &out); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	for _, want := range []string{
		"at first: 2 pods answer\n", "a pod was added: 3 pods answer\n",
		"a pod is about to leave: 2 pods answer\n", "it has left: 2 pods answer\n", "none failed\n",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the output lacks %q:\n%s", want, &out)
		}
	}
}

// A server that is told to stop answers until it has left.
func TestServe(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ready, ended := make(chan string, 1), make(chan error, 1)
	go func() { ended <- serve(ctx, "127.0.0.1:0", 0, func(addr string) { ready <- addr }) }()
	conn, err := grpc.NewClient("passthrough:///"+<-ready, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r, err := testingv1.NewTestServiceClient(conn).Unary(ctx, &testingv1.UnaryRequest{})
	if name, _ := os.Hostname(); err != nil || r.GetObserved().GetServer() != name {
		t.Errorf("answer %v, error %v, want one of %s", r, err, name)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// The manifests are YAML, and each has what makes it one.
func TestManifests(t *testing.T) {
	text, err := os.ReadFile("manifests.yaml")
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for i, doc := range strings.Split(string(text), "\n---\n") {
		var m struct {
			APIVersion, Kind string
			Metadata         struct{ Name string }
		}
		if err := yaml.Unmarshal([]byte(doc), &m); err != nil || m.APIVersion == "" || m.Metadata.Name == "" {
			t.Errorf("document %d: %+v, error %v", i, m, err)
		}
		kinds[m.Kind] = true
	}
	for _, kind := range []string{"Service", "Deployment", "ServiceAccount", "Role", "RoleBinding"} {
		if !kinds[kind] {
			t.Errorf("there is no %s", kind)
		}
	}
}
