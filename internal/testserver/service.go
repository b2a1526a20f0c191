// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"errors"
	"io"
	"strings"
	"time"

	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// service implements TestService for one run of a server.
type service struct {
	testingv1.UnimplementedTestServiceServer

	server *Server
	dead   <-chan struct{} // closed when the run is killed
}

// A call is one call of TestService, from its arrival to its end.
type call struct {
	*service
	ctx      context.Context
	timeLeft time.Duration // until the deadline, on arrival
	deadline bool          // there is one
	received int32         // request messages
	sent     int32         // response messages
	headers  bool          // headers are on their way
}

// begin counts a call that arrives.
func (v *service) begin(ctx context.Context) call {
	v.server.counters.begin()
	c := call{service: v, ctx: ctx}
	if deadline, ok := ctx.Deadline(); ok {
		c.timeLeft, c.deadline = time.Until(deadline), true
	}
	return c
}

// end counts a call that ends, and has its load reported.
func (c *call) end(err error) {
	if c.server.report != nil {
		// A report goes out if the recorder was asked for.
		orca.CallMetricsRecorderFromContext(c.ctx)
	}
	c.server.counters.end(status.Code(err))
}

// admit lets a call in, or fails it at once if that is how the server is.
func (c *call) admit() error {
	s := c.server
	if err := c.open(); err != nil {
		return err
	}
	f := s.current.Load().fail
	if f.fraction == 0 || !f.hits(randOf(s.seed, s.failures.Add(1), forFault)) {
		return nil
	}
	if f.headers {
		if err := c.sendHeaders(nil); err != nil {
			return err
		}
	}
	return status.Errorf(f.code, "testserver: %s fails calls", s.name)
}

// open waits until the server answers calls.
func (c *call) open() error {
	if !c.server.open(c.ctx.Done()) {
		return c.ended()
	}
	return nil
}

// work does a piece of work, after its time in the queue.
func (c *call) work() error {
	s := c.server
	stop := c.ctx.Done()
	if s.keepWorking {
		stop = c.dead
	}
	r := randOf(s.seed, s.works.Add(1), forServiceTime)
	amount := s.model.Draw(&r)
	begin := s.now()
	if s.queue != nil {
		var ok bool
		begin, ok = s.queue.acquire(begin, stop, s.counters.changed)
		s.counters.changed()
		if !ok {
			return c.ended()
		}
	}
	end, ok := s.work(begin, amount, stop)
	s.counters.busy.Add(int64(end.at - begin.at))
	if s.queue != nil {
		s.queue.release(end)
	}
	if !ok || c.ctx.Err() != nil {
		return c.ended()
	}
	return nil
}

// ended returns the status of a call that cannot go on.
func (c *call) ended() error {
	if err := c.ctx.Err(); err != nil {
		return status.FromContextError(err).Err()
	}
	return status.Errorf(codes.Unavailable, "testserver: %s is stopped", c.server.name)
}

// sendHeaders sends headers now.
func (c *call) sendHeaders(headers map[string]string) error {
	c.headers = true
	return grpc.SendHeader(c.ctx, metadata.New(headers))
}

// prepare readies a call for a message, or for its status if none follows: the
// delay, what holds the server's answers back, and, for a message, the headers.
func (c *call) prepare(b *testingv1.Behaviour, message bool) error {
	headers := b.GetResponseHeaders()
	if b.GetHeadersBeforeFailure() && !c.headers {
		if err := c.open(); err != nil {
			return err
		}
		if err := c.sendHeaders(headers); err != nil {
			return err
		}
	}
	if d := b.GetDelay().AsDuration(); d > 0 {
		timer := time.NewTimer(d)
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			timer.Stop()
			return c.ended()
		}
	}
	if err := c.open(); err != nil {
		return err
	}
	// Headers that were set would go out ahead of a status too.
	if message && !c.headers {
		c.headers = true
		if len(headers) > 0 {
			return grpc.SetHeader(c.ctx, metadata.New(headers))
		}
	}
	return nil
}

// outcome sets the trailers and returns the status that a request asks for.
func (c *call) outcome(b *testingv1.Behaviour) error {
	if trailers := b.GetResponseTrailers(); len(trailers) > 0 {
		if err := grpc.SetTrailer(c.ctx, metadata.New(trailers)); err != nil {
			return err
		}
	}
	if !fails(b) {
		return nil
	}
	st := b.GetStatus()
	return status.ErrorProto(&spb.Status{Code: st.GetCode(), Message: st.GetMessage(), Details: st.GetDetails()})
}

// observed is what the server saw, for the next response message.
func (c *call) observed(b *testingv1.Behaviour) *testingv1.Observed {
	o := &testingv1.Observed{Server: c.server.name, Index: c.sent, Received: c.received}
	c.sent++
	if c.deadline {
		o.TimeLeft = durationpb.New(c.timeLeft)
	}
	if names := b.GetEchoMetadata(); len(names) > 0 {
		md, _ := metadata.FromIncomingContext(c.ctx)
		o.RequestMetadata = make(map[string]string)
		for _, name := range names {
			if values := md.Get(name); len(values) > 0 {
				o.RequestMetadata[name] = strings.Join(values, ", ")
			}
		}
	}
	return o
}

// Unary implements TestService.
func (v *service) Unary(ctx context.Context, req *testingv1.UnaryRequest) (_ *testingv1.UnaryResponse, err error) {
	c := v.begin(ctx)
	defer func() { c.end(err) }()
	if err := c.admit(); err != nil {
		return nil, err
	}
	c.received++
	if err := c.work(); err != nil {
		return nil, err
	}
	b := req.GetBehaviour()
	if err := check(b); err != nil {
		return nil, err
	}
	if err := c.prepare(b, !fails(b)); err != nil {
		return nil, err
	}
	if err := c.outcome(b); err != nil {
		return nil, err
	}
	return &testingv1.UnaryResponse{Observed: c.observed(b), Payload: payload(b, req.GetPayload())}, nil
}

// ClientStream implements TestService.
func (v *service) ClientStream(stream testingv1.TestService_ClientStreamServer) (err error) {
	c := v.begin(stream.Context())
	defer func() { c.end(err) }()
	if err := c.admit(); err != nil {
		return err
	}
	var b *testingv1.Behaviour
	var last []byte
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		c.received++
		last = req.GetPayload()
		if b == nil {
			b = req.GetBehaviour()
		}
		if fails(b) {
			break
		}
	}
	if err := c.work(); err != nil {
		return err
	}
	if err := check(b); err != nil {
		return err
	}
	if err := c.prepare(b, !fails(b)); err != nil {
		return err
	}
	if err := c.outcome(b); err != nil {
		return err
	}
	return stream.SendAndClose(&testingv1.ClientStreamResponse{Observed: c.observed(b), Payload: payload(b, last)})
}

// ServerStream implements TestService.
func (v *service) ServerStream(req *testingv1.ServerStreamRequest, stream testingv1.TestService_ServerStreamServer) (err error) {
	c := v.begin(stream.Context())
	defer func() { c.end(err) }()
	if err := c.admit(); err != nil {
		return err
	}
	c.received++
	return c.respond(req.GetBehaviour(), func(b *testingv1.Behaviour) error {
		return stream.Send(&testingv1.ServerStreamResponse{Observed: c.observed(b), Payload: payload(b, req.GetPayload())})
	})
}

// Bidi implements TestService.
func (v *service) Bidi(stream testingv1.TestService_BidiServer) (err error) {
	c := v.begin(stream.Context())
	defer func() { c.end(err) }()
	if err := c.admit(); err != nil {
		return err
	}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		c.received++
		if err := c.respond(req.GetBehaviour(), func(b *testingv1.Behaviour) error {
			return stream.Send(&testingv1.BidiResponse{Observed: c.observed(b), Payload: payload(b, req.GetPayload())})
		}); err != nil {
			return err
		}
	}
}

// respond does the work of one request and sends what it asks for. It returns
// the status that the request asks for.
func (c *call) respond(b *testingv1.Behaviour, send func(*testingv1.Behaviour) error) error {
	if err := c.work(); err != nil {
		return err
	}
	if err := check(b); err != nil {
		return err
	}
	count := int32(1)
	if b != nil && b.ResponseCount != nil {
		count = b.GetResponseCount()
	}
	for range count {
		if err := c.prepare(b, true); err != nil {
			return err
		}
		if err := send(b); err != nil {
			return err
		}
	}
	if count == 0 {
		if err := c.prepare(b, false); err != nil {
			return err
		}
	}
	return c.outcome(b)
}

// fails reports whether a request asks for a status other than OK.
func fails(b *testingv1.Behaviour) bool { return b.GetStatus().GetCode() != 0 }

// maxResponseSize is the most that a request may ask for.
const maxResponseSize = 64 << 20

// check returns the status of a request that asks for something impossible.
func check(b *testingv1.Behaviour) error {
	if b == nil {
		return nil
	}
	invalid := func(field string, value any, rule string) error {
		return status.Errorf(codes.InvalidArgument, "behaviour.%s is %v, %s", field, value, rule)
	}
	if code := b.GetStatus().GetCode(); code < 0 {
		return invalid("status.code", code, "must not be negative")
	}
	if b.Delay != nil {
		if err := b.Delay.CheckValid(); err != nil {
			return invalid("delay", b.Delay, "must be a valid duration: "+err.Error())
		}
		if d := b.Delay.AsDuration(); d < 0 {
			return invalid("delay", d, "must not be negative")
		}
	}
	if size := b.GetResponseSize(); size < 0 || size > maxResponseSize {
		return invalid("response_size", size, "must be in [0, 64 MiB]")
	}
	if count := b.GetResponseCount(); count < 0 {
		return invalid("response_count", count, "must not be negative")
	}
	return nil
}

// zeros is what payloads are made of. It is never written to.
var zeros [64 << 10]byte

// payload returns the payload of a response to a request with the given one.
func payload(b *testingv1.Behaviour, request []byte) []byte {
	if b == nil || b.ResponseSize == nil {
		return request
	}
	size := int(b.GetResponseSize())
	if size > len(zeros) {
		return make([]byte, size)
	}
	return zeros[:size:size]
}
