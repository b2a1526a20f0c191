// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package mapping_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestMapping(t *testing.T) {
	t.Run("errors_of_calls_and_streams", func(t *testing.T) {
		mapped := errors.New("mapped")
		l := mapping.Error(func(context.Context, string, error) error { return mapped })
		c := &conn{
			invoke: func(any, any) error { return status.Error(codes.NotFound, "") },
			stream: &stream{errs: []error{nil, status.Error(codes.NotFound, "")}},
		}
		log := &releases{}
		s := calltest.Stack(t, l, logged{name: "inside", log: log}).Wrap(c)
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
		want := []string{"inside failed NotFound", "inside failed NotFound"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want the server's error inside: %q", got, want)
		}
	})

	t.Run("messages_of_their_type", func(t *testing.T) {
		var sent []any
		c := &conn{
			invoke: func(req, reply any) error {
				sent = append(sent, req)
				reply.(*wrapperspb.StringValue).Value = "world"
				return nil
			},
			stream: &stream{errs: []error{nil, io.EOF}, sent: &sent},
		}
		request := mapping.Request(func(_ context.Context, _ string, m *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
			return wrapperspb.String(m.Value + "!"), nil
		})
		response := mapping.Response(func(_ context.Context, _ string, m *wrapperspb.StringValue) error {
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

	t.Run("nil_function_is_an_error", func(t *testing.T) {
		for field, spec := range map[string]interceptor.Spec{
			"Request":  mapping.Request[any](nil),
			"Response": mapping.Response[any](nil),
			"Error":    mapping.Error(nil),
		} {
			_, err := spec.NewLayer()
			calltest.WantConfigError(t, err, "mapping", field, nil)
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
				mapping.Request(func(context.Context, string, *wrapperspb.StringValue) (*wrapperspb.StringValue, error) {
					return nil, boom
				}),
				func(st grpc.ClientStream) error { return st.SendMsg(m) },
			},
			{
				mapping.Response(func(context.Context, string, *wrapperspb.StringValue) error { return boom }),
				func(st grpc.ClientStream) error { return st.RecvMsg(m) },
			},
		} {
			stream := &stream{errs: []error{nil}}
			log := &releases{}
			s := calltest.Stack(t, logged{name: "outer", log: log}, tc.layer, logged{name: "inner", log: log})
			st, err := s.Wrap(&conn{stream: stream}).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			if err := tc.do(st); err != boom {
				t.Errorf("%v: got %v, want the function's error", tc.layer, err)
			}
			if got, want := log.take(), []string{"inner ignored Unknown", "outer failed Unknown"}; !slices.Equal(got, want) {
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

// conn answers unary calls with invoke, and opens stream.
type conn struct {
	invoke func(req, reply any) error
	stream *stream
}

func (c *conn) Invoke(_ context.Context, _ string, req, reply any, _ ...grpc.CallOption) error {
	return c.invoke(req, reply)
}

func (c *conn) NewStream(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	c.stream.ctx = ctx
	return c.stream, nil
}

// stream answers RecvMsg with errs, one after the other, and keeps what is sent.
type stream struct {
	grpc.ClientStream
	ctx  context.Context
	errs []error
	sent *[]any
}

func (s *stream) RecvMsg(any) error {
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

func (s *stream) SendMsg(m any) error {
	if s.sent != nil {
		*s.sent = append(*s.sent, m)
	}
	return nil
}

// logged is a layer that logs the end of each call.
type logged struct {
	interceptor.GateOnly
	name string
	log  *releases
}

type releases struct{ list []string }

func (r *releases) take() (list []string) {
	list, r.list = r.list, nil
	return list
}

func (l logged) NewLayer() (interceptor.Layer, error) { return l, nil }

func (logged) Traits() interceptor.Traits { return 0 }

func (l logged) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l logged) Release(_ int64, e interceptor.End) {
	l.log.list = append(l.log.list, fmt.Sprintf("%s %s %s", l.name, e.Outcome, status.Code(e.Err)))
}
