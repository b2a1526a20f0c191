// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"bytes"
	"io"
	"net"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// refusesFirst is a server that refuses the first stream before it looks at it, and answers
// the others with NOT_FOUND.
func refusesFirst(l net.Listener, streams *atomic.Int32) error {
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	return serveHTTP2(conn, func(f *http2.Framer, id uint32) error {
		if streams.Add(1) == 1 {
			return f.WriteRSTStream(id, http2.ErrCodeRefusedStream)
		}
		return writeHeaders(f, id, true, "grpc-status", "5")
	})
}

// serveHTTP2 reads from a client's connection until that breaks, and calls opened with the
// number of each stream.
func serveHTTP2(conn net.Conn, opened func(f *http2.Framer, id uint32) error) error {
	if _, err := io.ReadFull(conn, make([]byte, len(http2.ClientPreface))); err != nil {
		return err
	}
	f := http2.NewFramer(conn, conn)
	if err := f.WriteSettings(); err != nil {
		return err
	}
	for {
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *http2.HeadersFrame:
			err = opened(f, frame.StreamID)
		}
		if err != nil {
			return err
		}
	}
}

// writeHeaders writes the headers of an answer, and others by name and value.
func writeHeaders(f *http2.Framer, id uint32, end bool, more ...string) error {
	var block bytes.Buffer
	e := hpack.NewEncoder(&block)
	fields := append([]string{":status", "200", "content-type", "application/grpc"}, more...)
	for i := 0; i < len(fields); i += 2 {
		if err := e.WriteField(hpack.HeaderField{Name: fields[i], Value: fields[i+1]}); err != nil {
			return err
		}
	}
	return f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndStream: end, EndHeaders: true})
}

// A stack turns gRPC's retryPolicy off, but not that gRPC repeats what no server has seen.
func TestTransparentRetryOfGRPC(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var streams atomic.Int32
	ended := make(chan error, 1)
	go func() { ended <- refusesFirst(l, &streams) }()
	stack := calltest.Stack(t, retry.Config{AllMethods: true, Codes: []codes.Code{codes.Aborted}}) // Not what is refused.
	conn, err := grpc.NewClient("passthrough:///"+l.Addr().String(), append(stack.DialOptions(), grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	_, err = testingv1.NewTestServiceClient(conn).Unary(testContext(t), &testingv1.UnaryRequest{})
	if status.Code(err) != codes.NotFound || streams.Load() != 2 {
		t.Errorf("%v after %d streams, want NOT_FOUND of the second", err, streams.Load())
	}
	conn.Close()
	l.Close()
	<-ended
}
