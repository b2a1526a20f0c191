// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package file is a source of endpoints that are listed in a file, and follows
// the file while it changes.
//
//	src, err := file.New("/etc/orders/endpoints.yaml")
//	if err != nil {
//		return err
//	}
//	conn, err := grpc.NewClient("belfry:///orders", discover.WithSource(src), creds)
//
// The file is YAML, or JSON, which is YAML too: a list, whose entries are
// addresses, or have fields.
//
//   - 10.0.0.1:8080
//   - address: 10.0.0.2:8080
//     weight: 2                    # from 1 up; by default 1
//     zone: a
//     group: 1                     # of the policy belfry.priority; by default 0, the first
//     draining: true               # about to leave: no new calls; by default false
//   - key: pod-3                   # by default the addresses
//     addresses: ["10.0.0.3:8080", "[fd00::3]:8080"]
//     serverName: orders.internal  # in the certificate; by default the channel's
//
// An empty list, [], says that there are no endpoints. An empty file says
// nothing and is an error.
//
// Package stackfile, beside this one, follows a file with a stack and a balancing config.
//
// # Changes
//
// A change is seen when the directory reports it, some 100 ms after the last
// write, and within 5 s where it does not report it, as on network file systems.
// Replace the file by renaming another, so that no half of it is ever seen. A
// mounted ConfigMap of Kubernetes is replaced in that way.
//
// A file that is missing, cannot be read, is not valid, or has an unknown field
// or a bad entry is reported once, and the last set stays, whole, until the file
// is good. As long as it has never been good, calls fail with the reason.
//
// # Editors
//
// endpoints.schema.json beside this package is the JSON schema of the list. For editors
// with the YAML language server this is the first line of the file:
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
