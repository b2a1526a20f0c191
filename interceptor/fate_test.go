// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// meter is a gate that notes what it is told of each call. All times are virtual,
// so they are exact; a call that was sent took at least 1ns.
type meter struct {
	interceptor.GateOnly
	log eventLog
}

func (l *meter) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*meter) Traits() interceptor.Traits             { return 0 }

func (l *meter) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Timed()
		a.Hold(l, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (l *meter) Respond(_ int64, e interceptor.End) {
	l.log.add("responded %s %v", e.Outcome, e.Took())
}

func (l *meter) Release(_ int64, e interceptor.End) {
	text := fmt.Sprintf("%s %s", e.Outcome, e.Code())
	if e.Took() != 0 {
		text += " " + e.Took().String()
	}
	if e.Responded {
		text += " after its response"
	}
	l.log.add("%s", text)
}

// hookToy calls a function in the middle of admission.
type hookToy struct {
	interceptor.GateOnly
	hook func(ctx context.Context)
}

func (l *hookToy) NewLayer() (interceptor.Layer, error) { return l, nil }
func (*hookToy) Traits() interceptor.Traits             { return 0 }

func (l *hookToy) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if l.hook != nil {
			l.hook(ctx)
		}
		return inner.Admit(ctx, a, w)
	})
}

// fixture is a call to a real server, and all that a case can change about it.
type fixture struct {
	srv  *testserver.Server
	cc   *grpc.ClientConn
	conn grpc.ClientConnInterface // With the stack in front.

	ctx       context.Context
	cancel    context.CancelFunc
	req       any
	reply     any
	opts      []grpc.CallOption
	behaviour *testingv1.Behaviour
	hook      *hookToy // Between the meter and gRPC.
	idle      bool     // Do not connect first.
}

// fail has the server answer with a status alone.
func (f *fixture) fail(code codes.Code, message string) {
	f.behaviour.Status = &testingv1.Status{Code: int32(code), Message: message}
	f.behaviour.ResponseCount = new(int32)
}

// exchange makes a call as generated code does: one request, and all that comes back.
func exchange(ctx context.Context, conn grpc.ClientConnInterface, kind interceptor.Kind, req, reply any, opts ...grpc.CallOption) error {
	method := methodOf[kind]
	if kind == interceptor.Unary {
		return conn.Invoke(ctx, method, req, reply, opts...)
	}
	s, err := conn.NewStream(ctx, descOf(kind), method, opts...)
	if err != nil {
		return err
	}
	if err := s.SendMsg(req); err != nil && err != io.EOF {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	for {
		if err := s.RecvMsg(reply); err == io.EOF {
			return nil
		} else if err != nil || kind == interceptor.ClientStream {
			return err
		}
	}
}

// methodOf is the test service's method of a kind. The requests of all of them are
// the same on the wire, and so are the responses.
var methodOf = map[interceptor.Kind]string{
	interceptor.Unary:        "/belfry.testing.v1.TestService/Unary",
	interceptor.ClientStream: "/belfry.testing.v1.TestService/ClientStream",
	interceptor.ServerStream: "/belfry.testing.v1.TestService/ServerStream",
	interceptor.BidiStream:   "/belfry.testing.v1.TestService/Bidi",
}

func descOf(kind interceptor.Kind) *grpc.StreamDesc {
	return &grpc.StreamDesc{
		ClientStreams: kind == interceptor.ClientStream || kind == interceptor.BidiStream,
		ServerStreams: kind == interceptor.ServerStream || kind == interceptor.BidiStream,
	}
}

// badCredentials fail before each call.
type badCredentials struct{ err error }

func (c badCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return nil, c.err
}
func (badCredentials) RequireTransportSecurity() bool { return false }

// badCodec cannot read what the server answers.
type badCodec struct{}

func (badCodec) Marshal(v any) ([]byte, error) { return proto.Marshal(v.(proto.Message)) }
func (badCodec) Unmarshal([]byte, any) error   { return errors.New("not today") }
func (badCodec) Name() string                  { return "proto" }

var (
	policies  = []string{"pick_first", "round_robin", p2c.Name}
	allKinds  = []interceptor.Kind{interceptor.Unary, interceptor.ClientStream, interceptor.ServerStream, interceptor.BidiStream}
	placement = []string{"dial_options", "wrap", "interceptors"}
)

// fates are the rows of the table of what counts as what. Unless a case says
// otherwise a call takes a second, and the meter sees the same for all kinds.
var fates = []struct {
	name   string
	dial   []grpc.DialOption
	change func(f *fixture)
	want   string
	// What streams see that have many responses, if it differs.
	stream string
}{
	{
		name:   "success",
		want:   "ok OK 1s",
		stream: "responded ok 1s, ok OK 1s after its response",
	},
	{
		name:   "context_over_on_entry",
		change: func(f *fixture) { f.cancel() },
		want:   "", // It does not even ask.
	},
	{
		name:   "context_over_when_admitted",
		change: func(f *fixture) { f.hook.hook = func(context.Context) { f.cancel() } },
		want:   "not_sent Canceled",
	},
	{
		name: "deadline_passes_in_a_gate",
		change: func(f *fixture) {
			f.ctx, f.cancel = context.WithTimeout(f.ctx, time.Second)
			f.hook.hook = func(ctx context.Context) { <-ctx.Done() }
		},
		want: "not_sent DeadlineExceeded",
	},
	{
		name: "request_too_large",
		dial: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(1))},
		want: "not_sent ResourceExhausted",
	},
	{
		name:   "request_not_marshallable",
		change: func(f *fixture) { f.req = struct{}{} },
		want:   "not_sent Internal",
	},
	{
		name:   "bad_metadata",
		change: func(f *fixture) { f.ctx = metadata.AppendToOutgoingContext(f.ctx, "key", "two\nlines") },
		want:   "not_sent Internal",
	},
	{
		name:   "unknown_codec",
		change: func(f *fixture) { f.opts = append(f.opts, grpc.CallContentSubtype("no-such-codec")) },
		want:   "not_sent Internal",
	},
	{
		name: "credentials_unavailable",
		change: func(f *fixture) {
			f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "no token server")}))
		},
		want: "not_sent Unavailable",
	},
	{
		name: "credentials_unauthenticated",
		change: func(f *fixture) {
			f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unauthenticated, "expired")}))
		},
		want: "not_sent Unauthenticated",
	},
	{
		name: "credentials_fail_without_a_status",
		change: func(f *fixture) {
			f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{errors.New("expired")}))
		},
		want: "not_sent Internal",
	},
	{
		name: "connection_refused",
		change: func(f *fixture) {
			f.idle = true
			f.srv.Stop()
		},
		want: "not_connected Unavailable",
	},
	{
		name: "deadline_passes_without_an_endpoint",
		change: func(f *fixture) {
			f.idle = true
			f.srv.Stop()
			f.ctx, f.cancel = context.WithTimeout(f.ctx, time.Second)
			f.opts = append(f.opts, grpc.WaitForReady(true))
		},
		want: "", // It waits in front of the gate.
	},
	{
		name: "endpoint_lost_after_admission",
		change: func(f *fixture) {
			f.hook.hook = func(context.Context) {
				f.srv.Stop()
				synctest.Wait()
			}
		},
		want: "not_connected Unavailable",
	},
	{
		name: "deadline_passes_after_the_endpoint_is_lost",
		change: func(f *fixture) {
			f.ctx, f.cancel = context.WithTimeout(f.ctx, time.Second)
			f.opts = append(f.opts, grpc.WaitForReady(true))
			f.hook.hook = func(context.Context) {
				f.srv.Stop()
				synctest.Wait()
			}
		},
		want: "not_connected DeadlineExceeded",
	},
	{
		name:   "answer_too_large",
		change: func(f *fixture) { f.opts = append(f.opts, grpc.MaxCallRecvMsgSize(1)) },
		want:   "ok ResourceExhausted 1s",
	},
	{
		name:   "answer_not_unmarshallable",
		change: func(f *fixture) { f.opts = append(f.opts, grpc.ForceCodec(badCodec{})) },
		want:   "ok Internal 1s",
	},
	{
		name: "server_answers_as_if_the_request_were_too_large",
		change: func(f *fixture) {
			f.fail(codes.ResourceExhausted, "trying to send message larger than max (7 vs. 1)")
		},
		want: "failed ResourceExhausted 1s",
	},
	{
		name: "server_answers_as_if_the_answer_were_too_large",
		change: func(f *fixture) {
			f.fail(codes.ResourceExhausted, "grpc: received message larger than max (7 vs. 1)")
		},
		want: "failed ResourceExhausted 1s",
	},
	{
		name: "caller_cancels",
		change: func(f *fixture) {
			cancel := f.cancel
			time.AfterFunc(time.Second/2, func() { cancel() })
		},
		want: "ignored Canceled 500ms",
	},
	{
		name:   "callers_deadline_passes",
		change: func(f *fixture) { f.ctx, f.cancel = context.WithTimeout(f.ctx, time.Second/2) },
		want:   "ignored DeadlineExceeded 500ms",
	},
	{
		name:   "server_says_cancelled",
		change: func(f *fixture) { f.fail(codes.Canceled, "") },
		want:   "failed Canceled 1s",
	},
	{
		name:   "server_says_deadline_exceeded",
		change: func(f *fixture) { f.fail(codes.DeadlineExceeded, "") },
		want:   "failed DeadlineExceeded 1s",
	},
	{
		name:   "server_says_unavailable",
		change: func(f *fixture) { f.fail(codes.Unavailable, "") },
		want:   "failed Unavailable 1s",
	},
	{
		name: "server_fails_after_headers",
		change: func(f *fixture) {
			f.fail(codes.Aborted, "")
			f.behaviour.HeadersBeforeFailure = true
		},
		want: "failed Aborted 1s",
	},
	{
		name:   "connection_breaks",
		change: func(f *fixture) { time.AfterFunc(time.Second/2, f.srv.CloseConnections) },
		want:   "failed Unavailable 500ms",
	},
	{
		name:   "connection_is_closed_by_its_owner",
		change: func(f *fixture) { time.AfterFunc(time.Second/2, func() { f.cc.Close() }) },
		want:   "ignored Canceled 500ms",
	},
}

// What became of a call is known whatever the policy and wherever the stack stands.
func TestFate(t *testing.T) {
	for _, tc := range fates {
		t.Run(tc.name, func(t *testing.T) {
			for _, policy := range policies {
				for _, place := range placement {
					for _, kind := range allKinds {
						t.Run(policy+"/"+place+"/"+kind.String(), func(t *testing.T) {
							synctest.Test(t, func(t *testing.T) {
								m, hook := &meter{}, &hookToy{}
								f := newFixture(t, policy, place, tc.dial, m, hook)
								f.hook = hook
								if tc.change != nil {
									tc.change(f)
								}
								err := f.call(t, kind)
								synctest.Wait() // gRPC may release a stream that it closes.
								want := tc.want
								if tc.stream != "" && (kind == interceptor.ServerStream || kind == interceptor.BidiStream) {
									want = tc.stream
								}
								if got := strings.Join(m.log.take(), ", "); got != want {
									t.Errorf("the gate was told %q, want %q (of %v)", got, want, err)
								}
							})
						})
					}
				}
			}
		})
	}
}

// newFixture is a server and a connection to it with a stack of the layers.
func newFixture(t *testing.T, policy, place string, dial []grpc.DialOption, layers ...interceptor.Spec) *fixture {
	t.Helper()
	f := &fixture{
		req: new(testingv1.UnaryRequest), reply: new(testingv1.UnaryResponse),
		behaviour: &testingv1.Behaviour{Delay: durationpb.New(time.Second)},
	}
	f.ctx, f.cancel = context.WithCancel(t.Context())
	f.srv = testserver.New(t, testserver.InMemory())
	s := calltest.Stack(t, layers...)
	dial = append(dial[:len(dial):len(dial)], grpc.WithDefaultServiceConfig(fmt.Sprintf(`{"loadBalancingConfig": [{%q: {}}]}`, policy)))
	switch place {
	case "dial_options":
		dial = append(dial, s.DialOptions()...)
	case "interceptors":
		dial = append(dial, grpc.WithUnaryInterceptor(s.UnaryClientInterceptor()), grpc.WithStreamInterceptor(s.StreamClientInterceptor()))
	}
	cc, err := f.srv.NewClient(dial...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		f.cancel()
		cc.Close()
		if err := s.Drain(context.Background()); err != nil {
			t.Error(err)
		}
	})
	f.cc, f.conn = cc, cc
	if place == "wrap" {
		f.conn = s.Wrap(cc)
	}
	return f
}

func (f *fixture) call(t *testing.T, kind interceptor.Kind) error {
	t.Helper()
	if !f.idle {
		awaitState(t, f.cc, connectivity.Ready)
	}
	if r, ok := f.req.(*testingv1.UnaryRequest); ok {
		r.Behaviour = f.behaviour
		r.Payload = []byte("hello")
	}
	return exchange(f.ctx, f.conn, kind, f.req, f.reply, f.opts...)
}

// metered returns layers with a meter on either side.
func metered(between ...interceptor.Spec) (outer, inner *meter, layers []interceptor.Spec) {
	outer, inner = &meter{}, &meter{}
	layers = append([]interceptor.Spec{outer}, between...)
	return outer, inner, append(layers, inner)
}

// expectLog checks what a meter was told.
func expectLog(t *testing.T, who string, m *meter, want string) {
	t.Helper()
	synctest.Wait()
	if got := strings.Join(m.log.take(), ", "); got != want {
		t.Errorf("%s was told %q, want %q", who, got, want)
	}
}

func TestFateBetweenLayers(t *testing.T) {
	for _, kind := range allKinds {
		t.Run("deadline_of_a_layer/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&timeoutToy{d: time.Second / 2})
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				if err := f.call(t, kind); status.Code(err) != codes.DeadlineExceeded {
					t.Errorf("the call ended with %v, want DEADLINE_EXCEEDED", err)
				}
				expectLog(t, "the outer gate", outer, "failed DeadlineExceeded 500ms")
				expectLog(t, "the inner gate", inner, "failed DeadlineExceeded 500ms")
			})
		})

		t.Run("deadline_of_the_caller_inside_that_of_a_layer/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&timeoutToy{d: time.Second})
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				f.ctx, f.cancel = context.WithTimeout(f.ctx, time.Second/2)
				f.call(t, kind)
				expectLog(t, "the outer gate", outer, "ignored DeadlineExceeded 500ms")
				expectLog(t, "the inner gate", inner, "ignored DeadlineExceeded 500ms")
			})
		})

		t.Run("retry/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&retryToy{n: 3, backoff: time.Second})
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				f.fail(codes.Unavailable, "")
				f.call(t, kind)
				each := "failed Unavailable 1s"
				expectLog(t, "the inner gate", inner, strings.Join([]string{each, each, each}, ", "))
				want := "failed Unavailable 3s"
				if kind == interceptor.Unary { // The toy backs off only before a stream is open.
					want = "failed Unavailable 5s"
				}
				expectLog(t, "the outer gate", outer, want)
			})
		})

		t.Run("retry_of_what_was_never_sent/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&retryToy{n: 2})
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "no token server")}))
				f.call(t, kind)
				expectLog(t, "the inner gate", inner, "not_sent Unavailable, not_sent Unavailable")
				expectLog(t, "the outer gate", outer, "not_sent Unavailable")
			})
		})

		t.Run("first_attempt_not_sent/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer := &meter{}
				f := newFixture(t, p2c.Name, "dial_options", nil, outer, &retryToy{n: 2})
				creds := &firstFails{}
				f.opts = append(f.opts, grpc.PerRPCCredentials(creds))
				f.fail(codes.NotFound, "")
				f.call(t, kind)
				expectLog(t, "the gate", outer, "failed NotFound 1s")
			})
		})

		t.Run("foreign_retry/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(foreignTwice())
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				f.fail(codes.Unavailable, "")
				f.call(t, kind)
				expectLog(t, "the inner gate", inner, "failed Unavailable 1s, failed Unavailable 1s")
				expectLog(t, "the outer gate", outer, "failed Unavailable 2s")
			})
		})

		t.Run("foreign_inside_a_retry/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				inner := &meter{}
				f := newFixture(t, p2c.Name, "dial_options", nil, &retryToy{n: 2}, passForeign(), inner)
				f.fail(codes.Unavailable, "")
				f.call(t, kind)
				expectLog(t, "the gate", inner, "failed Unavailable 1s, failed Unavailable 1s")
			})
		})

		t.Run("answered_by_a_layer/"+kind.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&answerToy{err: status.Error(codes.NotFound, "cached")})
				f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
				f.call(t, kind)
				expectLog(t, "the inner gate", inner, "not_sent NotFound")
				expectLog(t, "the outer gate", outer, "not_sent NotFound")
			})
		})
	}
}

func TestFateWithoutAFreeStream(t *testing.T) {
	for _, kind := range allKinds {
		synctest.Test(t, func(t *testing.T) {
			m := &meter{}
			srv := testserver.New(t, testserver.InMemory(), testserver.GRPC(grpc.MaxConcurrentStreams(1)))
			cc := testserver.Dial(t, srv, calltest.Stack(t, m).DialOptions()...)
			awaitState(t, cc, connectivity.Ready)
			exchange(t.Context(), cc, interceptor.Unary, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse)) // The server's settings have come.
			srv.Stall()
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			go exchange(ctx, cc, interceptor.Unary, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse))
			synctest.Wait()
			m.log.take()
			second, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			exchange(second, cc, kind, new(testingv1.UnaryRequest), new(testingv1.UnaryResponse))
			expectLog(t, kind.String()+": the gate", m, "not_sent DeadlineExceeded")
			<-ctx.Done()
			synctest.Wait()
			srv.Resume()
		})
	}
}

// firstFails are credentials that fail for the first attempt.
type firstFails struct{ n int }

func (c *firstFails) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if c.n++; c.n == 1 {
		return nil, status.Error(codes.Unavailable, "no token server")
	}
	return nil, nil
}
func (*firstFails) RequireTransportSecurity() bool { return false }

// answerToy answers calls itself.
type answerToy struct {
	interceptor.CallOnly
	err    error
	before func() // Is called first, unless it is nil.
}

func (l *answerToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *answerToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		if l.before != nil {
			l.before()
		}
		if l.err != nil {
			return l.err
		}
		return next(ctx, c)
	}
}

func TestFateOfStreams(t *testing.T) {
	open := func(t *testing.T, f *fixture, opts ...grpc.CallOption) grpc.ClientStream {
		t.Helper()
		awaitState(t, f.cc, connectivity.Ready)
		s, err := f.conn.NewStream(f.ctx, descOf(interceptor.BidiStream), methodOf[interceptor.BidiStream], opts...)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	request := func(f *fixture, size int) *testingv1.BidiRequest {
		return &testingv1.BidiRequest{Behaviour: f.behaviour, Payload: make([]byte, size)}
	}
	for _, tc := range []struct {
		name string
		run  func(t *testing.T, f *fixture)
		want string
	}{
		{"header_is_a_response", func(t *testing.T, f *fixture) {
			f.behaviour.HeadersBeforeFailure = true
			s := open(t, f)
			s.SendMsg(request(f, 1))
			if _, err := s.Header(); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second / 2)
			f.cancel()
			synctest.Wait()
		}, "responded ok 1ns, ignored Canceled 500ms after its response"},
		{"header_of_a_failure_alone_is_none", func(t *testing.T, f *fixture) {
			f.fail(codes.Aborted, "")
			s := open(t, f)
			s.SendMsg(request(f, 1))
			s.Header()
			s.RecvMsg(f.reply)
		}, "failed Aborted 1s"},
		{"abandoned_after_its_response", func(t *testing.T, f *fixture) {
			s := open(t, f)
			s.SendMsg(request(f, 1))
			s.RecvMsg(f.reply)
			time.Sleep(time.Hour)
			f.cancel()
		}, "responded ok 1s, ignored Canceled 1h0m1s after its response"},
		{"abandoned_before_its_response", func(t *testing.T, f *fixture) {
			open(t, f)
			time.Sleep(time.Second)
			f.cancel()
		}, "ignored Canceled 1s"},
		{"connection_breaks_after_its_response", func(t *testing.T, f *fixture) {
			s := open(t, f)
			s.SendMsg(request(f, 1))
			s.RecvMsg(f.reply)
			f.srv.CloseConnections()
			s.RecvMsg(f.reply)
		}, "responded ok 1s, failed Unavailable 1s after its response"},
		{"later_message_too_large", func(t *testing.T, f *fixture) {
			s := open(t, f, grpc.MaxCallSendMsgSize(100))
			s.SendMsg(request(f, 1))
			s.RecvMsg(f.reply)
			if err := s.SendMsg(request(f, 1000)); status.Code(err) != codes.ResourceExhausted {
				t.Errorf("SendMsg: %v, want RESOURCE_EXHAUSTED", err)
			}
		}, "responded ok 1s, ignored ResourceExhausted 1s after its response"},
		{"second_message_too_large_without_a_response", func(t *testing.T, f *fixture) {
			s := open(t, f, grpc.MaxCallSendMsgSize(100))
			s.SendMsg(request(f, 1))
			s.SendMsg(request(f, 1000))
		}, "ignored ResourceExhausted 1ns"},
		{"response_too_large", func(t *testing.T, f *fixture) {
			s := open(t, f, grpc.MaxCallRecvMsgSize(1))
			s.SendMsg(request(f, 1000))
			s.RecvMsg(f.reply)
		}, "ok ResourceExhausted 1s"},
		{"cannot_be_opened", func(t *testing.T, f *fixture) {
			awaitState(t, f.cc, connectivity.Ready)
			creds := badCredentials{status.Error(codes.Unavailable, "no token server")}
			if _, err := f.conn.NewStream(f.ctx, descOf(interceptor.BidiStream), methodOf[interceptor.BidiStream], grpc.PerRPCCredentials(creds)); err == nil {
				t.Error("a stream without credentials was opened")
			}
		}, "not_sent Unavailable"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			for _, policy := range policies {
				synctest.Test(t, func(t *testing.T) {
					outer, inner, layers := metered(&passToy{})
					f := newFixture(t, policy, "dial_options", nil, layers...)
					tc.run(t, f)
					expectLog(t, policy+": the outer gate", outer, tc.want)
					expectLog(t, policy+": the inner gate", inner, tc.want)
				})
			}
		})
	}
}

// swallowToy does not tell its caller of its stream's end.
type swallowToy struct{ interceptor.CallOnly }

func (l *swallowToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *swallowToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		err := next(ctx, c)
		if err == nil {
			c.SetStream(&swallowStream{c.Stream()})
		}
		return err
	}
}

type swallowStream struct{ grpc.ClientStream }

func (s *swallowStream) RecvMsg(m any) error {
	s.ClientStream.RecvMsg(m)
	return nil
}

// idleToy cuts a stream short that nobody reads from, on its own account.
type idleToy struct {
	interceptor.CallOnly
	d time.Duration
}

func (l *idleToy) NewLayer() (interceptor.Layer, error) { return l, nil }

func (l *idleToy) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return func(ctx context.Context, c *interceptor.Call) error {
		ctx, cancel := context.WithCancelCause(ctx)
		end := c.Internals().StreamEnd()
		if err := next(ctx, c); err != nil {
			cancel(nil)
			return err
		}
		time.AfterFunc(l.d, func() {
			r := &interceptor.Refusal{Layer: "idle", Reason: interceptor.ReasonDeadline, Sent: true}
			cancel(r)
			end.End(r)
		})
		return nil
	}
}

func TestFateOfStreamsBetweenLayers(t *testing.T) {
	bidi := func(t *testing.T, f *fixture) grpc.ClientStream {
		t.Helper()
		awaitState(t, f.cc, connectivity.Ready)
		s, err := f.conn.NewStream(f.ctx, descOf(interceptor.BidiStream), methodOf[interceptor.BidiStream])
		if err != nil {
			t.Fatal(err)
		}
		if err := s.SendMsg(&testingv1.BidiRequest{Behaviour: f.behaviour}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	t.Run("caller_cancels_after_the_attempts_end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			outer, inner, layers := metered(&swallowToy{})
			f := newFixture(t, p2c.Name, "dial_options", nil, layers...)
			f.fail(codes.Aborted, "")
			s := bidi(t, f)
			s.RecvMsg(f.reply)
			time.Sleep(59 * time.Second)
			expectLog(t, "the inner gate", inner, "failed Aborted 1s")
			expectLog(t, "the outer gate", outer, "responded ok 1s")
			f.cancel()
			expectLog(t, "the outer gate", outer, "ignored Canceled 1m0s after its response")
		})
	})
	t.Run("caller_abandons_it_after_the_attempts_end", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			outer, inner, layers := metered(&retryToy{n: 1})
			f := newFixture(t, p2c.Name, "dial_options", nil, append([]interceptor.Spec{&passToy{}}, layers...)...)
			bidi(t, f)
			f.srv.CloseConnections()
			time.Sleep(time.Minute)
			f.cancel()
			synctest.Wait()
			if got := len(inner.log.take()) + len(outer.log.take()); got != 2 {
				t.Errorf("%d tickets were released, want 2", got)
			}
		})
	})
	t.Run("cut_short_by_a_layer_on_its_own_account", func(t *testing.T) {
		for _, place := range []string{"dial_options", "other_connection"} {
			synctest.Test(t, func(t *testing.T) {
				outer, inner, layers := metered(&idleToy{d: 5 * time.Second})
				f := newFixture(t, p2c.Name, place, nil, layers...)
				if place == "other_connection" {
					f.conn = calltest.Stack(t, layers...).Wrap(struct{ grpc.ClientConnInterface }{f.cc})
				}
				bidi(t, f)
				time.Sleep(time.Minute)
				expectLog(t, place+": the inner gate", inner, "failed DeadlineExceeded 5s")
				expectLog(t, place+": the outer gate", outer, "failed DeadlineExceeded 5s")
			})
		}
	})
}
