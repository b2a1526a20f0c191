// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestStream(t *testing.T) {
	t.Run("retried_until_its_first_message", func(t *testing.T) {
		unavailable := status.Error(codes.Unavailable, "")
		log := &eventLog{}
		opened := 0
		scripts := [][]error{{unavailable}, {unavailable}, {nil, unavailable}}
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			opened++
			return &scriptStream{ctx: ctx, errs: scripts[opened-1]}, nil
		}}
		s := calltest.Stack(t, &logToy{name: "call", log: log}, &retryToy{n: 5}, &logToy{name: "attempt", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		if err := st.RecvMsg(nil); err != nil {
			t.Fatalf("the first message: %v, want the third attempt's", err)
		}
		if err := st.RecvMsg(nil); !errors.Is(err, unavailable) {
			t.Errorf("after the first message: %v, want the server's error", err)
		}
		if opened != 3 {
			t.Errorf("%d streams were opened, want 3", opened)
		}
		want := []string{"attempt 0 failed Unavailable", "attempt 1 failed Unavailable", "attempt 2 failed Unavailable", "call 0 failed Unavailable"}
		if got := log.take(); !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})

	t.Run("header_of_a_single_response_says_nothing", func(t *testing.T) {
		for _, ask := range []bool{false, true} {
			m := &meter{}
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &scriptStream{ctx: ctx, errs: []error{status.Error(codes.Unavailable, "")}}, nil
			}}
			st, err := calltest.Stack(t, m).Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ClientStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			if ask {
				if md, err := st.Header(); err != nil || len(md) == 0 {
					t.Fatalf("header %v, error %v, want one", md, err)
				}
			}
			st.RecvMsg(nil)
			if got := m.log.take(); len(got) != 1 || !strings.HasPrefix(got[0], "failed Unavailable") || strings.Contains(got[0], "response") {
				t.Errorf("with the header asked for: %v: told %q, want one failure", ask, got)
			}
		}
	})

	t.Run("inner_context_that_ends_releases_what_is_inside", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log, own := &eventLog{}, &ownContext{}
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &scriptStream{ctx: ctx}, nil
			}}
			s := calltest.Stack(t, &logToy{name: "outer", log: log}, own, &logToy{name: "inner", log: log})
			ctx, cancel := context.WithCancel(context.Background())
			if _, err := s.Wrap(c).NewStream(ctx, descOf(interceptor.BidiStream), calltest.Method); err != nil {
				t.Fatal(err)
			}
			own.cancel()
			synctest.Wait()
			if got, want := log.take(), []string{"inner 0 ignored Canceled"}; !slices.Equal(got, want) {
				t.Errorf("released %q, want %q", got, want)
			}
			cancel()
			synctest.Wait()
			if got, want := log.take(), []string{"outer 0 ignored Canceled"}; !slices.Equal(got, want) {
				t.Errorf("released %q, want %q", got, want)
			}
		})
	})

	t.Run("abandoned_is_released_when_its_context_ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			log := &eventLog{}
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &scriptStream{ctx: ctx}, nil
			}}
			s := calltest.Stack(t, &logToy{name: "outer", log: log}, &passToy{}, &logToy{name: "middle", log: log}, &passToy{}, &logToy{name: "inner", log: log})
			ctx, cancel := context.WithCancel(context.Background())
			if _, err := s.Wrap(c).NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, calltest.Method); err != nil {
				t.Fatal(err)
			}
			cancel()
			if err := s.Drain(context.Background()); err != nil {
				t.Fatal(err)
			}
			want := []string{"inner 0 ignored Canceled", "middle 0 ignored Canceled", "outer 0 ignored Canceled"}
			got := log.take()
			slices.Sort(got) // Whose watch fires first decides where it begins.
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("released %q, want %q", got, want)
			}
		})
	})

	t.Run("OnFinish_of_an_attempt_is_not_its_end", func(t *testing.T) {
		log := &eventLog{}
		var finish func(error)
		c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			for _, o := range opts {
				if o, ok := o.(grpc.OnFinishCallOption); ok {
					finish = o.OnFinish
				}
			}
			finish(status.Error(codes.Unavailable, "an attempt of a retry behind the stack"))
			return &scriptStream{ctx: ctx, errs: []error{io.EOF}}, nil
		}}
		s := calltest.Stack(t, &logToy{name: "a", log: log})
		st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
		if err != nil {
			t.Fatal(err)
		}
		finish(status.Error(codes.Unavailable, "another"))
		if got := log.take(); len(got) != 0 {
			t.Errorf("released %q while the stream is open", got)
		}
		if err := st.RecvMsg(nil); err != io.EOF {
			t.Fatal(err)
		}
		finish(nil)
		if got, want := log.take(), []string{"a 0 ok OK"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	t.Run("failure_to_open_reported_twice_is_released_once", func(t *testing.T) {
		log := &eventLog{}
		fails := status.Error(codes.Canceled, "")
		c := &conn{stream: func(_ context.Context, _ *grpc.StreamDesc, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			for _, o := range opts {
				if o, ok := o.(grpc.OnFinishCallOption); ok {
					o.OnFinish(fails)
					o.OnFinish(fails)
				}
			}
			return nil, fails
		}}
		s := calltest.Stack(t, &logToy{name: "a", log: log}, &passToy{}, &logToy{name: "b", log: log})
		if _, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method); err != fails {
			t.Errorf("got %v, want the streamer's error", err)
		}
		if got, want := log.take(), []string{"b 0 failed Canceled", "a 0 failed Canceled"}; !slices.Equal(got, want) {
			t.Errorf("released %q, want %q", got, want)
		}
	})

	// Whoever hears of it first, the layers inside are told what the layer says and not
	// that somebody has cancelled: a breaker has to count it.
	t.Run("cut_short_by_a_layer_ends_for_its_reason", func(t *testing.T) {
		log := new(eventLog)
		s := calltest.Stack(t, &cutToy{}, &logToy{name: "inside", log: log})
		cs, err := s.Wrap(&conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
			return &endsWith{ctx: ctx}, nil
		}}).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, "/s/m")
		if err != nil {
			t.Fatal(err)
		}
		if err := cs.RecvMsg(nil); status.Code(err) != codes.Canceled {
			t.Errorf("RecvMsg: %v, want what the stream says", err)
		}
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		if got, want := log.take(), []string{"inside 0 failed DeadlineExceeded"}; !slices.Equal(got, want) {
			t.Errorf("released as %q, want %q", got, want)
		}
	})
}

// cutToy cuts each stream short as soon as it is open, as a timeout does, but leaves
// it to gRPC to tell the others.
type cutToy struct{ interceptor.CallOnly }

func (l *cutToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (*cutToy) Traits() interceptor.Traits { return 0 }

func (*cutToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		ctx, cancel := context.WithCancelCause(ctx)
		err := next(ctx, c)
		cancel(&interceptor.Refusal{Layer: "cut", Reason: interceptor.ReasonDeadline, Sent: true})
		return err
	}
}

type endsWith struct {
	grpc.ClientStream
	ctx context.Context
}

func (s *endsWith) RecvMsg(any) error {
	<-s.ctx.Done()
	return status.FromContextError(s.ctx.Err()).Err()
}

// ownContext gives a stream a context of its own.
type ownContext struct {
	interceptor.CallOnly
	cancel context.CancelFunc
}

func (l *ownContext) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *ownContext) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		ctx, l.cancel = context.WithCancel(ctx)
		return next(ctx, c)
	}
}

// lostStream is one of gRPC's that ends with io.EOF first. Asked again it tells err, or hangs
// if the server has said nothing.
type lostStream struct {
	grpc.ClientStream
	opts            []grpc.CallOption
	t               *testing.T
	header, trailer metadata.MD
	err             error // Nil if it hangs.
	tries, repeats  int   // How many streams gRPC makes to open it, and when it is asked.
	asked           int
}

// made makes gRPC's streams, as the credentials see it.
func (s *lostStream) made(n int) {
	for _, o := range s.opts {
		if o, ok := o.(*grpc.PerRPCCredsCallOption); ok {
			for range n {
				o.Creds.GetRequestMetadata(context.Background())
			}
		}
	}
}

func (s *lostStream) Header() (metadata.MD, error) { return s.header, nil }
func (s *lostStream) Trailer() metadata.MD         { return s.trailer }

func (s *lostStream) RecvMsg(any) error {
	if s.asked++; s.asked == 1 {
		s.made(s.repeats)
		for _, o := range s.opts {
			if o, ok := o.(grpc.OnFinishCallOption); ok {
				o.OnFinish(nil)
			}
		}
		return io.EOF
	}
	if s.err == nil {
		s.t.Error("RecvMsg was called of a stream that has no status")
	}
	return s.err
}

// gRPC says io.EOF of a stream that it could not repeat.
func TestStreamThatGRPCCouldNotRepeat(t *testing.T) {
	md := metadata.Pairs("content-type", "application/grpc")
	gone := status.Error(codes.NotFound, "gone")
	for name, tc := range map[string]struct {
		stream lostStream
		cancel bool
		want   codes.Code
	}{
		"connection_broke":                {lostStream{}, false, codes.Unavailable},
		"connection_broke_at_repetition":  {lostStream{tries: 1, repeats: 1}, false, codes.Unavailable},
		"connection_broke_after_headers":  {lostStream{tries: 1, repeats: 1, header: md}, false, codes.Unavailable},
		"context_ended":                   {lostStream{}, true, codes.Canceled},
		"status":                          {lostStream{tries: 1, repeats: 1, trailer: md, err: gone}, false, codes.NotFound},
		"success":                         {lostStream{trailer: md, err: io.EOF}, false, codes.OK},
		"success_after_headers":           {lostStream{header: md, err: io.EOF}, false, codes.OK},
		"success_of_the_first":            {lostStream{tries: 1, header: md, err: io.EOF}, false, codes.OK},
		"success_of_the_first_to_open":    {lostStream{tries: 3, header: md, err: io.EOF}, false, codes.OK},
		"success_of_one_that_is_repeated": {lostStream{tries: 1, repeats: 1, trailer: md, err: io.EOF}, false, codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			stream := tc.stream
			stream.t = t
			streamer := func(_ context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				stream.opts = opts
				stream.made(stream.tries)
				return &stream, nil
			}
			s, err := calltest.Stack(t, &passToy{}).StreamClientInterceptor()(ctx, descOf(interceptor.ServerStream), readyConn(t), calltest.Method, streamer)
			if err != nil {
				t.Fatal(err)
			}
			if tc.cancel {
				cancel()
			}
			if err := s.RecvMsg(nil); err != io.EOF && status.Code(err) != tc.want || (err == io.EOF) != (tc.want == codes.OK) {
				t.Errorf("RecvMsg: %v, want %v", err, tc.want)
			}
		})
	}
}
