// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"errors"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// answer is what a client sees of a call, of whichever kind.
type answer struct {
	observed []*testingv1.Observed
	payloads []int // sizes
	header   metadata.MD
	trailer  metadata.MD
	err      error
}

// kinds makes a call of each kind with one request.
var kinds = map[string]func(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour, payload []byte) answer{
	"unary": func(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour, payload []byte) (a answer) {
		r, err := client.Unary(ctx, &testingv1.UnaryRequest{Behaviour: b, Payload: payload}, grpc.Header(&a.header), grpc.Trailer(&a.trailer))
		if a.err = err; err == nil {
			a.add(r)
		}
		return a
	},
	"client stream": func(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour, payload []byte) (a answer) {
		stream, err := client.ClientStream(ctx)
		if err != nil {
			return answer{err: err}
		}
		// A server that has its status already may end the stream before this.
		_ = stream.Send(&testingv1.ClientStreamRequest{Behaviour: b, Payload: payload})
		r, err := stream.CloseAndRecv()
		if a.err = err; err == nil {
			a.add(r)
		}
		a.header, _ = stream.Header()
		a.trailer = stream.Trailer()
		return a
	},
	"server stream": func(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour, payload []byte) (a answer) {
		stream, err := client.ServerStream(ctx, &testingv1.ServerStreamRequest{Behaviour: b, Payload: payload})
		if err != nil {
			return answer{err: err}
		}
		for err == nil {
			var r *testingv1.ServerStreamResponse
			if r, err = stream.Recv(); err == nil {
				a.add(r)
			}
		}
		return a.ended(stream, err)
	},
	"bidi": func(ctx context.Context, client testingv1.TestServiceClient, b *testingv1.Behaviour, payload []byte) (a answer) {
		stream, err := client.Bidi(ctx)
		if err != nil {
			return answer{err: err}
		}
		_ = stream.Send(&testingv1.BidiRequest{Behaviour: b, Payload: payload})
		_ = stream.CloseSend()
		for err == nil {
			var r *testingv1.BidiResponse
			if r, err = stream.Recv(); err == nil {
				a.add(r)
			}
		}
		return a.ended(stream, err)
	},
}

func (a *answer) add(r interface {
	GetObserved() *testingv1.Observed
	GetPayload() []byte
}) {
	a.observed = append(a.observed, r.GetObserved())
	a.payloads = append(a.payloads, len(r.GetPayload()))
}

func (a answer) ended(stream grpc.ClientStream, err error) answer {
	if !errors.Is(err, io.EOF) {
		a.err = err
	}
	a.header, _ = stream.Header()
	a.trailer = stream.Trailer()
	return a
}

// forEachKind runs a test for each kind of call, against a server in memory and
// in virtual time.
func forEachKind(t *testing.T, f func(t *testing.T, streams bool, do func(*testingv1.Behaviour) answer), opts ...Option) {
	t.Helper()
	for name, do := range kinds {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client := dial(t, New(t, append(opts, InMemory())...))
				f(t, name == "server stream" || name == "bidi", func(b *testingv1.Behaviour) answer {
					ctx := metadata.AppendToOutgoingContext(t.Context(), "colour", "red", "colour", "blue")
					return do(ctx, client, b, []byte("12345"))
				})
			})
		})
	}
}

// No behaviour is one response at once.
func TestBehaviourNone(t *testing.T) {
	for _, b := range []*testingv1.Behaviour{nil, {}} {
		forEachKind(t, func(t *testing.T, _ bool, do func(*testingv1.Behaviour) answer) {
			begin := time.Now()
			a := do(b)
			must(t, a.err)
			if want := []int{5}; !slices.Equal(a.payloads, want) {
				t.Fatalf("payload sizes: got %v, want %v", a.payloads, want)
			}
			want := &testingv1.Observed{Server: "s", Received: 1}
			if got := a.observed[0]; !proto.Equal(got, want) {
				t.Errorf("observed: got %v, want %v", got, want)
			}
			if got := time.Since(begin); got != 0 {
				t.Errorf("time taken: got %v, want none", got)
			}
		}, Name("s"))
	}
}

func TestBehaviourSetsDelayCountAndSize(t *testing.T) {
	for _, size := range []int32{0, 7, 100_000} {
		forEachKind(t, func(t *testing.T, streams bool, do func(*testingv1.Behaviour) answer) {
			begin := time.Now()
			a := do(&testingv1.Behaviour{
				Delay:         durationpb.New(10 * ms),
				ResponseCount: proto.Int32(3),
				ResponseSize:  proto.Int32(size),
			})
			must(t, a.err)
			want := []int{int(size)}
			if streams {
				want = []int{int(size), int(size), int(size)}
			}
			if !slices.Equal(a.payloads, want) {
				t.Errorf("payload sizes: got %v, want %v", a.payloads, want)
			}
			for i, o := range a.observed {
				if got := o.GetIndex(); got != int32(i) {
					t.Errorf("index of response %d: got %d", i, got)
				}
			}
			// The delay comes after the model's 5 ms and before each response.
			if got, want := time.Since(begin), 5*ms+time.Duration(len(want))*10*ms; got != want {
				t.Errorf("time taken: got %v, want %v", got, want)
			}
		}, ServiceTime(Fixed(5*ms)))
	}
}

func TestBehaviourSetsStatusHeadersAndTrailers(t *testing.T) {
	detail, err := anypb.New(&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Second)})
	must(t, err)
	for _, early := range []bool{false, true} {
		forEachKind(t, func(t *testing.T, _ bool, do func(*testingv1.Behaviour) answer) {
			begin := time.Now()
			a := do(&testingv1.Behaviour{
				Status:               &testingv1.Status{Code: int32(codes.DataLoss), Message: "lost", Details: []*anypb.Any{detail}},
				Delay:                durationpb.New(10 * ms),
				ResponseCount:        proto.Int32(0),
				ResponseHeaders:      map[string]string{"Shape": "round"},
				ResponseTrailers:     map[string]string{"size": "big"},
				HeadersBeforeFailure: early,
			})
			st := status.Convert(a.err)
			if st.Code() != codes.DataLoss || st.Message() != "lost" || len(st.Details()) != 1 {
				t.Errorf("status: got %v with %d details, want DATA_LOSS, lost, one detail", st, len(st.Details()))
			}
			if got := time.Since(begin); got != 10*ms {
				t.Errorf("time taken: got %v, want 10ms", got)
			}
			if got, want := a.header.Get("shape"), map[bool][]string{true: {"round"}}[early]; !slices.Equal(got, want) {
				t.Errorf("headers of a failed call: got %v, want %v", got, want)
			}
			if got := a.trailer.Get("size"); !slices.Equal(got, []string{"big"}) {
				t.Errorf("trailers: got %v, want [big]", got)
			}
		})
	}
}

// Status comes after the messages of a stream.
func TestBehaviourStatusOfStream(t *testing.T) {
	forEachKind(t, func(t *testing.T, streams bool, do func(*testingv1.Behaviour) answer) {
		a := do(&testingv1.Behaviour{
			Status:        &testingv1.Status{Code: int32(codes.Aborted)},
			ResponseCount: proto.Int32(2),
		})
		wantCode(t, a.err, codes.Aborted)
		want := 0
		if streams {
			want = 2
		}
		if got := len(a.observed); got != want {
			t.Errorf("messages before the status: got %d, want %d", got, want)
		}
	})
}

// Headers come with the first message.
func TestBehaviourHeaders(t *testing.T) {
	for _, early := range []bool{false, true} {
		forEachKind(t, func(t *testing.T, _ bool, do func(*testingv1.Behaviour) answer) {
			a := do(&testingv1.Behaviour{
				ResponseHeaders:      map[string]string{"shape": "round"},
				ResponseTrailers:     map[string]string{"size": "big"},
				HeadersBeforeFailure: early,
				EchoMetadata:         []string{"colour", "absent"},
			})
			must(t, a.err)
			if got := a.header.Get("shape"); !slices.Equal(got, []string{"round"}) {
				t.Errorf("headers: got %v, want [round]", got)
			}
			if got := a.trailer.Get("size"); !slices.Equal(got, []string{"big"}) {
				t.Errorf("trailers: got %v, want [big]", got)
			}
			md := a.observed[0].GetRequestMetadata()
			if len(md) != 1 || md["colour"] != "red, blue" {
				t.Errorf("echoed metadata: got %v, want colour: red, blue", md)
			}
		})
	}
}

// When headers are sent ahead of the delay the client sees them meanwhile.
func TestBehaviourHeadersBeforeFailure(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		begin := time.Now()
		stream, err := c.client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: &testingv1.Behaviour{
			Delay: durationpb.New(time.Second), HeadersBeforeFailure: true, ResponseHeaders: map[string]string{"shape": "round"},
		}})
		must(t, err)
		md, err := stream.Header()
		must(t, err)
		if got := md.Get("shape"); !slices.Equal(got, []string{"round"}) || time.Since(begin) != 0 {
			t.Errorf("headers: got %v after %v, want [round] at once", got, time.Since(begin))
		}
		_, err = stream.Recv()
		must(t, err)
		if got := time.Since(begin); got != time.Second {
			t.Errorf("first message after: got %v, want 1s", got)
		}
	})
}

// Deadline is observed and ends a delay.
func TestBehaviourDeadline(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r, err := c.client.Unary(ctx, &testingv1.UnaryRequest{})
		must(t, err)
		if got := r.GetObserved().GetTimeLeft().AsDuration(); got != time.Second {
			t.Errorf("time left: got %v, want 1s", got)
		}
		begin := time.Now()
		wantCode(t, unary(ctx, c.client, &testingv1.Behaviour{Delay: durationpb.New(time.Hour)}), codes.DeadlineExceeded)
		must(t, c.server.WaitInFlight(t.Context(), 0))
		if got := time.Since(begin); got != time.Second {
			t.Errorf("delay ended after: got %v, want 1s", got)
		}
	})
}

// Impossible behaviour is invalid argument.
func TestBehaviourImpossible(t *testing.T) {
	tests := []struct {
		b    *testingv1.Behaviour
		want string
	}{
		{&testingv1.Behaviour{Delay: durationpb.New(-time.Second)}, "behaviour.delay is -1s, must not be negative"},
		{&testingv1.Behaviour{Delay: &durationpb.Duration{Seconds: math.MaxInt64}}, "must be a valid duration"},
		{&testingv1.Behaviour{ResponseSize: proto.Int32(-1)}, "behaviour.response_size is -1, must be in [0, 64 MiB]"},
		{&testingv1.Behaviour{ResponseSize: proto.Int32(64<<20 + 1)}, "must be in [0, 64 MiB]"},
		{&testingv1.Behaviour{ResponseCount: proto.Int32(-2)}, "behaviour.response_count is -2, must not be negative"},
		{&testingv1.Behaviour{Status: &testingv1.Status{Code: -3}}, "behaviour.status.code is -3, must not be negative"},
	}
	for _, tt := range tests {
		forEachKind(t, func(t *testing.T, _ bool, do func(*testingv1.Behaviour) answer) {
			err := do(tt.b).err
			wantCode(t, err, codes.InvalidArgument)
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error: got %v, want one with %q", err, tt.want)
			}
		})
	}
}

// ClientStream answers after its last request.
func TestClientStreamAnswer(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		stream, err := c.client.ClientStream(t.Context())
		must(t, err)
		must(t, stream.Send(&testingv1.ClientStreamRequest{Payload: []byte("a")}))
		must(t, stream.Send(&testingv1.ClientStreamRequest{Behaviour: &testingv1.Behaviour{ResponseTrailers: map[string]string{"size": "big"}}}))
		must(t, stream.Send(&testingv1.ClientStreamRequest{Behaviour: &testingv1.Behaviour{ResponseSize: proto.Int32(9)}, Payload: []byte("ccc")}))
		r, err := stream.CloseAndRecv()
		must(t, err)
		if got := r.GetObserved().GetReceived(); got != 3 {
			t.Errorf("received: got %d, want 3", got)
		}
		if got := string(r.GetPayload()); got != "ccc" {
			t.Errorf("payload: got %q, want the last request's", got)
		}
		if got := stream.Trailer().Get("size"); !slices.Equal(got, []string{"big"}) {
			t.Errorf("trailers: got %v, want those of the first behaviour", got)
		}
	})
}

// ClientStream status does not wait for the last request.
func TestClientStreamEarlyStatus(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		stream, err := c.client.ClientStream(t.Context())
		must(t, err)
		must(t, stream.Send(&testingv1.ClientStreamRequest{Behaviour: &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(codes.Aborted)}}}))
		wantCode(t, stream.RecvMsg(&testingv1.ClientStreamResponse{}), codes.Aborted)
	})
}

func TestBidiAnswersEachRequestAsItAsks(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		stream, err := c.client.Bidi(t.Context())
		must(t, err)
		must(t, stream.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{ResponseCount: proto.Int32(2)}}))
		must(t, stream.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{ResponseCount: proto.Int32(0)}}))
		must(t, stream.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{ResponseHeaders: map[string]string{"too": "late"}}}))
		for i, received := range []int32{1, 1, 3} {
			r, err := stream.Recv()
			must(t, err)
			want := &testingv1.Observed{Server: "server", Index: int32(i), Received: received}
			if got := r.GetObserved(); !proto.Equal(got, want) {
				t.Errorf("observed: got %v, want %v", got, want)
			}
		}
		must(t, stream.Send(&testingv1.BidiRequest{Behaviour: &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(codes.Aborted)}, ResponseCount: proto.Int32(0)}}))
		_, err = stream.Recv()
		wantCode(t, err, codes.Aborted)
	})
}

// Codes beyond gRPC are sent and count as unknown.
func TestBehaviourUnknownCodes(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		if err := unary(t.Context(), c.client, &testingv1.Behaviour{Status: &testingv1.Status{Code: 99}}); err == nil {
			t.Error("status 99: got no error")
		}
		if got := c.server.Stats().Finished(codes.Unknown); got != 1 {
			t.Errorf("finished with UNKNOWN: got %d, want 1", got)
		}
	})
}

// loadReport returns the ORCA report in a trailer, by name of its fields.
func loadReport(t *testing.T, trailer metadata.MD) map[string]any {
	t.Helper()
	values := trailer.Get("endpoint-load-metrics-bin")
	if len(values) != 1 {
		t.Fatalf("load reports in the trailer: got %d, want 1", len(values))
	}
	mt, err := protoregistry.GlobalTypes.FindMessageByName("xds.data.orca.v3.OrcaLoadReport")
	must(t, err)
	m := mt.New()
	must(t, proto.Unmarshal([]byte(values[0]), m.Interface()))
	fields := make(map[string]any)
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if !fd.IsMap() {
			fields[string(fd.Name())] = v.Interface()
			return true
		}
		v.Map().Range(func(k protoreflect.MapKey, v protoreflect.Value) bool {
			fields[string(fd.Name())+"."+k.String()] = v.Interface()
			return true
		})
		return true
	})
	return fields
}

// Load is reported with every call.
func TestLoadReports(t *testing.T) {
	report := func(st Stats) orca.ServerMetrics {
		return orca.ServerMetrics{
			AppUtilization: 0.5,
			QPS:            1000,
			NamedMetrics:   map[string]float64{"calls": float64(st.Finished())},
		}
	}
	forEachKind(t, func(t *testing.T, _ bool, do func(*testingv1.Behaviour) answer) {
		for n := 1.0; n <= 2; n++ {
			got := loadReport(t, do(nil).trailer)
			if len(got) != 3 || got["application_utilization"] != 0.5 || got["rps_fractional"] != 1000.0 || got["named_metrics.calls"] != n {
				t.Errorf("load report: got %v, want utilization 0.5, rps 1000, %v calls", got, n)
			}
		}
	}, ReportLoad(report))
}

// Measured load reports the last full second.
func TestMeasuredLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, InMemory(), Workers(2), ServiceTime(Fixed(100*ms)), ReportLoad(MeasuredLoad()))
		client := dial(t, s)
		var trailer metadata.MD
		for i := range 21 {
			b := &testingv1.Behaviour{}
			if i%5 == 4 {
				b.Status = &testingv1.Status{Code: int32(codes.Internal)}
			}
			_, _ = client.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: b}, grpc.Trailer(&trailer))
			if i == 0 {
				if got := loadReport(t, trailer); len(got) != 0 {
					t.Errorf("report before a second has passed: got %v, want an empty one", got)
				}
			}
		}
		// One call of 100 ms after the other, through two workers.
		got := loadReport(t, trailer)
		for field, want := range map[string]float64{"application_utilization": 0.5, "rps_fractional": 10, "eps": 2} {
			if v, ok := got[field].(float64); !ok || math.Abs(v-want) > 1e-9 {
				t.Errorf("measured %s: got %v, want %v", field, got[field], want)
			}
		}
	})
}

// Registered services and options survive GOAWAY and restart.
func TestRegisterSurvivesRestart(t *testing.T) {
	const method = "/belfry.testing.v1.Other/Call"
	var intercepted int
	s := New(t, InMemory(),
		Register(func(r grpc.ServiceRegistrar) {
			r.RegisterService(&grpc.ServiceDesc{
				ServiceName: "belfry.testing.v1.Other",
				HandlerType: (*any)(nil),
				Streams: []grpc.StreamDesc{{StreamName: "Call", ServerStreams: true, Handler: func(any, grpc.ServerStream) error {
					return status.Error(codes.Aborted, "other")
				}}},
			}, struct{}{})
		}),
		GRPC(grpc.StreamInterceptor(func(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, h grpc.StreamHandler) error {
			intercepted++
			return h(srv, ss)
		})))
	ctx := testContext(t)
	for _, next := range []func() error{
		s.GoAway,
		func() error { s.Stop(); return s.Restart(ctx) },
		func() error { return nil },
	} {
		conn, err := s.NewClient()
		must(t, err)
		err = conn.Invoke(ctx, method, &testingv1.UnaryRequest{}, &testingv1.UnaryResponse{}, grpc.WaitForReady(true))
		wantCode(t, err, codes.Aborted)
		must(t, conn.Close())
		must(t, next())
	}
	s.Close()
	if intercepted != 3 {
		t.Errorf("calls through the interceptor: got %d, want 3", intercepted)
	}
	if got := s.Stats().Started; got != 0 {
		t.Errorf("calls of another service counted: got %d, want 0", got)
	}
}

// Wait returns on the event or says what it saw.
func TestWait(t *testing.T) {
	inVirtualTime(t, func(t *testing.T, c *calls) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		err := c.server.WaitInFlight(ctx, 3)
		if want := "server: waited in vain (started 0, in flight 0, queued 0, connections 1 of 1 accepted, finished 0)"; !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), want) {
			t.Errorf("Wait beyond its context: got %v, want a deadline exceeded with %q", err, want)
		}
		waited := make(chan error)
		for n := range int64(3) {
			go func() { waited <- c.server.WaitInFlight(t.Context(), n+1) }()
		}
		for range 3 {
			synctest.Wait()
			c.start(t.Context())
			must(t, <-waited)
		}
		if got, want := c.server.Stats().String(), "started 3, in flight 3, queued 0, connections 1 of 1 accepted, finished 0"; got != want {
			t.Errorf("stats: got %q, want %q", got, want)
		}
		for i := range 3 {
			must(t, c.wait(i).err)
		}
		if got, want := c.server.Stats().String(), "started 3, in flight 0, queued 0, connections 1 of 1 accepted, finished OK 3"; got != want {
			t.Errorf("stats: got %q, want %q", got, want)
		}
	}, ServiceTime(Fixed(time.Second)))
}
