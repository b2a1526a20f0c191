// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes_test

import (
	"log"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"
	"k8s.io/client-go/rest"

	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/kubernetes"
)

// It needs a cluster, and so is only compiled.
func Example() {
	cfg, err := rest.InClusterConfig()
	if err != nil {
		log.Fatal(err)
	}
	err = discover.Register("k8s", func(target resolver.Target) (discover.Source, error) {
		return kubernetes.New(cfg, target.Endpoint())
	})
	if err != nil {
		log.Fatal(err)
	}
	conn, err := grpc.NewClient("k8s:///prod/orders:grpc", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()
}
