// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package file_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file"
)

func Example() {
	dir, err := os.MkdirTemp("", "belfry")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "endpoints.yaml")
	list := `
- address: 10.0.0.1:8080
  weight: 2
- 10.0.0.2:8080
`
	if err := os.WriteFile(path, []byte(list), 0o600); err != nil {
		panic(err)
	}

	src, err := file.New(path) // and then discover.WithSource(src)
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for element, err := range src.Watch(ctx) {
		if err != nil {
			panic(err)
		}
		n := 0
		for change := range element.All() {
			if change.Op == discover.OpInsert {
				n++
			}
		}
		fmt.Println(n, "endpoints")
		break
	}
	// Output: 2 endpoints
}
