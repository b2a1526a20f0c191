// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/race"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// dial returns a client of a server in memory, whose calls go through the layers
// and whose attempts, counted from 1, first through script. What script handles
// ends as it says.
func dial(t *testing.T, script func(n int, s grpc.ServerStream) (handled bool, err error), layers ...interceptor.Spec) (testingv1.TestServiceClient, *atomic.Int64) {
	t.Helper()
	n := new(atomic.Int64)
	srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(
		grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
			if handled, err := script(int(n.Add(1)), s); handled {
				return err
			}
			return handler(srv, s)
		})))
	return testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, layers...).DialOptions()...)), n
}

// failing is a script of n attempts that fail after reading some messages and
// sending headers.
func failing(n, read int) func(int, grpc.ServerStream) (bool, error) {
	return func(i int, s grpc.ServerStream) (bool, error) {
		if i > n {
			return false, nil
		}
		for range read {
			if err := s.RecvMsg(new(testingv1.BidiRequest)); err != nil {
				break // Fewer were sent.
			}
		}
		if err := s.SendHeader(metadata.Pairs("attempt", fmt.Sprint(i))); err != nil {
			return true, err
		}
		return true, unavailable
	}
}

func TestStreamRepeatedAfterHeaders(t *testing.T) {
	for kind, want := range map[interceptor.Kind]string{
		interceptor.ClientStream: "2 3", interceptor.ServerStream: "x 1,x 1,x 1", interceptor.BidiStream: "0 1,1 2,2 3",
	} {
		for read := range 5 {
			if kind == interceptor.BidiStream && read > 1 {
				break // The client waits for an answer to each message.
			}
			synctest.Test(t, func(t *testing.T) {
				l := mustNew(t, quick)
				c, n := dial(t, failing(2, read), l)
				var header, trailer metadata.MD
				finished := 0
				got, err := calltest.Exchange(t.Context(), c, kind, grpc.Header(&header), grpc.Trailer(&trailer), grpc.OnFinish(func(error) { finished++ }))
				if s := strings.Join(got, ","); s != want || err != nil || n.Load() != 3 {
					t.Errorf("%v, reading %d: got %q, %v in %d attempts; want %q in 3", kind, read, s, err, n.Load(), want)
				}
				if finished != 1 || len(header.Get("attempt")) != 0 || len(header.Get("content-type")) == 0 {
					t.Errorf("%v: %d OnFinish, header %v; want one, and the header of the last attempt", kind, finished, header)
				}
				if got := l.Budget().Balance(); got < 98.1999 || got > 98.2001 {
					t.Errorf("%v: balance = %v, want 100 + 0.2 - 2", kind, got)
				}
			})
		}
	}
}

func TestUnaryRepeatedAfterHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		srv := testserver.New(t, testserver.InMemory())
		if err := srv.FailAfterHeaders(codes.Unavailable, 1); err != nil {
			t.Fatal(err)
		}
		c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, mustNew(t, quick)).DialOptions()...))
		time.AfterFunc(25*time.Millisecond, srv.Heal)
		r, err := c.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: &testingv1.Behaviour{EchoMetadata: []string{"grpc-previous-rpc-attempts"}}})
		if err != nil || srv.Stats().Started != 3 {
			t.Fatalf("%v after %d attempts, want success of the third", err, srv.Stats().Started)
		}
		if got := r.GetObserved().GetRequestMetadata()["grpc-previous-rpc-attempts"]; got != "2" {
			t.Errorf("the server was told of %q attempts before, want 2", got)
		}
	})
}

func TestRetryGoesToUntriedEndpoint(t *testing.T) {
	cluster := testserver.NewCluster(t, 3, nil)
	r := manual.NewBuilderWithScheme("retry")
	r.InitialState(resolver.State{Endpoints: cluster.Endpoints()})
	// With three attempts every call meets the one server that answers.
	l := mustNew(t, retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}, Budget: budget.Config{MinPerSecond: 1000}})
	opts := append(calltest.Stack(t, l).DialOptions(), cluster.DialOptions()...)
	opts = append(opts, p2c.DialOptions()...)
	conn, err := grpc.NewClient("retry:///servers", append(opts, grpc.WithResolvers(r),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"load":{"constant":{}}}}]}`))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.Connect()
	for i, s := range cluster.Servers() {
		if err := s.WaitConnections(t.Context(), 1); err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			if err := s.Fail(codes.Unavailable, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	c := testingv1.NewTestServiceClient(conn)
	for cluster.Server(0).Stats().Started == 0 || cluster.Server(1).Stats().Started == 0 || cluster.Server(2).Stats().Started == 0 {
		calltest.Exchange(t.Context(), c, interceptor.Unary) // Until all are READY for the picker.
	}
	for i := range 100 {
		if _, err := calltest.Exchange(t.Context(), c, interceptor.Kind(i%4)); err != nil {
			t.Errorf("call %d: %v, want it to reach the server that answers", i, err)
		}
	}
}

func TestTransparentRetriesDoNotCount(t *testing.T) {
	srv := testserver.New(t)
	e := &events{}
	l := mustNew(t, retry.Config{})
	c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, interceptor.Observe(e), l).DialOptions()...))
	const calls = 40
	for i := range calls {
		if i%10 == 5 {
			if err := srv.GoAway(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := calltest.Exchange(t.Context(), c, interceptor.Kind(i%4), grpc.WaitForReady(true)); err != nil {
			t.Errorf("call %d: %v, want gRPC to move it to the next connection", i, err)
		}
	}
	for _, log := range e.log {
		if strings.HasPrefix(log, "attempt ") && log != "attempt 0" {
			t.Errorf("the observer saw %q, want first attempts only", log)
		}
	}
	if got, want := l.Budget().Balance(), 100+0.2*calls; got < want-1e-6 || got > want+1e-6 {
		t.Errorf("balance = %v, want %v: nothing spent", got, want)
	}
}

func TestServerDelayOnTheWire(t *testing.T) {
	for kind := interceptor.Unary; kind <= interceptor.BidiStream; kind++ {
		for pushback, want := range map[string]int64{"-1": 1, "5": 3} {
			synctest.Test(t, func(t *testing.T) {
				srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(
					grpc.ChainStreamInterceptor(func(srv any, s grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
						s.SetTrailer(metadata.Pairs("grpc-retry-pushback-ms", pushback))
						return h(srv, s)
					}),
					grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
						if err := grpc.SetTrailer(ctx, metadata.Pairs("grpc-retry-pushback-ms", pushback)); err != nil {
							return nil, err
						}
						return h(ctx, req)
					})))
				if err := srv.Fail(codes.Unavailable, 1); err != nil {
					t.Fatal(err)
				}
				c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, mustNew(t, retry.Config{})).DialOptions()...))
				start := time.Now()
				if _, err := calltest.Exchange(t.Context(), c, kind); status.Code(err) != codes.Unavailable {
					t.Errorf("%v: got %v, want UNAVAILABLE", kind, err)
				}
				if got := srv.Stats().Started; got != want {
					t.Errorf("%v, pushback %s: %d attempts, want %d", kind, pushback, got, want)
				}
				if got, wait := time.Since(start), time.Duration(want-1)*5*time.Millisecond; got != wait {
					t.Errorf("%v, pushback %s: took %v, want %v", kind, pushback, got, wait)
				}
			})
		}
	}
}

func TestStreamDeliversNoMessageTwice(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, n := dial(t, func(_ int, s grpc.ServerStream) (bool, error) {
			if err := s.SendMsg(&testingv1.ServerStreamResponse{Payload: []byte("a")}); err != nil {
				return true, err
			}
			return true, unavailable
		}, mustNew(t, quick))
		got, err := calltest.Exchange(t.Context(), c, interceptor.ServerStream)
		if status.Code(err) != codes.Unavailable || !slices.Equal(got, []string{"a 0"}) || n.Load() != 1 {
			t.Errorf("got %q, %v in %d attempts; want one message, then the error, in one", got, err, n.Load())
		}
	})
}

func TestStreamHeaderSeenCommits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, n := dial(t, failing(2, 0), mustNew(t, quick))
		s, err := c.ServerStream(t.Context(), &testingv1.ServerStreamRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if md, err := s.Header(); err != nil || !slices.Equal(md.Get("attempt"), []string{"1"}) {
			t.Errorf("header %v, %v; want the first attempt's", md, err)
		}
		if _, err := s.Recv(); status.Code(err) != codes.Unavailable || n.Load() != 1 {
			t.Errorf("got %v in %d attempts, want the error of the one", err, n.Load())
		}
	})
}

func TestStreamHeaderMissingDoesNotCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, n := dial(t, func(n int, _ grpc.ServerStream) (bool, error) { return n < 3, unavailable }, mustNew(t, quick))
		s, err := c.ServerStream(t.Context(), &testingv1.ServerStreamRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil {
			t.Errorf("Header: %v", err)
		}
		if _, err := s.Recv(); err != nil || n.Load() != 3 {
			t.Errorf("got %v in %d attempts, want the message of the third", err, n.Load())
		}
		if md, err := s.Header(); err != nil || len(md) == 0 {
			t.Errorf("Header after the first message = %v, %v; want that of the third attempt", md, err)
		}
		if len(s.Trailer()) != 0 || s.Context().Err() != nil {
			t.Errorf("trailer %v, context %v while the stream is open", s.Trailer(), s.Context().Err())
		}
	})
}

// An attempt may have a header and fail: then its header is not the stream's.
func TestStreamHeaderIsThatOfReceivedAttempt(t *testing.T) {
	for name, wait := range map[string]time.Duration{"before the failure": 0, "during the back-off": time.Second / 2} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				conn := &scripted{script: func(_ context.Context, n int) *scriptedStream {
					return &scriptedStream{
						recv: func() error {
							if n == 1 {
								time.Sleep(time.Second / 4)
								return unavailable
							}
							return nil
						},
						header: func() metadata.MD {
							time.Sleep(time.Second / 2)
							return metadata.Pairs("attempt", fmt.Sprint(n))
						},
					}
				}}
				conf := retry.Config{Backoff: retry.Backoff{Initial: time.Second, Jitter: retry.NoJitter}}
				s, err := calltest.Stack(t, mustNew(t, conf)).Wrap(conn).NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, method)
				if err != nil {
					t.Fatal(err)
				}
				received := make(chan error, 1)
				go func() { received <- s.RecvMsg(nil) }()
				time.Sleep(wait)
				if md, err := s.Header(); err != nil || !slices.Equal(md.Get("attempt"), []string{"2"}) {
					t.Errorf("header %v, %v; want that of the second attempt", md, err)
				}
				if err := <-received; err != nil {
					t.Errorf("RecvMsg: %v", err)
				}
			})
		})
	}
}

func TestStreamBufferBytes(t *testing.T) {
	for size, want := range map[int]int64{900: 2, 1100: 1} {
		synctest.Test(t, func(t *testing.T) {
			conf := quick
			conf.BufferBytes = 1024
			c, n := dial(t, failing(1, 2), mustNew(t, conf))
			s, err := c.ClientStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size/2)}); err != nil {
					t.Errorf("sending: %v", err)
				}
			}
			_, err = s.CloseAndRecv()
			if n.Load() != want || (err == nil) != (want == 2) {
				t.Errorf("%d bytes of 1024: %d attempts, %v; want %d", size, n.Load(), err, want)
			}
		})
	}
}

// What they are kept in takes memory, however little is in them.
func TestStreamBufferCountsEmptyMessages(t *testing.T) {
	for messages, want := range map[int]int64{200: 2, 201: 1} {
		synctest.Test(t, func(t *testing.T) {
			conf := quick
			conf.BufferBytes = 1000
			c, n := dial(t, failing(1, messages), mustNew(t, conf))
			s, err := c.ClientStream(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for range messages {
				if err := s.Send(&testingv1.ClientStreamRequest{}); err != nil {
					t.Errorf("sending: %v", err)
				}
			}
			_, err = s.CloseAndRecv()
			if n.Load() != want || (err == nil) != (want == 2) {
				t.Errorf("%d messages of 5 bytes of 1000: %d attempts, %v; want %d", messages, n.Load(), err, want)
			}
		})
	}
}

// A server that answers as it reads, to a client that does not read while it
// replays, would wait for the client as the client waits for it.
func TestStreamReplayDoesNotDeadlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const messages, size = 30, 8 << 10
		c, n := dial(t, func(n int, s grpc.ServerStream) (bool, error) {
			if n > 1 {
				return false, nil
			}
			for range messages {
				if err := s.RecvMsg(new(testingv1.BidiRequest)); err != nil {
					return true, err
				}
			}
			return true, unavailable
		}, mustNew(t, quick))
		s, err := c.Bidi(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		answer := int32(32 << 10) // Four times what is asked.
		for i := range messages {
			if err := s.Send(&testingv1.BidiRequest{Payload: bytes.Repeat([]byte{byte(i)}, size), Behaviour: &testingv1.Behaviour{ResponseSize: &answer}}); err != nil {
				t.Fatalf("sending: %v", err)
			}
		}
		if _, err := s.Recv(); err != nil {
			t.Fatal(err)
		}
		// The replay may still be under way: this comes after it.
		if err := s.Send(&testingv1.BidiRequest{Payload: []byte("last")}); err != nil {
			t.Fatalf("sending: %v", err)
		}
		if err := s.CloseSend(); err != nil {
			t.Fatal(err)
		}
		for i := 1; i < messages; i++ {
			if r, err := s.Recv(); err != nil || len(r.GetPayload()) != int(answer) {
				t.Fatalf("answer %d: %d bytes, %v", i, len(r.GetPayload()), err)
			}
		}
		if r, err := s.Recv(); err != nil || string(r.GetPayload()) != "last" || r.GetObserved().GetReceived() != messages+1 {
			t.Errorf("the last answer is %q to %d messages, %v", r.GetPayload(), r.GetObserved().GetReceived(), err)
		}
		if _, err := s.Recv(); err != io.EOF || n.Load() != 2 {
			t.Errorf("the end is %v in %d attempts, want io.EOF in 2", err, n.Load())
		}
	})
}

// scripted is a connection whose streams, counted from 1, do as script says.
type scripted struct {
	grpc.ClientConnInterface
	n      int
	script func(ctx context.Context, n int) *scriptedStream
}

func (c *scripted) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	c.n++
	s := c.script(ctx, c.n)
	s.ctx = ctx
	return s, nil
}

type scriptedStream struct {
	ctx    context.Context
	send   func(m any) error
	recv   func() error
	header func() metadata.MD
}

func (s *scriptedStream) Header() (metadata.MD, error) { return s.header(), nil }
func (s *scriptedStream) Trailer() metadata.MD         { return nil }
func (s *scriptedStream) CloseSend() error             { return nil }
func (s *scriptedStream) Context() context.Context     { return s.ctx }
func (s *scriptedStream) SendMsg(m any) error          { return s.send(m) }
func (s *scriptedStream) RecvMsg(any) error            { return s.recv() }

// A caller that keeps sending during a short replay must not make it a long one, because
// then the server and the client could wait for each other.
func TestStreamReceivesDuringReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, messages, window = 8 << 10, 10, 64 << 10
		replaying, sent, read := make(chan struct{}), make(chan struct{}), make(chan struct{})
		got := 0
		conn := &scripted{script: func(ctx context.Context, n int) *scriptedStream {
			if n == 1 {
				return &scriptedStream{send: func(any) error { return nil }, recv: func() error { return unavailable }}
			}
			return &scriptedStream{
				send: func(any) error {
					if got++; got == 1 {
						close(replaying)
						<-sent
					}
					if got*size <= window {
						return nil
					}
					select {
					case <-read:
						return nil
					case <-ctx.Done():
						return io.EOF
					}
				},
				recv: func() error { close(read); return nil },
			}
		}}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		s, err := calltest.Stack(t, mustNew(t, quick)).Wrap(conn).NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		m := wrapperspb.Bytes(make([]byte, size-10))
		if err := s.SendMsg(m); err != nil {
			t.Fatal(err)
		}
		go func() {
			defer close(sent)
			<-replaying
			for range messages {
				if err := s.SendMsg(m); err != nil {
					t.Errorf("sending: %v", err)
				}
			}
		}()
		start := time.Now()
		if err := s.RecvMsg(nil); err != nil || time.Since(start) > time.Second {
			t.Errorf("RecvMsg: %v after %v, want a message after the back-off", err, time.Since(start))
		}
		synctest.Wait()
		if got != 1+messages {
			t.Errorf("%d messages were sent to the second attempt, want %d", got, 1+messages)
		}
	})
}

func TestStreamSendsDuringBackoffInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conf := retry.Config{Backoff: retry.Backoff{Initial: time.Second, Jitter: retry.NoJitter}}
		c, _ := dial(t, failing(1, 1), mustNew(t, conf))
		s, err := c.Bidi(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		send := func(i int) {
			if err := s.Send(&testingv1.BidiRequest{Payload: fmt.Append(nil, i)}); err != nil {
				t.Errorf("sending %d: %v", i, err)
			}
		}
		send(0)
		got := make(chan []string)
		go func() {
			var all []string
			for {
				r, err := s.Recv()
				if err != nil {
					if err != io.EOF {
						t.Errorf("the end is %v, want io.EOF", err)
					}
					got <- all
					return
				}
				all = append(all, string(r.GetPayload()))
			}
		}()
		synctest.Wait()
		for i := 1; i < 10; i++ {
			send(i)
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		if got, want := strings.Join(<-got, ""), "0123456789"; got != want {
			t.Errorf("the server saw %q, want %q", got, want)
		}
	})
}

func TestStreamBufferFillsDuringBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conf := retry.Config{BufferBytes: 1000, Backoff: retry.Backoff{Initial: time.Second, Jitter: retry.NoJitter}}
		c, n := dial(t, failing(1, 1), mustNew(t, conf))
		s, err := c.ClientStream(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		send := func(size int) error {
			return s.Send(&testingv1.ClientStreamRequest{Payload: make([]byte, size)})
		}
		if err := send(600); err != nil {
			t.Fatal(err)
		}
		done := make(chan string)
		go func() {
			r := new(testingv1.ClientStreamResponse)
			err := s.RecvMsg(r)
			done <- fmt.Sprint(r.GetObserved().GetReceived(), " ", err)
		}()
		synctest.Wait()
		start := time.Now()
		if err := send(600); err != nil || time.Since(start) != time.Second {
			t.Errorf("sending what does not fit: %v after %v, want it sent after the back-off", err, time.Since(start))
		}
		if err := s.CloseSend(); err != nil {
			t.Error(err)
		}
		if got := <-done; got != "2 <nil>" || n.Load() != 2 {
			t.Errorf("got %s in %d attempts, want both messages received in 2", got, n.Load())
		}
	})
}

func TestStreamConcurrentBidi(t *testing.T) {
	const streams, messages = 50, 100
	c, _ := dial(t, func(n int, s grpc.ServerStream) (bool, error) {
		if n%3 == 0 {
			return false, nil
		}
		for range n % 7 {
			if err := s.RecvMsg(new(testingv1.BidiRequest)); err != nil {
				return true, err
			}
		}
		return true, unavailable
	}, mustNew(t, retry.Config{MaxAttempts: 100, Backoff: retry.Backoff{Initial: time.Microsecond, Max: time.Millisecond}}))
	var wg sync.WaitGroup
	var failed atomic.Int64
	for range streams {
		wg.Go(func() {
			s, err := c.Bidi(t.Context())
			if err != nil {
				t.Errorf("opening: %v", err)
				return
			}
			wg.Go(func() {
				for i := range messages {
					if err := s.Send(&testingv1.BidiRequest{Payload: fmt.Append(nil, i)}); err != nil {
						return // Recv says why.
					}
				}
				s.CloseSend()
			})
			for i := 0; ; i++ {
				r, err := s.Recv()
				if err == io.EOF && i == messages {
					return
				}
				if err != nil {
					if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonBudget {
						t.Errorf("message %d: %v", i, err)
					}
					failed.Add(1)
					return
				}
				if string(r.GetPayload()) != fmt.Sprint(i) {
					t.Errorf("message %d is %q", i, r.GetPayload())
				}
			}
		})
	}
	wg.Wait()
	if failed.Load() == streams {
		t.Error("all streams failed: the test tests nothing")
	}
}

func TestStreamOpenFailureIsRepeated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		opens := 0
		open := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			if opens++; opens < 3 {
				return nil, unavailable
			}
			return nil, errors.New("not today")
		}
		_, err := calltest.Stack(t, mustNew(t, quick)).StreamClientInterceptor()(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, method, open)
		if opens != 3 || err == nil || err.Error() != "not today (after 3 attempts)" {
			t.Errorf("%d attempts, %v; want 3 and the last one's error", opens, err)
		}
	})
}

// The one allocation of a stream whose method may not be repeated is for the hint in its
// error.
func TestStreamNotRepeatedCostsLittle(t *testing.T) {
	one := mustNew(t, retry.Config{MaxAttempts: 1})
	none := mustNew(t, retry.Config{Methods: []string{}})
	base := streamAllocs(t, &local{first: math.MaxInt})
	for more, l := range []*retry.Layer{one, none} {
		if got := streamAllocs(t, l); got > base+float64(more) && !race.Enabled {
			t.Errorf("%v allocations for a stream, want at most %d more than the %v of a layer that only passes it on", got, more, base)
		}
	}
}

func streamAllocs(t *testing.T, layers ...interceptor.Spec) float64 {
	open := calltest.Stack(t, layers...).StreamClientInterceptor()
	streamer := func(context.Context, *grpc.StreamDesc, *grpc.ClientConn, string, ...grpc.CallOption) (grpc.ClientStream, error) {
		return eof{}, nil
	}
	return testing.AllocsPerRun(100, func() {
		s, err := open(context.Background(), &grpc.StreamDesc{ServerStreams: true}, nil, method, streamer)
		if err != nil {
			t.Fatal(err)
		}
		s.RecvMsg(nil)
	})
}

// eof is a stream that has ended.
type eof struct{ grpc.ClientStream }

func (eof) RecvMsg(any) error { return io.EOF }

// The acceptance of the whole: ten servers that fail every call for 10 s.
func TestRetryStormIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const servers, rate, outage, ttl = 10, 400, 10 * time.Second, 10 * time.Second
		start := time.Now()
		var reached, calls int
		perServer := make([]int, servers)
		var mu sync.Mutex
		invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
			time.Sleep(time.Millisecond)
			mu.Lock()
			defer mu.Unlock()
			if time.Since(start) > outage {
				return nil
			}
			perServer[reached%servers]++
			reached++
			return unavailable
		}
		unary := calltest.Stack(t, mustNew(t, retry.Config{})).UnaryClientInterceptor()
		var wg sync.WaitGroup
		var late, lateFailed int
		for time.Since(start) < outage+ttl+5*time.Second {
			if time.Since(start) <= outage {
				calls++
			}
			started := time.Since(start)
			wg.Go(func() {
				err := unary(t.Context(), method, nil, nil, nil, invoke)
				if started > outage {
					mu.Lock()
					defer mu.Unlock()
					late++
					if err != nil {
						lateFailed++
					}
				}
			})
			time.Sleep(time.Second / rate)
		}
		wg.Wait()
		most := 1.2*float64(calls) + 100
		t.Logf("%d calls, %d attempts reached the servers in the outage, at most %.0f allowed; per server %v", calls, reached, most, perServer)
		if float64(reached) > most {
			t.Errorf("%d attempts reached the servers for %d calls, want at most %.0f", reached, calls, most)
		}
		if float64(reached) < 1.15*float64(calls) {
			t.Errorf("%d attempts reached the servers for %d calls: the budget was not used", reached, calls)
		}
		if late == 0 || lateFailed != 0 {
			t.Errorf("%d of %d calls failed after the recovery, want none", lateFailed, late)
		}
	})
}

// After an outage the budget has to be there for the failures of every day.
func TestBudgetRecoversWithinTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const outage, ttl, every = 10 * time.Second, 10 * time.Second, 10 // One attempt in ten fails.
		start := time.Now()
		n := 0
		invoke := func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error {
			n++
			if time.Since(start) <= outage || n%every == 0 {
				return unavailable
			}
			return nil
		}
		l := mustNew(t, retry.Config{Backoff: retry.Backoff{Initial: time.Microsecond}})
		unary := calltest.Stack(t, l).UnaryClientInterceptor()
		failed := map[bool]int{}
		for time.Since(start) < outage+2*ttl {
			if err := unary(t.Context(), method, nil, nil, nil, invoke); err != nil && time.Since(start) > outage {
				failed[time.Since(start) > outage+ttl]++
			}
			time.Sleep(2 * time.Millisecond)
		}
		if failed[true] != 0 {
			t.Errorf("%d calls failed later than one ttl after the outage, want none", failed[true])
		}
		t.Logf("%d calls failed within one ttl after the outage", failed[false])
	})
}

// A stream that fails, and is not repeated because nothing says that its method is
// idempotent, says so as a unary call does.
func TestStreamNotIdempotentSaysSo(t *testing.T) {
	for _, kind := range []interceptor.Kind{interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream} {
		for _, code := range []codes.Code{codes.Unavailable, codes.NotFound} {
			synctest.Test(t, func(t *testing.T) {
				srv := testserver.New(t, testserver.InMemory())
				if err := srv.Fail(code, 1); err != nil {
					t.Fatal(err)
				}
				c := testingv1.NewTestServiceClient(testserver.Dial(t, srv, calltest.Stack(t, mustNew(t, retry.Config{Methods: []string{}})).DialOptions()...))
				_, err := calltest.Exchange(t.Context(), c, kind)
				r, refused := interceptor.AsRefusal(err)
				if status.Code(err) != code || refused != (code == codes.Unavailable) || refused && r.Reason != interceptor.ReasonNotIdempotent {
					t.Errorf("%v: %v, want the server's %v, and a hint if it would be repeated", kind, err, code)
				}
			})
		}
	}
}
