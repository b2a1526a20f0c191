// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

var errCodec = errors.New("not in this codec")

// compressor compresses nothing, and fails as it is told to.
type compressor struct {
	name                 string
	compress, decompress error
}

func (c compressor) Name() string { return c.name }

func (c compressor) Compress(w io.Writer) (io.WriteCloser, error) {
	return struct {
		io.Writer
		io.Closer
	}{w, io.NopCloser(nil)}, c.compress
}

func (c compressor) Decompress(r io.Reader) (io.Reader, error) { return r, c.decompress }

// unknown is a compressor that only a server has.
type unknown struct{}

func (unknown) Type() string { return "belfry-unknown" }

func (unknown) Do(w io.Writer, p []byte) error {
	_, err := w.Write(p)
	return err
}

func init() {
	encoding.RegisterCompressor(compressor{name: "belfry-uncompressible", compress: errCodec})
	encoding.RegisterCompressor(compressor{name: "belfry-incompressible", decompress: errCodec})
}

// A codec replaces the parts of gRPC's that are set.
type codec struct {
	marshal   func() mem.BufferSlice
	unmarshal error
}

func (codec) Name() string { return "proto" }

func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if c.marshal != nil {
		return c.marshal(), nil
	}
	return encoding.GetCodecV2("proto").Marshal(v)
}

func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if c.unmarshal != nil {
		return c.unmarshal
	}
	return encoding.GetCodecV2("proto").Unmarshal(data, v)
}

// The texts are grpc's and in no API. This test fails when a version of grpc words
// one of them in another way.
func TestTextsOfGRPC(t *testing.T) {
	// sendWith makes the server compress its answers.
	sendWith := func(name string) []grpc.ServerOption {
		return []grpc.ServerOption{grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if err := grpc.SetSendCompressor(ctx, name); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		})}
	}
	huge := func() mem.BufferSlice { // 4 GiB and a little, of one megabyte
		b := make(mem.SliceBuffer, 1<<20)
		var s mem.BufferSlice
		for range 1<<12 + 1 {
			s = append(s, b)
		}
		return s
	}
	//lint:ignore SA1019 its errors have texts of their own
	oldGzip := []grpc.DialOption{grpc.WithDecompressor(grpc.NewGZIPDecompressor())}
	//lint:ignore SA1019 the only way to send what the client cannot know
	oldUnknown := []grpc.ServerOption{grpc.RPCCompressor(unknown{})}

	var unseen []string
	for _, texts := range []map[codes.Code][]string{sendErrors, receiveErrors} {
		for code, all := range texts {
			for _, text := range all {
				unseen = append(unseen, fmt.Sprintf("%v: %s", code, text))
			}
		}
	}
	for name, tc := range map[string]struct {
		server []grpc.ServerOption
		dial   []grpc.DialOption
		call   []grpc.CallOption
		req    any
		send   bool // the error is one of sending
		only64 bool
	}{
		"send_beyond_the_limit":              {call: []grpc.CallOption{grpc.MaxCallSendMsgSize(1)}, send: true},
		"send_beyond_4_GiB":                  {call: []grpc.CallOption{grpc.ForceCodecV2(codec{marshal: huge})}, send: true, only64: true},
		"marshal":                            {req: "no message", send: true},
		"compress":                           {call: []grpc.CallOption{grpc.UseCompressor("belfry-uncompressible")}, send: true},
		"receive_beyond_the_limit":           {call: []grpc.CallOption{grpc.MaxCallRecvMsgSize(1)}},
		"receive_beyond_the_limit_in_gzip":   {server: sendWith(gzip.Name), call: []grpc.CallOption{grpc.MaxCallRecvMsgSize(1000)}},
		"receive_beyond_the_limit_by_option": {server: sendWith(gzip.Name), dial: oldGzip, call: []grpc.CallOption{grpc.MaxCallRecvMsgSize(1000)}},
		"unmarshal":                          {call: []grpc.CallOption{grpc.ForceCodecV2(codec{unmarshal: errCodec})}},
		"decompress":                         {server: sendWith("belfry-incompressible")},
		"decompressor_unknown":               {server: oldUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			if tc.only64 && bits.UintSize < 64 {
				t.Skip("a message has at most 2 GiB")
			}
			server := testserver.New(t, testserver.InMemory(), testserver.GRPC(tc.server...))
			conn, err := server.NewClient(append(tc.dial, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			req := tc.req
			if req == nil {
				req = &testingv1.UnaryRequest{Payload: make([]byte, 10_000)}
			}
			err = conn.Invoke(t.Context(), testingv1.TestService_Unary_FullMethodName, req, new(testingv1.UnaryResponse), tc.call...)
			if err == nil {
				t.Fatal("the call succeeded")
			}
			if send, receive := IsSendError(err), IsReceiveError(err); send != tc.send || receive == tc.send {
				t.Errorf("of sending: %t, of receiving: %t, want %t and %t: %v", send, receive, tc.send, !tc.send, err)
			}
			st := status.Convert(err)
			unseen = slices.DeleteFunc(unseen, func(text string) bool {
				return strings.HasPrefix(fmt.Sprintf("%v: %s", st.Code(), st.Message()), text)
			})
		})
	}
	if len(unseen) > 0 && bits.UintSize == 64 {
		t.Errorf("texts that no call ended with: %q", unseen)
	}
}
