// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package replay_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var (
	unavailable = status.Error(codes.Unavailable, "try again")
	denied      = status.Error(codes.PermissionDenied, "never")
	rich        = budget.Config{Ratio: 1000, MinPerSecond: 1e6}
)

func retries(c retry.Config) interceptor.Spec {
	c.Budget, c.AllMethods = rich, true
	if c.Backoff.Initial == 0 {
		c.Backoff = retry.Backoff{Initial: time.Millisecond, Max: time.Millisecond, Jitter: retry.NoJitter}
	}
	return c
}

func hedges(c hedge.Config) interceptor.Spec {
	c.Budget, c.AllMethods = rich, true
	if c.Delay == 0 {
		c.Delay = time.Hour
	}
	return c
}

// layers are those that replay streams, alone and together.
func layers() map[string][]interceptor.Spec {
	return map[string][]interceptor.Spec{
		"retry":       {retries(retry.Config{})},
		"hedge":       {hedges(hedge.Config{})},
		"hedge_retry": {hedges(hedge.Config{}), retries(retry.Config{})},
	}
}

// each runs a test in a bubble for each kind of layer. script says what becomes of the
// attempts, counted from 1; n counts them.
func each(t *testing.T, script func(n int, s grpc.ServerStream) (handled bool, err error), f func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64)) {
	for name, ls := range layers() {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, n := dial(t, script, ls...)
				f(t, c, n)
			})
		})
	}
}

func dial(t *testing.T, script func(n int, s grpc.ServerStream) (handled bool, err error), ls ...interceptor.Spec) (testingv1.TestServiceClient, *atomic.Int64) {
	t.Helper()
	n := new(atomic.Int64)
	srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			if handled, err := script(int(n.Add(1)), s); handled {
				return err
			}
			return h(srv, s)
		})))
	return testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, ls...).DialOptions()...)), n
}

// failFirst is a script whose first attempt reads some messages and fails.
func failFirst(read int, err error) func(int, grpc.ServerStream) (bool, error) {
	return func(n int, s grpc.ServerStream) (bool, error) {
		if n > 1 {
			return false, nil
		}
		for range read {
			if err := s.RecvMsg(new(testingv1.BidiRequest)); err != nil {
				return true, err
			}
		}
		return true, err
	}
}

// The usual loop of an upload fills one buffer over and over.
func TestMessagesAreUsedAgain(t *testing.T) {
	for _, opts := range [][]grpc.CallOption{nil, {grpc.UseCompressor(gzip.Name)}} {
		var got []string
		each(t, func(n int, s grpc.ServerStream) (bool, error) {
			got = nil
			for m := new(testingv1.ClientStreamRequest); s.RecvMsg(m) == nil; m = new(testingv1.ClientStreamRequest) {
				if got = append(got, string(m.Payload)); n == 1 && len(got) == 3 {
					return true, unavailable
				}
			}
			return true, s.SendMsg(&testingv1.ClientStreamResponse{})
		}, func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, err := c.ClientStream(t.Context(), opts...)
			if err != nil {
				t.Fatal(err)
			}
			m := &testingv1.ClientStreamRequest{Payload: make([]byte, 1)}
			for i := range 4 {
				m.Payload[0] = byte('a' + i)
				if err := s.Send(m); err != nil {
					t.Errorf("message %d: %v", i, err)
				}
			}
			_, err = s.CloseAndRecv()
			if s := strings.Join(got, ""); err != nil || s != "abcd" || n.Load() != 2 {
				t.Errorf("the server got %q in attempt %d, %v; want abcd in the second", s, n.Load(), err)
			}
		})
	}
}

// A message that is sent after CloseSend is refused as by gRPC, also while the stream is
// repeated: no attempt gets it.
func TestSendAfterCloseSend(t *testing.T) {
	each(t, failFirst(1, unavailable), func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s, err := c.Bidi(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&testingv1.BidiRequest{Payload: []byte("a")}); err != nil {
			t.Fatal(err)
		}
		s.CloseSend()
		received := make(chan string)
		go func() {
			defer close(received)
			for r, err := s.Recv(); err == nil; r, err = s.Recv() {
				received <- string(r.Payload)
			}
		}()
		synctest.Wait() // A retry waits to repeat it, and a hedge has.
		if err := s.Send(&testingv1.BidiRequest{Payload: []byte("b")}); status.Code(err) != codes.Internal {
			t.Errorf("SendMsg after CloseSend: %v, want INTERNAL", err)
		}
		for m := range received {
			if m != "a" {
				t.Errorf("the server got %q", m)
			}
		}
	})
}

// asJSON is a codec that is not gRPC's own.
type asJSON struct{}

func (asJSON) Name() string                       { return "json" }
func (asJSON) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (asJSON) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }

// echo is a connection to a server that repeats what it gets, whose first attempt fails
// when it was sent some messages. It is not gRPC's.
type echo struct {
	grpc.ClientConnInterface
	fails int
	got   [][]any // Of each attempt.
}

func (c *echo) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	c.got = append(c.got, nil)
	return &echoed{ctx: ctx, conn: c, n: len(c.got) - 1}, nil
}

type echoed struct {
	grpc.ClientStream
	ctx  context.Context
	conn *echo
	n    int
}

func (s *echoed) Context() context.Context { return s.ctx }
func (s *echoed) Trailer() metadata.MD     { return nil }
func (s *echoed) CloseSend() error         { return nil }
func (s *echoed) SendMsg(m any) error {
	s.conn.got[s.n] = append(s.conn.got[s.n], m)
	return nil
}
func (s *echoed) RecvMsg(any) error {
	if s.n == 0 && len(s.conn.got[0]) >= s.conn.fails {
		return unavailable
	}
	return io.EOF
}

// Interceptors inside see messages of the caller's type, whatever its codec is.
func TestCodecs(t *testing.T) {
	type note struct{ Text string }
	for name, tc := range map[string]struct {
		opts     []grpc.CallOption
		m        func(s string) any
		text     func(m any) string
		attempts int
	}{
		"force_codec": {[]grpc.CallOption{grpc.ForceCodec(asJSON{})}, func(s string) any { return &note{s} }, func(m any) string { return m.(*note).Text }, 2},
		"by_value":    {[]grpc.CallOption{grpc.ForceCodec(asJSON{})}, func(s string) any { return note{s} }, func(m any) string { return m.(note).Text }, 2},
		"protocol_buffer": {nil, func(s string) any { return &testingv1.BidiRequest{Payload: []byte(s)} },
			func(m any) string { return string(m.(*testingv1.BidiRequest).Payload) }, 2},
		"unknown":  {nil, func(s string) any { return &note{s} }, func(m any) string { return m.(*note).Text }, 1},
		"prepared": {[]grpc.CallOption{grpc.ForceCodec(asJSON{})}, func(s string) any { return new(grpc.PreparedMsg) }, func(any) string { return "a" }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			conn := &echo{fails: 2}
			s, err := calltest.Stack(t, retries(retry.Config{})).Wrap(conn).NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/s/m", tc.opts...)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range []string{"a", "b"} {
				if err := s.SendMsg(tc.m(m)); err != nil {
					t.Fatal(err)
				}
			}
			if err := s.RecvMsg(nil); len(conn.got) != tc.attempts || err != io.EOF && tc.attempts == 2 {
				t.Fatalf("%d attempts, %v; want %d", len(conn.got), err, tc.attempts)
			}
			for i, got := range conn.got {
				if len(got) != 2 || tc.text(got[0]) != "a" {
					t.Errorf("attempt %d got %v, want the messages a and b", i, got)
				}
			}
		})
	}
}

func TestSendMsg(t *testing.T) {
	send := func(t *testing.T, c testingv1.TestServiceClient, size, most int) (s grpc.ClientStreamingClient[testingv1.ClientStreamRequest, testingv1.ClientStreamResponse], sent int, err error) {
		s, err = c.ClientStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for ; sent < most; sent++ {
			if err = s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size)}); err != nil {
				break
			}
			synctest.Wait()
		}
		return s, sent, err
	}
	t.Run("repeats", func(t *testing.T) {
		each(t, failFirst(1, unavailable), func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, sent, err := send(t, c, 10, 5)
			if err != nil || n.Load() != 2 {
				t.Fatalf("message %d: %v after %d attempts, want it sent to the second", sent, err, n.Load())
			}
			if r, err := s.CloseAndRecv(); err != nil || r.GetObserved().GetReceived() != 5 {
				t.Errorf("the server got %d messages, %v; want 5", r.GetObserved().GetReceived(), err)
			}
		})
	})
	t.Run("says_at_once_that_nothing_follows", func(t *testing.T) {
		each(t, failFirst(1, denied), func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, sent, err := send(t, c, 10, 5)
			if err != io.EOF || sent != 1 {
				t.Errorf("message %d: %v, want io.EOF at the second", sent+1, err)
			}
			if _, err := s.CloseAndRecv(); status.Code(err) != codes.PermissionDenied || n.Load() != 1 {
				t.Errorf("got %v in %d attempts, want the error of the one", err, n.Load())
			}
		})
	})
	t.Run("says_that_the_attempts_are_spent", func(t *testing.T) {
		each(t, func(int, grpc.ServerStream) (bool, error) { return true, unavailable }, func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, _, err := send(t, c, 10, 20)
			if err != io.EOF || n.Load() < 2 {
				t.Errorf("%v after %d attempts, want io.EOF after all of them", err, n.Load())
			}
			if _, err := s.CloseAndRecv(); status.Code(err) != codes.Unavailable {
				t.Errorf("got %v, want the error of the last", err)
			}
		})
	})
	t.Run("keeps_an_answer_that_came_early", func(t *testing.T) {
		each(t, func(_ int, s grpc.ServerStream) (bool, error) {
			return true, s.SendMsg(&testingv1.ClientStreamResponse{Payload: []byte("early")})
		}, func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, _, err := send(t, c, 10, 5)
			if err != io.EOF {
				t.Errorf("sending after the answer: %v, want io.EOF", err)
			}
			if r, err := s.CloseAndRecv(); err != nil || string(r.GetPayload()) != "early" || n.Load() != 1 {
				t.Errorf("got %q, %v in %d attempts; want the answer of the one", r.GetPayload(), err, n.Load())
			}
		})
	})
	t.Run("ends_with_the_context", func(t *testing.T) {
		each(t, failFirst(0, nil), func(t *testing.T, c testingv1.TestServiceClient, _ *atomic.Int64) {
			ctx, cancel := context.WithCancel(t.Context())
			s, err := c.Bidi(ctx)
			if err != nil {
				t.Fatal(err)
			}
			cancel()
			synctest.Wait()
			if err := s.Send(&testingv1.BidiRequest{}); err != io.EOF {
				t.Errorf("sending after the end: %v, want io.EOF", err)
			}
		})
	})
}

func TestBounds(t *testing.T) {
	const size = 100
	for name, tc := range map[string]struct {
		conf     retry.Config
		opts     []grpc.CallOption
		attempts int64
	}{
		"fits":            {retry.Config{BufferBytes: 2 * (size + 8)}, nil, 2},
		"stream":          {retry.Config{BufferBytes: size}, nil, 1},
		"all_streams":     {retry.Config{TotalBufferBytes: size}, nil, 1},
		"call_lowers_it":  {retry.Config{}, []grpc.CallOption{grpc.MaxRetryRPCBufferSize(size)}, 1},
		"call_raises_not": {retry.Config{BufferBytes: size}, []grpc.CallOption{grpc.MaxRetryRPCBufferSize(1 << 20)}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c, n := dial(t, failFirst(2, unavailable), retries(tc.conf))
				s, err := c.ClientStream(t.Context(), tc.opts...)
				if err != nil {
					t.Fatal(err)
				}
				for range 2 {
					if err := s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size)}); err != nil {
						t.Fatal(err)
					}
				}
				if _, err := s.CloseAndRecv(); n.Load() != tc.attempts || (err == nil) != (tc.attempts == 2) {
					t.Errorf("%d attempts, %v; want %d", n.Load(), err, tc.attempts)
				}
			})
		})
	}
	t.Run("is_given_back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, n := dial(t, func(n int, s grpc.ServerStream) (bool, error) {
				if n <= 10 {
					<-s.Context().Done()
					return true, s.Context().Err()
				}
				return n == 11, unavailable
			}, retries(retry.Config{TotalBufferBytes: 2 * size}))
			for range 10 { // Each would use up the bound of all.
				ctx, cancel := context.WithCancel(t.Context())
				s, err := c.ClientStream(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size)}); err != nil && err != io.EOF {
					t.Fatal(err)
				}
				cancel() // Nobody receives.
				synctest.Wait()
			}
			s, err := c.ClientStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size)}); err != nil {
				t.Fatal(err)
			}
			if _, err := s.CloseAndRecv(); err != nil || n.Load() != 12 {
				t.Errorf("got %v after %d attempts, want what ten streams kept to be free again, and 12", err, n.Load())
			}
		})
	})
}

func TestHeader(t *testing.T) {
	script := func(n int, s grpc.ServerStream) (bool, error) {
		if n == 1 {
			return true, unavailable
		}
		return false, s.SendHeader(metadata.Pairs("session", fmt.Sprint(n)))
	}
	t.Run("repeats", func(t *testing.T) {
		each(t, script, func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
			s, err := c.ServerStream(t.Context(), &testingv1.ServerStreamRequest{})
			if err != nil {
				t.Fatal(err)
			}
			if md, err := s.Header(); err != nil || !slices.Equal(md.Get("session"), []string{"2"}) || n.Load() != 2 {
				t.Errorf("header %v, %v after %d attempts; want that of the second", md, err, n.Load())
			}
			if _, err := s.Recv(); err != nil {
				t.Errorf("receiving: %v", err)
			}
		})
	})
	// One goroutine waits for the header before it sends, and another one receives.
	for _, first := range []string{"header", "receive"} {
		t.Run("before_it_sends/"+first+"_first", func(t *testing.T) {
			each(t, func(n int, s grpc.ServerStream) (bool, error) {
				return false, s.SendHeader(metadata.Pairs("session", fmt.Sprint(n)))
			}, func(t *testing.T, c testingv1.TestServiceClient, _ *atomic.Int64) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				s, err := c.Bidi(ctx)
				if err != nil {
					t.Fatal(err)
				}
				var wg sync.WaitGroup
				header := func() {
					if md, err := s.Header(); err != nil || len(md.Get("session")) != 1 {
						t.Errorf("header %v, %v", md, err)
					}
					if err := s.Send(&testingv1.BidiRequest{Payload: []byte("x")}); err != nil {
						t.Errorf("sending: %v", err)
					}
					s.CloseSend()
				}
				receive := func() {
					if r, err := s.Recv(); err != nil || string(r.GetPayload()) != "x" {
						t.Errorf("received %q, %v", r.GetPayload(), err)
					}
				}
				if first == "receive" {
					header, receive = receive, header
				}
				wg.Go(header)
				synctest.Wait()
				wg.Go(receive)
				wg.Wait()
				if _, err := s.Recv(); err != io.EOF {
					t.Errorf("the end is %v, want io.EOF", err)
				}
			})
		})
	}
}

func TestContext(t *testing.T) {
	type key struct{}
	each(t, failFirst(0, unavailable), func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
		three := int32(3)
		s, err := c.ServerStream(context.WithValue(t.Context(), key{}, "value"), &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{ResponseCount: &three}})
		if err != nil {
			t.Fatal(err)
		}
		ctx := s.Context()
		for range 3 {
			if _, err := s.Recv(); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if ctx.Err() != nil || ctx.Value(key{}) != "value" {
				t.Errorf("%v, value %v while the stream goes on", ctx.Err(), ctx.Value(key{}))
			}
		}
		if p, ok := peer.FromContext(ctx); !ok || n.Load() != 2 {
			t.Errorf("peer %v of %d attempts, want that of the second", p, n.Load())
		}
		if err := new(grpc.PreparedMsg).Encode(s, &testingv1.ServerStreamRequest{}); err != nil {
			t.Errorf("preparing a message: %v", err)
		}
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("the end is %v, want io.EOF", err)
		}
		synctest.Wait()
		if ctx.Err() == nil {
			t.Error("the context outlives the stream")
		}
	})
}

// A proxy makes its calls in the context of the stream that it serves.
func TestContextInsideAnotherStream(t *testing.T) {
	contexts, done := make(chan context.Context, 1), make(chan struct{})
	each(t, func(n int, s grpc.ServerStream) (bool, error) {
		if n == 1 {
			contexts <- s.Context()
			<-done
			return true, nil
		}
		return false, nil
	}, func(t *testing.T, c testingv1.TestServiceClient, _ *atomic.Int64) {
		contexts, done = make(chan context.Context, 1), make(chan struct{})
		outer, err := c.Bidi(t.Context(), grpc.UseCompressor(gzip.Name))
		if err != nil {
			t.Fatal(err)
		}
		of := <-contexts
		other := &peer.Peer{}
		s, err := c.Bidi(peer.NewContext(of, other))
		if err != nil {
			t.Fatal(err)
		}
		ctx := s.Context()
		if p, ok := peer.FromContext(ctx); !ok || p == other {
			t.Error("the stream has the peer of the other stream")
		}
		m := new(grpc.PreparedMsg) // Compressed as the stream is.
		if err := m.Encode(s, &testingv1.BidiRequest{Payload: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(m); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Recv(); err != nil {
			t.Errorf("after a prepared message: %v", err)
		}
		derived, cancel := context.WithCancel(ctx)
		defer cancel()
		s.CloseSend()
		if _, err := s.Recv(); err != io.EOF {
			t.Errorf("the end is %v, want io.EOF", err)
		}
		synctest.Wait()
		if derived.Err() == nil {
			t.Error("a context that is derived from the stream's outlives the stream")
		}
		close(done)
		if _, err := outer.Recv(); err != io.EOF {
			t.Errorf("the end of the other stream is %v, want io.EOF", err)
		}
	})
}

// What the caller does after CloseSend is as in gRPC, even if CloseSend comes while an
// attempt is still being sent what was kept. The race detector is a judge here.
func TestAfterCloseSend(t *testing.T) {
	var release chan struct{}
	each(t, func(n int, s grpc.ServerStream) (bool, error) {
		if n > 1 {
			<-release
			return false, nil
		}
		for range 3 {
			if err := s.RecvMsg(new(testingv1.ClientStreamRequest)); err != nil {
				return true, err
			}
		}
		return true, unavailable
	}, func(t *testing.T, c testingv1.TestServiceClient, n *atomic.Int64) {
		release = make(chan struct{})
		s, err := c.ClientStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for range 3 { // More than fits between client and server.
			if err := s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, 50<<10)}); err != nil {
				t.Fatal(err)
			}
		}
		received := make(chan error, 1)
		go func() { received <- s.RecvMsg(new(testingv1.ClientStreamResponse)) }()
		time.Sleep(time.Second) // Longer than the back-off.
		synctest.Wait()
		for range 2 {
			if err := s.CloseSend(); err != nil {
				t.Error(err)
			}
		}
		sent := make(chan error, 1)
		go func() { sent <- s.Send(&testingv1.ClientStreamRequest{}) }()
		synctest.Wait()
		close(release)
		if err := <-sent; status.Code(err) != codes.Internal {
			t.Errorf("sending after CloseSend: %v, want INTERNAL", err)
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		<-received
		if n.Load() != 2 {
			t.Errorf("%d attempts, want 2", n.Load())
		}
	})
}

// A timeout outside the layer that chooses the attempt ends the stream, or the caller's own
// deadline does: gRPC hears of it at the same time, and has written the results before the
// caller's RecvMsg returns.
func TestResultsOfStreamCutShort(t *testing.T) {
	for name, ls := range layers() {
		for end, own := range map[string]time.Duration{"idle": time.Hour, "deadline": time.Second / 2} {
			t.Run(name+"/"+end, func(t *testing.T) {
				for range 5 {
					synctest.Test(t, func(t *testing.T) {
						specs := append([]interceptor.Spec{timeout.Config{Idle: time.Second, Lifetime: time.Minute}}, ls...)
						c, _ := dial(t, func(int, grpc.ServerStream) (bool, error) { return false, nil }, specs...)
						ctx, cancel := context.WithTimeout(t.Context(), own)
						defer cancel()
						var h metadata.MD
						var p peer.Peer
						s, err := c.Bidi(ctx, grpc.Header(&h), grpc.Peer(&p))
						if err != nil {
							t.Fatal(err)
						}
						if err := s.Send(&testingv1.BidiRequest{}); err != nil {
							t.Fatal(err)
						}
						if _, err := s.Recv(); err != nil {
							t.Fatal(err)
						}
						if _, err := s.Recv(); status.Code(err) != codes.DeadlineExceeded || len(h) == 0 || p.Addr == nil {
							t.Errorf("header %v and peer %v after %v, want those of the attempt", h, p.Addr, err)
						}
					})
				}
			})
		}
	}
}

// panics is a stream whose SendMsg does.
type panics struct{ grpc.ClientStream }

func (panics) SendMsg(any) error { panic("on purpose") }

// A panic of an interceptor inside, while an attempt is sent what was kept, is the end of
// that attempt. It must not happen on a goroutine where nobody can recover from it.
func TestPanics(t *testing.T) {
	for name, ls := range map[string][]interceptor.Spec{
		"retry": {retries(retry.Config{})},
		"hedge": {hedges(hedge.Config{Delay: time.Second})},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n, served atomic.Int64
				srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(grpc.ChainStreamInterceptor(
					func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
						if served.Add(1) == 1 && name == "retry" {
							return unavailable
						}
						<-s.Context().Done()
						return s.Context().Err()
					})))
				opts := append(calltest.Stack(t, ls...).DialOptions(), grpc.WithChainStreamInterceptor(
					func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
						s, err := next(ctx, desc, cc, method, opts...)
						if err == nil && n.Add(1) > 1 {
							s = panics{s}
						}
						return s, err
					}))
				c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, opts...))
				s, err := c.Bidi(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Send(&testingv1.BidiRequest{Payload: make([]byte, 40<<10)}); err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); status.Code(err) != codes.Internal || n.Load() != 2 {
					t.Errorf("%v after %d attempts, want INTERNAL after 2", err, n.Load())
				}
			})
		})
	}
}

// CloseSend comes while nothing can be sent, and is not lost.
func TestCloseSendDuringBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := dial(t, failFirst(1, unavailable), retries(retry.Config{Backoff: retry.Backoff{Initial: time.Second, Jitter: retry.NoJitter}}))
		s, err := c.Bidi(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&testingv1.BidiRequest{Payload: []byte("x")}); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() {
			for {
				if _, err := s.Recv(); err != nil {
					done <- err
					return
				}
			}
		}()
		synctest.Wait()
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		if err := <-done; err != io.EOF {
			t.Errorf("the end is %v, want io.EOF", err)
		}
	})
}

// Results are there when the caller learns of the end, and not written after it. The race
// detector is a judge here, too.
func TestResults(t *testing.T) {
	server := func(t *testing.T, handle func(s grpc.ServerStream) error, ls ...interceptor.Spec) testingv1.TestServiceClient {
		n := new(atomic.Int64)
		srv := testserver.New(t, testserver.GRPC(grpc.ChainStreamInterceptor(func(_ any, s grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
			if n.Add(1)%2 == 1 {
				return unavailable
			}
			s.SetHeader(metadata.Pairs("session", "42"))
			return handle(s)
		})))
		return testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, ls...).DialOptions()...))
	}
	for name, ls := range layers() {
		t.Run("cancelled/"+name, func(t *testing.T) {
			c := server(t, func(s grpc.ServerStream) error {
				s.SendMsg(&testingv1.ServerStreamResponse{})
				<-s.Context().Done()
				return s.Context().Err()
			}, ls...)
			for i := range 100 {
				ctx, cancel := context.WithCancel(t.Context())
				var h metadata.MD
				var p peer.Peer
				told := make(chan bool, 1)
				s, err := c.ServerStream(ctx, &testingv1.ServerStreamRequest{}, grpc.Header(&h), grpc.Peer(&p), grpc.OnFinish(func(error) { told <- len(h.Get("session")) == 1 }))
				if err != nil {
					t.Fatal(err)
				}
				if _, err := s.Recv(); err != nil {
					t.Fatal(err)
				}
				cancel()
				if i%2 == 0 {
					if _, err := s.Recv(); err == nil {
						t.Fatal("received after the end")
					}
					if len(h.Get("session")) == 0 || p.Addr == nil {
						t.Errorf("stream %d: header %v, peer %v when Recv had returned", i, h, p.Addr)
					}
				}
				if !<-told {
					t.Errorf("stream %d: no header when OnFinish was called", i)
				}
			}
		})
		t.Run("answered_early/"+name, func(t *testing.T) {
			c := server(t, func(s grpc.ServerStream) error {
				s.RecvMsg(new(testingv1.BidiRequest))
				return s.SendMsg(&testingv1.BidiResponse{})
			}, ls...)
			for i := range 30 {
				var h metadata.MD
				s, err := c.Bidi(t.Context(), grpc.Header(&h))
				if err != nil {
					t.Fatal(err)
				}
				for range 5 {
					if s.Send(&testingv1.BidiRequest{Payload: make([]byte, 20000)}) != nil {
						break
					}
				}
				s.CloseSend()
				for err == nil {
					_, err = s.Recv()
				}
				if err != io.EOF || len(h.Get("session")) == 0 {
					t.Errorf("stream %d: header %v when Recv had returned %v", i, h, err)
				}
			}
		})
	}
}

// Each message arrives once and in order, or the call fails, whatever the server does.
// The server answers each message with itself.
func TestStress(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	var mu sync.Mutex
	rng := rand.New(rand.NewPCG(seed, 0))
	draw := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rng.IntN(n)
	}
	c, n := dialTCP(t, func(s grpc.ServerStream) (bool, error) {
		switch draw(6) {
		case 0:
			return true, unavailable
		case 1, 2:
			if md, _ := metadata.FromIncomingContext(s.Context()); len(md["waits"]) > 0 { // For the header, before it sends.
				s.SendHeader(metadata.Pairs("a", "b"))
			}
			for range draw(20) {
				if s.RecvMsg(new(testingv1.BidiRequest)) != nil {
					break
				}
			}
			return true, unavailable
		case 3:
			s.SendHeader(metadata.Pairs("a", "b"))
			return true, unavailable
		case 4:
			time.Sleep(time.Duration(draw(3)) * time.Millisecond)
		}
		return false, s.SendHeader(metadata.Pairs("a", "b")) // Some wait for it.
	}, hedges(hedge.Config{Delay: time.Millisecond, MaxAttempts: 3}), retries(retry.Config{MaxAttempts: 4, BufferBytes: 64 << 10}))
	var wg sync.WaitGroup
	var ok, failed atomic.Int64
	end := func(err error) {
		if err == nil {
			ok.Add(1)
			return
		}
		if status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
			t.Errorf("got %v", err)
		}
		failed.Add(1)
	}
	buffer := func(size int) func(i int) []byte { // One for all messages.
		b := make([]byte, size)
		return func(i int) []byte { copy(b, fmt.Sprintf("%06d", i)); return b }
	}
	for range 100 {
		messages, size, kind := draw(60), 6+draw(3000), draw(4)
		header, cancelled := draw(4) == 0, draw(10) == 0
		wg.Go(func() {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if cancelled {
				time.AfterFunc(time.Duration(messages)*100*time.Microsecond, cancel)
			}
			fill := buffer(size)
			if kind == 0 {
				s, err := c.ClientStream(ctx)
				for i := 0; err == nil && i < messages; i++ {
					err = s.Send(&testingv1.ClientStreamRequest{Payload: fill(i)})
				}
				var r *testingv1.ClientStreamResponse
				if s != nil && (err == nil || err == io.EOF) {
					r, err = s.CloseAndRecv()
				}
				if err == nil && int(r.GetObserved().GetReceived()) != messages {
					t.Errorf("the server got %d messages of %d", r.GetObserved().GetReceived(), messages)
				}
				end(err)
				return
			}
			if header {
				ctx = metadata.AppendToOutgoingContext(ctx, "waits", "1")
			}
			s, err := c.Bidi(ctx)
			if err != nil {
				end(err)
				return
			}
			wg.Go(func() {
				if header {
					s.Header()
				}
				for i := range messages {
					if s.Send(&testingv1.BidiRequest{Payload: fill(i)}) != nil {
						return
					}
				}
				s.CloseSend()
			})
			for i := 0; ; i++ {
				r, err := s.Recv()
				if err == io.EOF && i == messages {
					end(nil)
					return
				}
				if err != nil {
					end(err)
					return
				}
				if want := fmt.Appendf(nil, "%06d", i); !bytes.HasPrefix(r.GetPayload(), want) {
					t.Errorf("answer %d is %.6q", i, r.GetPayload())
					return
				}
			}
		})
	}
	wg.Wait()
	t.Logf("%d streams well, %d failed, %d attempts", ok.Load(), failed.Load(), n.Load())
	if ok.Load() < 25 {
		t.Errorf("%d of 100 streams went well: the test tests nothing", ok.Load())
	}
}

func dialTCP(t *testing.T, script func(s grpc.ServerStream) (bool, error), ls ...interceptor.Spec) (testingv1.TestServiceClient, *atomic.Int64) {
	n := new(atomic.Int64)
	srv := testserver.New(t, testserver.GRPC(grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
		n.Add(1)
		if handled, err := script(s); handled {
			return err
		}
		return h(srv, s)
	})))
	return testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, ls...).DialOptions()...)), n
}
