// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package file is a source of the endpoints that are listed in a file. It follows
// the changes of the file.
//
//	src, err := file.New("/etc/orders/endpoints.yaml")
//	if err != nil {
//		return err
//	}
//	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src), creds)
//
// The file is YAML, or JSON, which is YAML too. It is a list. An entry is an address,
// or has fields:
//
//	# endpoints.yaml
//	- 10.0.0.1:8080
//	- address: 10.0.0.2:8080
//	  weight: 2                    # at least 1; by default 1
//	  zone: a                      # by default none
//	  group: 1                     # for the policy belfry.priority; by default 0, the first
//	  draining: true               # about to leave: no new calls; by default false
//	- key: pod-3                   # by default the addresses
//	  addresses: ["10.0.0.3:8080", "[fd00::3]:8080"] # of one server; in place of address
//	  serverName: orders.internal  # in the certificate; by default the channel's
//
// An empty list, [], says that there are no endpoints. An empty file is an error,
// and so is one of more than 64 MiB.
//
// Package stackfile, beside this one, follows a file with a stack and a balancing config.
//
// # Changes
//
// A change is seen when the directory reports it: 100 ms after the last write, and
// at most 1 s after the first. Where the directory does not report changes, as on
// network file systems, a change is seen within 5 s. Replace the file by renaming
// another, so that it is never read half written. A mounted ConfigMap of Kubernetes
// is replaced in that way.
//
// A file is bad if it is missing, cannot be read, is not valid, or has an unknown
// field or a bad entry. A bad file is reported once, and the whole last set stays
// until the file is good. If the file was never good, calls fail with the reason.
//
// # Editors
//
// endpoints.schema.json beside this package is the JSON schema of the list. Editors
// with the YAML language server use it if this is the first line of the file:
//
//	# yaml-language-server: $schema=https://raw.githubusercontent.com/belfry-go/belfry/main/resolver/file/endpoints.schema.json
//
// # In a target
//
// To name the file in a target, register a scheme for it:
//
//	err := discover.Register("file", func(target resolver.Target) (discover.Source, error) {
//		return file.New(target.URL.Path)
//	})
package file
