// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/stats"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
)

// breakable is a connection that cannot be written to any more from some time on, while
// reading from it still waits.
type breakable struct {
	net.Conn
	held   atomic.Pointer[chan struct{}] // Write waits until it is closed.
	broken atomic.Bool
}

func (c *breakable) Write(b []byte) (int, error) {
	if held := c.held.Load(); held != nil {
		<-*held
	}
	if c.broken.Load() {
		return 0, errors.New("the connection is broken")
	}
	return c.Conn.Write(b)
}

// refuser refuses the first stream of a connection, which breaks before the second one is
// sent a message. As a stats handler it makes gRPC wait that long.
type refuser struct {
	*breakable
	headers bool // The second stream is answered with headers first.
	opened  int
}

func (r *refuser) serve(conn net.Conn) error {
	var refusing sync.WaitGroup
	defer refusing.Wait()
	return serveHTTP2(conn, func(_ *http2.Framer, id uint32) error {
		refusing.Go(func() {
			f := http2.NewFramer(conn, nil)
			refuse := func() { f.WriteRSTStream(id, http2.ErrCodeRefusedStream) }
			breaks := func() { // gRPC cannot write the answer to the ping.
				r.broken.Store(true)
				f.WritePing(false, [8]byte{})
				time.Sleep(time.Second)
			}
			time.Sleep(time.Second)
			switch {
			case r.headers && id == 1:
				refuse()
			case r.headers:
				writeHeaders(f, id, false)
				breaks()
				breaks() // It notices when it writes again.
			default:
				breaks() // It notices when it writes the headers of the second stream.
				refuse()
			}
		})
		return nil
	})
}

func (r *refuser) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (r *refuser) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (r *refuser) HandleConn(context.Context, stats.ConnStats)                       {}

func (r *refuser) HandleRPC(_ context.Context, s stats.RPCStats) {
	if _, ok := s.(*stats.OutHeader); ok {
		if r.opened++; r.opened == 2 {
			time.Sleep(5 * time.Second)
		}
	}
}

// gRPC repeats a stream that was refused, and the connection breaks while it does. It says
// io.EOF of that, as if the server had ended the stream well, or nothing at all.
func TestConnectionThatBreaksWhileGRPCRepeatsAStream(t *testing.T) {
	const refused = 5 * time.Second
	msg := wrapperspb.Bytes([]byte("x"))
	stream := func(t *testing.T, conn *grpc.ClientConn) grpc.ClientStream {
		s, err := conn.NewStream(t.Context(), &stressKinds[2], calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(msg); err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, call := range map[string]func(t *testing.T, conn *grpc.ClientConn) error{
		"RecvMsg": func(t *testing.T, conn *grpc.ClientConn) error {
			return stream(t, conn).RecvMsg(new(emptypb.Empty))
		},
		"SendMsg": func(t *testing.T, conn *grpc.ClientConn) error {
			s := stream(t, conn)
			time.Sleep(refused)
			if err := s.SendMsg(msg); err != io.EOF {
				t.Errorf("SendMsg: %v, want io.EOF", err)
			}
			return s.RecvMsg(new(emptypb.Empty))
		},
		"Header": func(t *testing.T, conn *grpc.ClientConn) error {
			s := stream(t, conn)
			if md, err := s.Header(); md != nil || err != nil {
				t.Errorf("Header: %v, %v, want none", md, err)
			}
			return s.RecvMsg(new(emptypb.Empty))
		},
		"unary": func(t *testing.T, conn *grpc.ClientConn) error {
			return conn.Invoke(t.Context(), calltest.Method, msg, new(emptypb.Empty))
		},
	} {
		test := func(t *testing.T, headers bool) {
			synctest.Test(t, func(t *testing.T) {
				client, server := net.Pipe()
				r := &refuser{breakable: &breakable{Conn: client}, headers: headers}
				served := make(chan error, 1)
				go func() { served <- r.serve(server) }()
				stack := calltest.Stack(t, retry.Config{AllMethods: true, Codes: []codes.Code{codes.Aborted}}) // Not what is refused.
				conn, err := grpc.NewClient("passthrough:///pipe", append(stack.DialOptions(), grpc.WithStatsHandler(r), grpc.WithTransportCredentials(insecure.NewCredentials()),
					grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) { return r.breakable, nil }))...)
				if err != nil {
					t.Fatal(err)
				}
				ended := make(chan error, 1)
				go func() { ended <- call(t, conn) }()
				select {
				case err := <-ended:
					if status.Code(err) != codes.Unavailable {
						t.Errorf("the call ended with %v, want UNAVAILABLE", err)
					}
				case <-time.After(time.Hour):
					t.Error("the call does not end")
				}
				conn.Close()
				client.Close()
				server.Close()
				<-served
			})
		}
		t.Run(name, func(t *testing.T) { test(t, false) })
		t.Run(name+"_after_headers", func(t *testing.T) { test(t, true) })
	}
}

// orphaned is a channel whose first connection breaks, for writing first, before the
// headers of a stream are written.
type orphaned struct {
	*grpc.ClientConn
	first *breakable
	hold  chan struct{}
}

// newOrphaned returns a channel to an upload server. The streams that are opened on it wait
// in its connection until breaks.
func newOrphaned(t *testing.T, specs ...interceptor.Spec) *orphaned {
	l := bufconn.Listen(1 << 20)
	server := grpc.NewServer()
	server.RegisterService(&grpc.ServiceDesc{ServiceName: stressService, HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{StreamName: "Upload", ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
		for n := 0; ; n++ {
			err := s.RecvMsg(new(wrapperspb.BytesValue))
			if err == io.EOF {
				return s.SendMsg(wrapperspb.Bytes([]byte(strconv.Itoa(n))))
			}
			if err != nil {
				return err
			}
		}
	}}}}, nil)
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	o := &orphaned{hold: make(chan struct{})}
	dial := func(ctx context.Context, _ string) (net.Conn, error) {
		c, err := l.DialContext(ctx)
		if err == nil && o.first == nil {
			o.first = &breakable{Conn: c}
			return o.first, nil
		}
		return c, err
	}
	var err error
	o.ClientConn, err = grpc.NewClient("passthrough:///memory", append(calltest.Stack(t, specs...).DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(dial))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		o.Close()
		server.Stop()
		<-served
	})
	o.Connect()
	synctest.Wait()
	o.first.held.Store(&o.hold)
	// gRPC fails to write the headers of the first, and notices at those of the second. The
	// others are orphaned.
	for range 2 {
		o.upload(t)
		synctest.Wait()
	}
	return o
}

func (o *orphaned) upload(t *testing.T) grpc.ClientStream {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	s, err := o.NewStream(ctx, &stressKinds[0], "/"+stressService+"/Upload")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// breaks breaks the connection for writing.
func (o *orphaned) breaks() {
	o.first.broken.Store(true)
	close(o.hold)
}

// gRPC repeats a stream whose headers it has not written, once RecvMsg is called, and says
// io.EOF of a message before. The message is not lost: the stream ends, or is repeated.
func TestStreamWhoseHeadersWereNotWritten(t *testing.T) {
	msg := wrapperspb.Bytes([]byte("x"))
	t.Run("ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o := newOrphaned(t, timeout.Config{Timeout: time.Hour, Lifetime: time.Hour})
			s := o.upload(t)
			o.breaks()
			synctest.Wait()
			if err := s.SendMsg(msg); err != io.EOF {
				t.Errorf("SendMsg: %v, want io.EOF", err)
			}
			o.first.Close()
			if err := s.RecvMsg(new(wrapperspb.BytesValue)); status.Code(err) != codes.Unavailable {
				t.Errorf("RecvMsg: %v, want UNAVAILABLE", err)
			}
		})
	})
	t.Run("is_repeated_by_retry", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o := newOrphaned(t, retry.Config{AllMethods: true})
			s := o.upload(t)
			o.breaks()
			synctest.Wait()
			o.first.Close()
			synctest.Wait()
			checkUpload(t, s, msg)
			got := new(wrapperspb.BytesValue)
			if err := s.RecvMsg(got); err != nil || string(got.Value) != "3" {
				t.Errorf("RecvMsg: %v, %q, want that the server has received 3 messages", err, got.Value)
			}
		})
	})
	// Which of the goroutines of a stream gRPC wakes first is by chance, and all are well.
	t.Run("while_it_is_received_from", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			o := newOrphaned(t, timeout.Config{Timeout: time.Hour, Lifetime: time.Hour})
			large := wrapperspb.Bytes(make([]byte, 70_000)) // The first fills the window, and the next waits.
			var streams sync.WaitGroup
			for range 20 {
				s := o.upload(t)
				streams.Go(func() { checkUpload(t, s, large) })
				streams.Go(func() {
					got := new(wrapperspb.BytesValue)
					if err := s.RecvMsg(got); err != nil || string(got.Value) != "3" {
						t.Errorf("RecvMsg: %v, %q, want that the server has received 3 messages", err, got.Value)
					}
				})
			}
			synctest.Wait()
			o.breaks()
			o.first.Close()
			streams.Wait()
		})
	})
}

// checkUpload sends three messages.
func checkUpload(t *testing.T, s grpc.ClientStream, m any) {
	for range 3 {
		if err := s.SendMsg(m); err != nil {
			t.Errorf("SendMsg: %v", err)
			return
		}
	}
	if err := s.CloseSend(); err != nil {
		t.Errorf("CloseSend: %v", err)
	}
}

// tokenCreds are credentials of one call.
type tokenCreds struct{}

func (tokenCreds) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"token": "of the call"}, nil
}

func (tokenCreds) RequireTransportSecurity() bool { return false }

// What tells how often gRPC has repeated a stream leaves its credentials and its end alone.
func TestCredentialsAndEmptyEndOfAStream(t *testing.T) {
	tokens := make(chan []string, 1)
	srv := testserver.New(t, testserver.Register(func(r grpc.ServiceRegistrar) {
		r.RegisterService(&grpc.ServiceDesc{ServiceName: stressService, HandlerType: (*any)(nil), Streams: []grpc.StreamDesc{{StreamName: "Download", ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
			md, _ := metadata.FromIncomingContext(s.Context())
			tokens <- md["token"]
			return s.SendHeader(metadata.Pairs("a", "header"))
		}}}}, nil)
	}))
	conn := testserver.Dial(t, srv, calltest.Stack(t, retry.Config{AllMethods: true}).DialOptions()...)
	for _, ask := range []bool{false, true} {
		s, err := conn.NewStream(testContext(t), &stressKinds[1], "/"+stressService+"/Download", grpc.PerRPCCredentials(tokenCreds{}))
		if err != nil {
			t.Fatal(err)
		}
		if got := <-tokens; len(got) != 1 || got[0] != "of the call" {
			t.Errorf("the server got the tokens %q, want that of the call", got)
		}
		if ask {
			if md, err := s.Header(); err != nil || md.Get("a") == nil {
				t.Errorf("Header: %v, %v", md, err)
			}
		}
		for range 2 {
			if err := s.RecvMsg(new(emptypb.Empty)); err != io.EOF {
				t.Errorf("RecvMsg of an empty stream: %v, want io.EOF", err)
			}
		}
	}
}
