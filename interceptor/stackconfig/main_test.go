// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"sync"
	"testing"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

func parse(t testing.TB, js string) *configv1.Stack {
	t.Helper()
	m, err := Parse([]byte(js))
	if err != nil {
		t.Fatalf("Parse: %v\n%s", err, js)
	}
	return m
}

func newStack(t testing.TB, js string, opts ...Option) *Stack {
	t.Helper()
	s, err := NewStackFromConfig(parse(t, js), opts...)
	if err != nil {
		t.Fatalf("NewStackFromConfig: %v\n%s", err, js)
	}
	return s
}

func update(t testing.TB, s *Stack, js string) Changes {
	t.Helper()
	c, err := s.Update(parse(t, js))
	if err != nil {
		t.Fatalf("Update: %v\n%s", err, js)
	}
	return c
}

// all is a config with one entry for all methods.
func all(layers string) string {
	return `{"methodConfig": [{"name": [{}], "layers": [` + layers + `]}]}`
}

// fake is a server whose calls run until they are ended, and answer nil unless
// they are told otherwise.
type fake struct {
	mu   sync.Mutex // Guards the fields below.
	runs []chan error
	err  error
	free bool // Calls end at once with err.
}

func (f *fake) Invoke(ctx context.Context, _ string, _, _ any, _ ...grpc.CallOption) error {
	f.mu.Lock()
	if f.free {
		defer f.mu.Unlock()
		return f.err
	}
	end := make(chan error, 1)
	f.runs = append(f.runs, end)
	f.mu.Unlock()
	select {
	case err := <-end:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fake) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	panic("no streams here")
}

// answer ends all calls at once from now on, with err.
func (f *fake) answer(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.err, f.free = err, true
}

// hold lets calls run from now on.
func (f *fake) hold() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.free = false
}

// running is how many calls have arrived and were not ended by end.
func (f *fake) running() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.runs)
}

// end ends the call that has run longest.
func (f *fake) end(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.runs[0] <- err
	f.runs = f.runs[1:]
}

// calls makes n calls at the same time and returns where their errors arrive.
func calls(ctx context.Context, conn grpc.ClientConnInterface, method string, n int) chan error {
	errs := make(chan error, n)
	for range n {
		go func() { errs <- conn.Invoke(ctx, method, nil, nil) }()
	}
	return errs
}
