// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackfile_test

import (
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/belfry-go/belfry/resolver/file/stackfile"
)

func Example() {
	dir, err := os.MkdirTemp("", "belfry")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "client.yaml")
	text := `
loadBalancingConfig:
- belfry.p2c: {choiceCount: 4}
stack:
  methodConfig:
  - name: [{service: shop.Orders}]
    layers:
    - timeout: {call: 1s}
    - retry: {}
`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		log.Fatal(err)
	}

	file, err := stackfile.Open(path, stackfile.WithOnReload(func(r stackfile.Reload) {
		log.Printf("client.yaml: %+v, error %v", r.Changes, r.Err)
	}))
	if err != nil {
		log.Fatal(err)
	}
	defer file.Close()
	fmt.Println(file.Stack()) // Its DialOptions go to grpc.NewClient.
	// Output: shop.Orders/*: [timeout > retry]
}
