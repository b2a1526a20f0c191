// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/maker"
	"github.com/belfry-go/belfry/interceptor/steer"
)

// fakeConn is a connection whose state the test sets.
type fakeConn struct {
	grpc.ClientConnInterface
	mu       sync.Mutex // guards all below
	state    connectivity.State
	changed  chan struct{} // closed at the next change
	connects int
}

func newFakeConn(state connectivity.State) *fakeConn {
	return &fakeConn{state: state, changed: make(chan struct{})}
}

func (c *fakeConn) set(state connectivity.State) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.state = state
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *fakeConn) Connect() {
	c.mu.Lock()
	c.connects++
	idle := c.state == connectivity.Idle
	c.mu.Unlock()
	if idle {
		c.set(connectivity.Connecting)
	}
}

func (c *fakeConn) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return nil }

func (c *fakeConn) Close() error { return nil }

func (c *fakeConn) GetState() connectivity.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

func (c *fakeConn) WaitForStateChange(ctx context.Context, source connectivity.State) bool {
	for {
		c.mu.Lock()
		state, changed := c.state, c.changed
		c.mu.Unlock()
		if state != source {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

// WaitReady returns nil for a READY connection even if the context has ended.
func TestWaitReadyContextEnded(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	conn := newFakeConn(connectivity.Ready)
	if err := belfry.WaitReady(ctx, conn); err != nil {
		t.Errorf("WaitReady = %v, want nil", err)
	}
	if conn.connects != 0 {
		t.Errorf("Connect was called %d times on a READY connection, want 0", conn.connects)
	}
}

// WaitReady connects and waits through failures.
func TestWaitReadyThroughFailures(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newFakeConn(connectivity.Idle)
		go func() {
			for _, state := range []connectivity.State{
				connectivity.TransientFailure, connectivity.Connecting,
				connectivity.Idle, // the server sent GOAWAY: connect again
				connectivity.TransientFailure, connectivity.Ready,
			} {
				time.Sleep(time.Second)
				conn.set(state)
			}
		}()
		start := time.Now()
		if err := belfry.WaitReady(t.Context(), conn); err != nil {
			t.Fatalf("WaitReady = %v, want nil", err)
		}
		if got, want := time.Since(start), 5*time.Second; got != want {
			t.Errorf("WaitReady returned after %v, want %v", got, want)
		}
		if conn.connects != 2 {
			t.Errorf("Connect was called %d times, want 2: once for each time it was IDLE", conn.connects)
		}
	})
}

// WaitReady names the last state when the deadline passes.
func TestWaitReadyDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := newFakeConn(connectivity.Idle)
		go func() {
			time.Sleep(time.Second)
			conn.set(connectivity.TransientFailure)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
		defer cancel()
		err := belfry.WaitReady(ctx, conn)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("WaitReady = %v, want an error that wraps context.DeadlineExceeded", err)
		}
		if got, want := status.Code(err), codes.DeadlineExceeded; got != want {
			t.Errorf("status code is %v, want %v", got, want)
		}
		const want = "belfry: connection is not ready, its last state is TRANSIENT_FAILURE: context deadline exceeded"
		if err == nil || err.Error() != want {
			t.Errorf("WaitReady = %q, want %q", err, want)
		}
	})
}

func TestWaitReadyCancelled(t *testing.T) {
	cause := errors.New("giving up")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(cause)
	err := belfry.WaitReady(ctx, newFakeConn(connectivity.Connecting))
	if !errors.Is(err, context.Canceled) || !errors.Is(err, cause) {
		t.Errorf("WaitReady = %v, want an error that wraps context.Canceled and the cause", err)
	}
	if got, want := status.Code(err), codes.Canceled; got != want {
		t.Errorf("status code is %v, want %v", got, want)
	}
	if !strings.Contains(err.Error(), "CONNECTING") || !strings.Contains(err.Error(), "giving up") {
		t.Errorf("error is %q, want it to name the state CONNECTING and the cause", err)
	}
}

func TestWaitReadyClosed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		if err := belfry.WaitReady(t.Context(), newFakeConn(connectivity.Shutdown)); !errors.Is(err, belfry.ErrClosed) {
			t.Errorf("WaitReady of a closed connection = %v, want ErrClosed", err)
		}
		conn := newFakeConn(connectivity.Connecting)
		go func() {
			time.Sleep(time.Second)
			conn.set(connectivity.Shutdown)
		}()
		if err := belfry.WaitReady(t.Context(), conn); !errors.Is(err, belfry.ErrClosed) {
			t.Errorf("WaitReady of a connection being closed = %v, want ErrClosed", err)
		}
	})
}

// All connections connect at the same time, and WaitReady returns when the last is READY.
func TestWaitReadyThroughStack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		made, a, b := newFakeConn(connectivity.Idle), newFakeConn(connectivity.Idle), newFakeConn(connectivity.Idle)
		m, err := maker.New(maker.Config{}, func(context.Context, string, any) (string, error) { return "", nil },
			func(context.Context, string) (maker.Conn, error) { return made, nil })
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		inner, err := interceptor.NewStack()
		if err != nil {
			t.Fatal(err)
		}
		s, err := steer.New(func(context.Context, string, any) (context.Context, string, error) { return nil, "m", nil },
			map[string]grpc.ClientConnInterface{"m": m, "a": inner.Wrap(a), "b": b})
		if err != nil {
			t.Fatal(err)
		}
		conn := inner.Wrap(s)
		conn.Invoke(t.Context(), "/s/m", nil, nil) // The Maker makes its connection.
		for i, c := range []*fakeConn{made, a, b} {
			go func() {
				time.Sleep(time.Duration(i+1) * time.Second)
				c.set(connectivity.Ready)
			}()
		}
		start := time.Now()
		if err := belfry.WaitReady(t.Context(), conn); err != nil {
			t.Errorf("WaitReady = %v, want nil", err)
		}
		if got, want := time.Since(start), 3*time.Second; got != want {
			t.Errorf("WaitReady returned after %v, want %v", got, want)
		}
		if made.connects != 1 || a.connects != 1 || b.connects != 1 {
			t.Errorf("Connect was called %d, %d and %d times, want once each", made.connects, a.connects, b.connects)
		}
		a.set(connectivity.Shutdown)
		if err := belfry.WaitReady(t.Context(), conn); !errors.Is(err, belfry.ErrClosed) {
			t.Errorf("WaitReady with one of them closed = %v, want ErrClosed", err)
		}
	})
}

func TestWaitReadyNeedsAState(t *testing.T) {
	type noState struct{ grpc.ClientConnInterface }
	err := belfry.WaitReady(t.Context(), noState{})
	if err == nil || !strings.Contains(err.Error(), "noState has neither a state") {
		t.Errorf("WaitReady = %v, want an error that names the type", err)
	}
}

// No server listens, so the error says "connection refused".
func TestWaitReadySaysWhy(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///orders",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return nil, errors.New("connection refused") }),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			if method != "/belfry.WaitReady/Reason" {
				t.Errorf("the call for the reason is of %s, want the documented method", method)
			}
			err := invoker(ctx, method, req, reply, cc, opts...)
			cancel() // WaitReady knows enough.
			return err
		}))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	err = belfry.WaitReady(ctx, conn)
	if err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("WaitReady = %v, want an error that says %q", err, "connection refused")
	}
	if got, want := status.Code(err), codes.Canceled; got != want {
		t.Errorf("status code is %v, want %v", got, want)
	}
}

func TestWaitReadyRealConnection(t *testing.T) {
	lis := bufconn.Listen(1 << 16)
	server := grpc.NewServer()
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve = %v", err)
		}
	}()
	conn, err := grpc.NewClient("passthrough:///test",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return lis.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := belfry.WaitReady(ctx, conn); err != nil {
		t.Errorf("WaitReady = %v, want nil", err)
	}
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	if err := belfry.WaitReady(ctx, conn); !errors.Is(err, belfry.ErrClosed) {
		t.Errorf("WaitReady after Close = %v, want ErrClosed", err)
	}
}
