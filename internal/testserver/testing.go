// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import "google.golang.org/grpc"

// TB is the part of testing.TB that this package uses, so that programs which
// import it do not import package testing.
type TB interface {
	Helper()
	Fatalf(format string, args ...any)
	Errorf(format string, args ...any)
	Cleanup(f func())
}

// New starts a server that is closed at the end of the test. A bad option fails
// the test.
func New(t TB, opts ...Option) *Server {
	t.Helper()
	s, err := Start(opts...)
	if err != nil {
		t.Fatalf("starting a test server: %v", err)
	}
	t.Cleanup(s.Close)
	return s
}

// NewCluster starts a cluster that is closed at the end of the test. A bad
// option fails the test.
func NewCluster(t TB, n int, options func(i int) []Option) *Cluster {
	t.Helper()
	c, err := StartCluster(n, options)
	if err != nil {
		t.Fatalf("starting a test cluster: %v", err)
	}
	t.Cleanup(c.Close)
	return c
}

// Dial returns a channel to one server that is closed at the end of the test,
// before the server is.
func Dial(t TB, s *Server, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := s.NewClient(opts...)
	if err != nil {
		t.Fatalf("making a client of %s: %v", s.Name(), err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Errorf("closing the client of %s: %v", s.Name(), err)
		}
	})
	return conn
}
