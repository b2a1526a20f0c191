// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestMap(t *testing.T) {
	t.Run("errors_of_calls_and_streams", func(t *testing.T) {
		mapped := errors.New("mapped")
		l := interceptor.MapError(func(context.Context, string, error) error { return mapped })
		c := answers(status.Error(codes.NotFound, ""))
		c.stream = func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &scriptStream{ctx: ctx, errs: []error{nil, status.Error(codes.NotFound, "")}}, nil
		}
		log := &eventLog{}
		s := calltest.Stack(t, l, &logToy{name: "inside", log: log}).Wrap(c)
		if err := s.Invoke(context.Background(), calltest.Method, nil, nil); err != mapped {
			t.Errorf("unary: %v, want the mapped error", err)
		}
		st, err := s.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(nil); err != nil {
			t.Errorf("a message: %v", err)
		}
		if err := st.RecvMsg(nil); err != mapped {
			t.Errorf("stream: %v, want the mapped error", err)
		}
		want := []string{"inside 0 failed NotFound", "inside 0 failed NotFound"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want the server's error inside: %q", got, want)
		}
	})

	t.Run("messages_of_their_type", func(t *testing.T) {
		var sent []any
		c := &conn{
			invoke: func(_ context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
				sent = append(sent, req)
				reply.(*wrapperspb.StringValue).Value = "world"
				return nil
			},
			stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &sendStream{scriptStream: scriptStream{ctx: ctx, errs: []error{nil, io.EOF}}, sent: &sent}, nil
			},
		}
		request := interceptor.MapRequest(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
			return wrapperspb.String(m.Value + "!"), nil
		})
		response := interceptor.MapResponse(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
			m.Value += "?"
			return nil
		})
		s := calltest.Stack(t, request, response).Wrap(c)
		reply := new(wrapperspb.StringValue)
		if err := s.Invoke(context.Background(), calltest.Method, wrapperspb.String("hello"), reply); err != nil || reply.Value != "world?" {
			t.Errorf("got %v, %q; want %q", err, reply.Value, "world?")
		}
		st, err := s.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		other := wrapperspb.Int32(1)
		if err := errors.Join(st.SendMsg(wrapperspb.String("a")), st.SendMsg(other)); err != nil {
			t.Fatal(err)
		}
		reply.Value = "x"
		if err := st.RecvMsg(reply); err != nil || reply.Value != "x?" {
			t.Errorf("received %v, %q; want %q", err, reply.Value, "x?")
		}
		if err := st.RecvMsg(reply); err != io.EOF {
			t.Errorf("the end: %v, want EOF", err)
		}
		if len(sent) != 3 || sent[0].(*wrapperspb.StringValue).Value != "hello!" || sent[1].(*wrapperspb.StringValue).Value != "a!" || sent[2] != any(other) {
			t.Errorf("sent %v, want hello!, a! and the other message as it was", sent)
		}
	})

	t.Run("failure_cancels_the_stream", func(t *testing.T) {
		boom := errors.New("boom")
		m := wrapperspb.String("x")
		for _, tc := range []struct {
			layer interceptor.Spec
			do    func(st grpc.ClientStream) error
		}{
			{
				interceptor.MapRequest(func(context.Context, string, *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
					return nil, boom
				}),
				func(st grpc.ClientStream) error { return st.SendMsg(m) },
			},
			{
				interceptor.MapResponse(func(context.Context, string, *wrapperspb.StringValue) error { return boom }),
				func(st grpc.ClientStream) error { return st.RecvMsg(m) },
			},
		} {
			var stream *scriptStream
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				stream = &scriptStream{ctx: ctx, errs: []error{nil}}
				return stream, nil
			}}
			log := &eventLog{}
			s := calltest.Stack(t, &logToy{name: "outer", log: log}, tc.layer, &logToy{name: "inner", log: log})
			st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			if err := tc.do(st); err != boom {
				t.Errorf("%v: got %v, want the function's error", tc.layer, err)
			}
			if got, want := log.take(), []string{"inner 0 ignored Unknown", "outer 0 failed Unknown"}; !slices.Equal(got, want) {
				t.Errorf("%v: released %q, want %q", tc.layer, got, want)
			}
			if stream.ctx.Err() == nil {
				t.Errorf("%v: nothing is held for the stream any more, but it goes on", tc.layer)
			}
			stream.errs = []error{status.FromContextError(context.Canceled).Err()}
			if err := st.RecvMsg(m); err != boom {
				t.Errorf("%v: RecvMsg afterwards returned %v, want the function's error", tc.layer, err)
			}
		}
	})
}

type sendStream struct {
	scriptStream
	sent *[]any
}

func (s *sendStream) SendMsg(m any) error {
	*s.sent = append(*s.sent, m)
	return nil
}
