// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/testserver"
	"github.com/belfry-go/belfry/resolver/discover"
)

var (
	stressCalls = flag.Int("stress.calls", 500, "how many calls TestStress makes")
	stressSeed  = flag.Uint64("stress.seed", 0, "the seed of TestStress; 0 is one of the clock")
	stressPace  = flag.Float64("stress.pace", 1, "how much longer than usual attempts and calls of TestStress may take: more than 1 on a busy machine")
)

// Calls of all four kinds are retried and hedged on servers that fail at random, over
// connections that break, by callers that behave at random. Each message must arrive
// once and in order, each outcome must be that of one attempt, and nothing may be left.
// What is random is what happens, not what must hold, so it cannot fail by chance.
func TestStress(t *testing.T) {
	seed := *stressSeed
	if seed == 0 {
		seed = rand.Uint64()>>1 + 1
	}
	t.Logf("-stress.seed=%d", seed)
	w := &stress{t: t, seed: seed, patience: stressTime(3 * time.Second)}
	attempt := stressTime(150 * time.Millisecond)
	cluster := testserver.NewCluster(t, 4, func(int) []testserver.Option {
		return []testserver.Option{testserver.Register(w.register)}
	})
	bound, err := concurrency.New(concurrency.Config{Limit: 200})
	if err != nil {
		t.Fatal(err)
	}
	stack, err := interceptor.NewStack(
		timeout.Config{Timeout: w.patience, Lifetime: w.patience},
		hedge.Config{AllMethods: true, Delay: 15 * time.Millisecond, MaxAttempts: 3, Budget: budget.Config{Ratio: 1, MinPerSecond: 1000}},
		retry.Config{AllMethods: true, MaxAttempts: 4, Backoff: retry.Backoff{Initial: time.Millisecond, Max: 5 * time.Millisecond}, Budget: budget.Config{Ratio: 1, MinPerSecond: 1000}},
		timeout.Config{Timeout: attempt, FirstResponse: attempt},
		bound,
	)
	if err != nil {
		t.Fatal(err)
	}
	source, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		t.Fatal(err)
	}
	opts := append(stack.DialOptions(), p2c.DialOptions()...)
	opts = append(append(opts, cluster.DialOptions()...), discover.WithSource(source), grpc.WithPerRPCCredentials(slowCredentials{}),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{}}]}`), grpc.WithNoProxy())
	conn, err := grpc.NewClient("belfry:///stress", opts...)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var chaos, callers sync.WaitGroup
	chaos.Go(func() { w.breakConnections(cluster, stop) })
	var next atomic.Int64
	for range 48 {
		callers.Go(func() {
			for {
				n := next.Add(1)
				if n > int64(*stressCalls) || w.failures.Load() > 20 {
					return
				}
				newCaller(w, conn, n).call()
			}
		})
	}
	callers.Wait()
	close(stop)
	chaos.Wait()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	if err := stack.Drain(ctx); err != nil {
		t.Errorf("the stack is not at rest: %v", err)
	}
	if n := bound.InUse(); n != 0 {
		t.Errorf("%d permits are held at the end", n)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d calls, %d succeeded, %d attempts reached a server, %d failures without a trailer", *stressCalls, w.ok.Load(), w.attempts.Load(), w.bare.Load())
	if n := w.bare.Load(); n > 0 {
		t.Errorf("%d calls failed without the trailer of the attempt whose failure it was", n)
	}
	if w.ok.Load() < int64(*stressCalls)/20 { // See -stress.pace.
		t.Logf("only %d of %d calls succeeded, so this shows little", w.ok.Load(), *stressCalls)
	}
}

type stress struct {
	t                      *testing.T
	seed                   uint64
	patience               time.Duration // What a call may take.
	attempts, ok, failures atomic.Int64
	bare                   atomic.Int64 // Calls that failed in time and without a trailer.
}

// stressTime is a time at the pace that -stress.pace asks for.
func stressTime(d time.Duration) time.Duration { return time.Duration(*stressPace * float64(d)) }

func (w *stress) errorf(format string, args ...any) {
	if w.failures.Add(1) <= 20 {
		w.t.Errorf(format, args...)
	}
}

// breakConnections ends connections, gently and not, until stop is closed.
func (w *stress) breakConnections(c *testserver.Cluster, stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(w.seed, 1))
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(50+rng.IntN(150)) * time.Millisecond):
		}
		s := c.Server(rng.IntN(len(c.Servers())))
		if rng.IntN(2) == 0 {
			s.CloseConnections()
		} else if err := s.GoAway(); err != nil {
			w.errorf("GoAway: %v", err)
		}
	}
}

// slowCredentials are late for one call in eight, and do not heed the context.
type slowCredentials struct{}

func (slowCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	if rand.IntN(8) == 0 {
		time.Sleep(time.Duration(rand.IntN(30)) * time.Millisecond)
	}
	return map[string]string{"token": "valid"}, nil
}

func (slowCredentials) RequireTransportSecurity() bool { return false }

// The service.

const stressService = "belfry.stress.Echo"

var (
	stressKinds = [...]grpc.StreamDesc{
		{StreamName: "Upload", ClientStreams: true},
		{StreamName: "Download", ServerStreams: true},
		{StreamName: "Chat", ClientStreams: true, ServerStreams: true},
	}
	stressCodes = [...]codes.Code{codes.Unavailable, codes.Unavailable, codes.Unavailable, codes.Internal, codes.NotFound}
)

func (w *stress) register(r grpc.ServiceRegistrar) {
	desc := &grpc.ServiceDesc{ServiceName: stressService, HandlerType: (*any)(nil)}
	desc.Methods = []grpc.MethodDesc{{MethodName: "Unary", Handler: func(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
		a := w.attempt(ctx)
		in := new(wrapperspb.BytesValue)
		if err := decode(in); err != nil {
			return nil, err
		}
		a.received(in)
		if err := a.setUp(func(md metadata.MD) error { return grpc.SendHeader(ctx, md) }, func(md metadata.MD) error { return grpc.SetHeader(ctx, md) }); err != nil {
			return nil, err
		}
		if err := grpc.SetTrailer(ctx, metadata.Pairs("attempt", a.id)); err != nil {
			return nil, err
		}
		if a.fault != none {
			return nil, a.err()
		}
		return in, nil
	}}}
	for _, d := range stressKinds {
		d.Handler = func(_ any, s grpc.ServerStream) error { return w.serve(d.StreamName, s) }
		desc.Streams = append(desc.Streams, d)
	}
	r.RegisterService(desc, w)
}

// fault is how an attempt fails.
type fault int

const (
	none         fault = iota
	atOnce             // Before anything is read.
	afterHeaders       // The same, after headers.
	midway             // After some messages.
)

// serverAttempt is one attempt as a server sees it.
type serverAttempt struct {
	w     *stress
	ctx   context.Context
	call  string
	id    string
	rng   *rand.Rand
	fault fault
	n     int // Messages received.
}

func (w *stress) attempt(ctx context.Context) *serverAttempt {
	n := w.attempts.Add(1)
	md, _ := metadata.FromIncomingContext(ctx)
	a := &serverAttempt{w: w, ctx: ctx, call: strings.Join(md["call"], ","), id: strconv.FormatInt(n, 10), rng: rand.New(rand.NewPCG(w.seed, uint64(n)+1<<32))}
	if v := md["grpc-previous-rpc-attempts"]; len(v) > 1 {
		w.errorf("attempt %s of call %s has grpc-previous-rpc-attempts %q, want one value", a.id, a.call, v)
	}
	if a.rng.IntN(3) == 0 {
		a.fault = fault(1 + a.rng.IntN(3))
	}
	return a
}

// err is the status of an attempt that fails.
func (a *serverAttempt) err() error {
	return status.Errorf(stressCodes[a.rng.IntN(len(stressCodes))], "call %s, attempt %s;", a.call, a.id)
}

// setUp waits as long as the attempt stalls, and sends headers or sets them.
func (a *serverAttempt) setUp(send, set func(metadata.MD) error) error {
	switch a.rng.IntN(40) {
	case 0: // It hangs.
		<-a.ctx.Done()
		return status.FromContextError(a.ctx.Err()).Err()
	case 1, 2, 3:
		stall := time.NewTimer(time.Duration(a.rng.IntN(60)) * time.Millisecond)
		defer stall.Stop()
		select {
		case <-stall.C:
		case <-a.ctx.Done():
		}
	}
	p, _ := peer.FromContext(a.ctx)
	md := metadata.Pairs("attempt", a.id, "server", p.LocalAddr.String())
	if a.fault == afterHeaders || a.fault == none && a.rng.IntN(2) == 0 {
		return send(md)
	}
	if a.fault == atOnce {
		return nil // Trailers alone.
	}
	return set(md)
}

// received checks a message.
func (a *serverAttempt) received(m *wrapperspb.BytesValue) {
	if want := stressPayload(a.call, a.n, len(m.Value)); string(m.Value) != want {
		a.w.errorf("attempt %s of call %s: message %d is %.40q, want %.40q", a.id, a.call, a.n, m.Value, want)
	}
	a.n++
}

// stressPayload is message n of a call, of a given size.
func stressPayload(call string, n, size int) string {
	s := fmt.Sprintf("%s/%d;", call, n)
	return strings.Repeat(s, size/len(s)+1)[:size]
}

func (w *stress) serve(kind string, s grpc.ServerStream) error {
	a := w.attempt(s.Context())
	s.SetTrailer(metadata.Pairs("attempt", a.id))
	if err := a.setUp(s.SendHeader, s.SetHeader); err != nil {
		return err
	}
	if a.fault == atOnce || a.fault == afterHeaders {
		return a.err()
	}
	last := -1 // The message after which it fails, or an upload is answered early.
	if a.fault == midway {
		last = a.rng.IntN(4)
	}
	early := kind == "Upload" && a.fault == none && a.rng.IntN(8) == 0
	if early {
		last = a.rng.IntN(3)
	}
	for {
		in := new(wrapperspb.BytesValue)
		if a.n == last && a.fault == midway {
			return a.err()
		}
		if a.n == last && early {
			return s.SendMsg(wrapperspb.Bytes([]byte("early")))
		}
		err := s.RecvMsg(in)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		a.received(in)
		switch kind {
		case "Download":
			for i := range 5 {
				if i == last && a.fault == midway {
					return a.err()
				}
				if err := s.SendMsg(wrapperspb.Bytes([]byte(stressPayload(a.call, i, len(in.Value))))); err != nil {
					return err
				}
			}
			return nil
		case "Chat":
			if err := s.SendMsg(in); err != nil {
				return err
			}
		}
	}
	if a.fault == midway {
		return a.err()
	}
	if kind == "Upload" {
		return s.SendMsg(wrapperspb.Bytes([]byte(strconv.Itoa(a.n))))
	}
	return nil
}

// The callers.

type caller struct {
	w        *stress
	conn     *grpc.ClientConn
	id       string
	start    time.Time
	rng      *rand.Rand
	ctx      context.Context
	cancel   context.CancelFunc
	quits    bool // It cancels the call at some time.
	size     int  // Of messages,
	messages int  // and their number.

	header, trailer metadata.MD
	peer            peer.Peer
	finished        atomic.Int32
}

func newCaller(w *stress, conn *grpc.ClientConn, n int64) *caller {
	c := &caller{w: w, conn: conn, start: time.Now(), id: strconv.FormatInt(n, 10), rng: rand.New(rand.NewPCG(w.seed, uint64(n)+1<<48))}
	c.size, c.messages = 20+c.rng.IntN(200), 1+c.rng.IntN(8)
	switch c.rng.IntN(20) {
	case 0: // More than a stream's window in all.
		c.size, c.messages = 20_000, 8
	case 1: // More than is kept.
		c.size, c.messages = 60_000, 6
	}
	return c
}

func (c *caller) options() []grpc.CallOption {
	return []grpc.CallOption{
		grpc.Header(&c.header), grpc.Trailer(&c.trailer), grpc.Peer(&c.peer),
		grpc.OnFinish(func(error) { c.finished.Add(1) }),
	}
}

func (c *caller) call() {
	c.ctx, c.cancel = context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), "call", c.id))
	defer c.cancel()
	if c.quits = c.rng.IntN(10) == 0; c.quits {
		quit := time.AfterFunc(time.Duration(c.rng.IntN(40))*time.Millisecond, c.cancel)
		defer quit.Stop()
	}
	kind := c.rng.IntN(4)
	var err error
	if kind == 3 {
		err = c.unary()
	} else {
		err = c.stream(&stressKinds[kind])
	}
	c.check(err)
	if n := c.finished.Load(); n != 1 {
		c.errorf("its OnFinish was called %d times, want once, before the end is known", n)
	}
}

func (c *caller) errorf(format string, args ...any) {
	c.w.errorf("call %s: "+format, append([]any{c.id}, args...)...)
}

// check checks how the call ended.
func (c *caller) check(err error) {
	header, trailer := c.header["attempt"], c.trailer["attempt"]
	if err == nil {
		c.w.ok.Add(1)
		if len(header) != 1 || len(trailer) != 1 || header[0] != trailer[0] {
			c.errorf("it succeeded with the header of attempt %v and the trailer of attempt %v", header, trailer)
		}
		if server := c.header["server"]; c.peer.Addr == nil || len(server) != 1 || server[0] != c.peer.Addr.String() {
			c.errorf("its peer is %v, and its header of %v", c.peer.Addr, server)
		}
		return
	}
	st := status.Convert(err)
	if of, after, ok := strings.Cut(st.Message(), ", attempt "); ok {
		attempt, _, _ := strings.Cut(after, ";")
		if !strings.HasSuffix(of, "call "+c.id) {
			c.errorf("it has the error of another one: %v", err)
		}
		// At the end of its time a call may return the failure of an attempt without its
		// trailer, which gRPC was still writing.
		switch late := time.Since(c.start) >= c.w.patience; {
		case len(trailer) == 0 && !late:
			c.w.bare.Add(1)
		case len(trailer) == 0:
		case len(trailer) != 1 || trailer[0] != attempt:
			c.errorf("it has the trailer of attempt %v with the error %v", trailer, err)
		}
		return
	}
	switch st.Code() {
	case codes.Canceled:
		if c.quits {
			return
		}
	case codes.DeadlineExceeded, codes.Unavailable: // Of stalls and broken connections.
		return
	}
	c.errorf("it ended with %v, which no server said", err)
}

func (c *caller) unary() error {
	in, out := wrapperspb.Bytes([]byte(stressPayload(c.id, 0, c.size))), new(wrapperspb.BytesValue)
	err := c.conn.Invoke(c.ctx, "/"+stressService+"/Unary", in, out, c.options()...)
	if err == nil && string(out.Value) != string(in.Value) {
		c.errorf("its reply is %.40q, want %.40q", out.Value, in.Value)
	}
	return err
}

func (c *caller) stream(desc *grpc.StreamDesc) error {
	s, err := c.conn.NewStream(c.ctx, desc, "/"+stressService+"/"+desc.StreamName, c.options()...)
	if err != nil {
		return err
	}
	if !desc.ClientStreams {
		c.messages = 1
	}
	var sendErr error
	var beside sync.WaitGroup
	send := func() { sendErr = c.send(s) }
	if c.rng.IntN(3) == 0 || c.size*c.messages > 30_000 {
		beside.Go(send)
	} else {
		send()
	}
	var header metadata.MD
	askHeader := func() {
		md, err := s.Header()
		if err == nil {
			header = md
		}
	}
	switch c.rng.IntN(6) {
	case 0:
		beside.Go(askHeader)
	case 1:
		askHeader()
	}
	var shown context.Context
	if c.rng.IntN(6) == 0 {
		shown = s.Context()
	}
	n, ended := 0, false
	for {
		out := new(wrapperspb.BytesValue)
		if err = s.RecvMsg(out); err != nil {
			break
		}
		ended = ended || shown != nil && shown.Err() != nil && desc.ServerStreams
		if !desc.ServerStreams {
			if answer := string(out.Value); answer != "early" {
				c.answered(answer)
			}
			n++
			break
		}
		if want := stressPayload(c.id, n, c.size); string(out.Value) != want {
			c.errorf("response %d is %.40q, want %.40q", n, out.Value, want)
		}
		n++
	}
	if err == io.EOF {
		err = nil
	}
	if err == nil {
		beside.Wait()
		if ended && c.ctx.Err() == nil {
			c.errorf("it succeeded, but what Context had returned ended before its last message")
		}
		want := c.messages
		if desc.StreamName == "Download" {
			want = 5
		}
		if desc.ServerStreams && n != want {
			c.errorf("it succeeded with %d responses, want %d", n, want)
		}
		if header != nil && len(header["attempt"]) == 1 && len(c.header["attempt"]) == 1 && header["attempt"][0] != c.header["attempt"][0] {
			c.errorf("Header returned that of attempt %v, the option has that of %v", header["attempt"], c.header["attempt"])
		}
		if got := s.Trailer()["attempt"]; len(got) != 1 || len(c.trailer["attempt"]) != 1 || got[0] != c.trailer["attempt"][0] {
			c.errorf("Trailer returned that of attempt %v, the option has that of %v", got, c.trailer["attempt"])
		}
	} else {
		c.check(err) // While the other goroutines still use the stream.
		beside.Wait()
	}
	if sendErr != nil && sendErr != io.EOF {
		c.errorf("SendMsg returned %v", sendErr)
	}
	return err
}

// send sends the messages, all from one buffer, as an upload does.
func (c *caller) send(s grpc.ClientStream) error {
	buf := make([]byte, c.size)
	for i := range c.messages {
		copy(buf, stressPayload(c.id, i, c.size))
		if err := s.SendMsg(&wrapperspb.BytesValue{Value: buf}); err != nil {
			return err
		}
		clear(buf)
	}
	return s.CloseSend()
}

// answered checks the answer to an upload that the server has read whole.
func (c *caller) answered(answer string) {
	if answer != strconv.Itoa(c.messages) {
		c.errorf("the server has received %s messages, want %d", answer, c.messages)
	}
}
