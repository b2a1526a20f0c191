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
// The file is YAML, or JSON, which is YAML too. It has two fields, of which either may
// be left out:
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
// Package stackconfig says what a stack may hold. An unknown field is an error, and
// so is one that is written twice. Of the policies in loadBalancingConfig the first
// that the program has is used; belfry.p2c, belfry.aperture and belfry.priority come
// with this package.
//
// # Changes
//
// The file is followed as package file follows a list of endpoints: a change is seen
// some 100 ms after the last write, and within 5 s where the file system does not
// report it, and a mounted ConfigMap may be replaced.
//
// A change is all or nothing. If the file is missing, cannot be read, or anything in
// it is wrong, the last stack and the last balancing config stay, and the error is
// reported once, with the path of the field. The stack changes first and the policy
// right after it. Layers keep their state as [stackconfig.Stack.Update] says, and the
// policy keeps what it has learnt of the endpoints unless another one takes its place.
//
// # Editors
//
// The JSON schema of the file is schema.json beside this package. In Visual Studio
// Code and others with the YAML language server this is the first line of the file:
//
//	# yaml-language-server: $schema=https://raw.githubusercontent.com/belfry-go/belfry/main/resolver/file/stackfile/schema.json
package stackfile

//go:generate go test -run TestSchema -update .
