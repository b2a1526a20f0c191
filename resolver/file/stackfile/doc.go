// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package stackfile reads a stack and the balancing config of a channel from a file,
// and follows the file while calls run.
//
//	file, err := stackfile.Open("/etc/orders/client.yaml")
//	if err != nil {
//		return err
//	}
//	defer file.Close()
//	src, err := file.Source(endpoints) // the endpoints, and the balancing config of the file
//	if err != nil {
//		return err
//	}
//	options := append(p2c.DialOptions(), file.Stack().DialOptions()...)
//	conn, err := grpc.NewClient("belfry:///orders", append(options, discover.WithSource(src), creds)...)
//
// The file is YAML, or JSON, which is YAML too. It has two fields. Both are optional:
//
//	loadBalancingConfig: # as in a service config; by default belfry.p2c
//	- belfry.p2c: {choiceCount: 4}
//	stack: # the message belfry.config.v1.Stack; by default no layers
//	  methodConfig:
//	  - name: [{}]
//	    layers:
//	    - timeout: {call: 1s}
//	    - retry: {}
//	    - {name: limit, concurrency: {limit: 100}}
//
// Package stackconfig says what a stack may contain. A field that is unknown, or that
// is written twice, is an error. The channel uses the first policy in
// loadBalancingConfig that is linked into the program. This package links
// belfry.p2c, belfry.aperture and belfry.priority.
//
// # Changes
//
// The file is followed as package file follows a list of endpoints. A change is seen
// 100 ms after the last write, and at most 1 s after the first. Where the file system
// does not report changes, a change is seen within 5 s. The file may be in a mounted
// ConfigMap.
//
// A change takes effect as a whole or not at all. If the file is missing, cannot be
// read, or has a fault, the last stack and the last balancing config stay, and the
// error is reported once, with the path of the field if there is one. The stack
// changes first and the policy after it, so for a moment calls may use the new stack
// and the old policy. Layers keep their state as [stackconfig.Stack.Update] says. The
// policy keeps what it has learnt of the endpoints, unless another policy replaces it.
//
// # Editors
//
// The JSON schema of the file is schema.json beside this package. Editors with the YAML
// language server, such as Visual Studio Code, use it if this is the first line of the
// file:
//
//	# yaml-language-server: $schema=https://raw.githubusercontent.com/belfry-go/belfry/main/resolver/file/stackfile/schema.json
package stackfile

//go:generate go test -run TestSchema -update .
