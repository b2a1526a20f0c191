// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const method = "/s/m"

// numbered is a connection that answers with its number.
type numbered int

func (n numbered) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	*reply.(*int) = int(n)
	return nil
}

func (n numbered) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return stream{}, nil
}

// byArgs chooses by the request, and 1 where there is none.
func byArgs(_ context.Context, _ string, args any) (context.Context, int, error) {
	if args == nil {
		return nil, 1, nil
	}
	return nil, args.(int), nil
}

type conns = map[int]grpc.ClientConnInterface

func mustNew(t testing.TB, choose Choose[int], c conns) *Steer[int] {
	t.Helper()
	s, err := New(choose, c)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func mustUpdate(t testing.TB, s *Steer[int], c conns) <-chan struct{} {
	t.Helper()
	free, err := s.Update(c)
	if err != nil {
		t.Fatal(err)
	}
	return free
}

func call(t *testing.T, c grpc.ClientConnInterface, args any, want int) {
	t.Helper()
	var got int
	if err := c.Invoke(context.Background(), method, args, &got); err != nil || got != want {
		t.Errorf("a call for connection %v: answered by %d, %v, want %d", args, got, err, want)
	}
}

func TestChosenByKey(t *testing.T) {
	s := mustNew(t, byArgs, conns{0: numbered(42), 1: numbered(57)})
	call(t, s, 1, 57)
	call(t, s, 0, 42)
	if got := slices.Collect(s.Conns()); len(got) != 2 {
		t.Errorf("Conns has %v, want 2", got)
	}
}

func TestStreamsAreChosen(t *testing.T) {
	a, b := &streams{}, &streams{}
	s := mustNew(t, byArgs, conns{0: a, 1: b})
	for _, desc := range []*grpc.StreamDesc{{ClientStreams: true}, {ClientStreams: true, ServerStreams: true}} {
		if _, err := s.NewStream(t.Context(), desc, method); err != nil {
			t.Fatal(err)
		}
	}
	if a.opened != 0 || b.opened != 2 {
		t.Errorf("%d and %d streams were opened, want both at the connection for no request", a.opened, b.opened)
	}
	st, err := s.NewStream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, method)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.SendMsg(0); err != nil || a.opened != 1 {
		t.Errorf("SendMsg: %v, %d streams opened, want the one that the request chooses", err, a.opened)
	}
}

// streams is a connection whose streams last until they are read.
type streams struct {
	grpc.ClientConnInterface
	opened int
}

func (c *streams) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	c.opened++
	return stream{}, nil
}

type stream struct{ grpc.ClientStream }

func (stream) SendMsg(any) error { return nil }
func (stream) RecvMsg(any) error { return io.EOF }

// The stub of a server that streams sends its request by itself, through a stack too.
func TestServerStreamIsSteeredByItsRequest(t *testing.T) {
	servers := map[string]*testserver.Server{}
	to := map[string]grpc.ClientConnInterface{}
	for _, name := range []string{"a", "b"} {
		servers[name] = testserver.New(t, testserver.InMemory())
		cc, err := servers[name].NewClient()
		if err != nil {
			t.Fatal(err)
		}
		defer cc.Close()
		to[name] = cc
	}
	s, err := New(func(_ context.Context, _ string, args any) (context.Context, string, error) {
		m, ok := args.(*testingv1.ServerStreamRequest)
		if !ok {
			return nil, "", status.Errorf(codes.Unimplemented, "%T", args)
		}
		return nil, string(m.GetPayload()), nil
	}, to)
	if err != nil {
		t.Fatal(err)
	}
	count, seen := &calltest.Counter{}, &outcome{}
	client := testingv1.NewTestServiceClient(calltest.Stack(t, count, seen).Wrap(s))
	receive := func(payload string) (n int, err error) {
		st, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Payload: []byte(payload)})
		for err == nil {
			if _, err = st.Recv(); err == nil {
				n++
			}
		}
		return n, err
	}
	for name, srv := range servers {
		before := srv.Stats().Started
		if n, err := receive(name); n != 1 || err != io.EOF || srv.Stats().Started != before+1 {
			t.Errorf("%s: %d messages, %v, %d calls arrived, want one of each", name, n, err, srv.Stats().Started-before)
		}
	}
	if _, err := receive("c"); status.Code(err) != codes.Internal {
		t.Errorf("a request for nobody: %v, want INTERNAL", err)
	}
	if seen.last != interceptor.NotSent {
		t.Errorf("a request for nobody ended as %v, want not_sent", seen.last)
	}
	if _, err := client.Bidi(t.Context()); status.Code(err) != codes.Unimplemented {
		t.Errorf("a stream without a request: %v, want the error of the function", err)
	}
	if err := count.AtRest(); err != nil {
		t.Error(err)
	}
}

// outcome is a layer that keeps how the last call ended.
type outcome struct {
	interceptor.GateOnly
	last interceptor.Outcome
}

func (o *outcome) NewLayer() (interceptor.Layer, error) { return o, nil }

func (o *outcome) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		a.Hold(o, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (o *outcome) Release(_ int64, e interceptor.End) { o.last = e.Outcome }

func TestChooseMayRefuse(t *testing.T) {
	plain, ctx := errors.New("no tenant"), context.Background()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	for _, tc := range []struct {
		ctx    context.Context
		err    error
		code   codes.Code
		reason interceptor.Reason
	}{
		{ctx, plain, codes.InvalidArgument, ReasonNoRoute},
		{ctx, status.Error(codes.PermissionDenied, "not yours"), codes.PermissionDenied, ReasonNoRoute},
		{ended, fmt.Errorf("looking it up: %w", context.Canceled), codes.Canceled, interceptor.ReasonCancelled},
	} {
		s := mustNew(t, func(context.Context, string, any) (context.Context, int, error) { return nil, 0, tc.err }, conns{0: numbered(1)})
		err := s.Invoke(tc.ctx, method, nil, nil)
		r, ok := interceptor.AsRefusal(err)
		if !ok || r.Reason != tc.reason || !r.NotSent() || status.Code(err) != tc.code {
			t.Errorf("%v: %v, want a refusal with %v and reason %v", tc.err, err, tc.code, tc.reason)
		}
		if tc.reason == ReasonNoRoute && !errors.Is(err, tc.err) {
			t.Errorf("%v does not wrap %v", err, tc.err)
		}
	}
}

func TestChooseMayChangeTheContext(t *testing.T) {
	type key struct{}
	calls := 0
	seen := calltest.Server(func(ctx context.Context) error {
		calls++
		if ctx.Value(key{}) != "found" {
			t.Errorf("the connection was called with %v, want the context of the function", ctx)
		}
		return nil
	})
	s := mustNew(t, func(ctx context.Context, _ string, _ any) (context.Context, int, error) {
		return context.WithValue(ctx, key{}, "found"), 0, nil
	}, conns{0: seen})
	s.Invoke(t.Context(), method, nil, nil)
	s.NewStream(t.Context(), &grpc.StreamDesc{ClientStreams: true}, method)
	if calls != 2 {
		t.Errorf("%d calls, want 2", calls)
	}
}

// Tower's steer is not ready before all its services are, also those that the
// call is not for.
func TestOnlyChosenHasToBeReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		sem := semaphore.NewWeighted(1)
		stack, err := interceptor.NewStack(adapt.FromSemaphore("limit", sem))
		if err != nil {
			t.Fatal(err)
		}
		s := mustNew(t, byArgs, conns{0: stack.Wrap(numbered(42)), 1: numbered(57)})
		sem.TryAcquire(1) // 42 is full.
		call(t, s, 1, 57)
		err = s.Invoke(context.Background(), method, 0, new(int), interceptor.WithWait(interceptor.None))
		if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != interceptor.ReasonConcurrency {
			t.Errorf("a call for the full one: %v, want the refusal of its limit", err)
		}
		done := make(chan struct{})
		go func() { call(t, s, 0, 42); close(done) }()
		synctest.Wait()
		select {
		case <-done:
			t.Error("a call for the full one did not wait")
		default:
		}
		sem.Release(1)
		<-done
	})
}

func TestChoiceOfNothing(t *testing.T) {
	s := mustNew(t, byArgs, conns{0: numbered(42)})
	err := s.Invoke(context.Background(), method, 2, nil)
	want := "belfry: steer: NO_ROUTE: 2 was chosen for /s/m, must be one of 1 keys"
	r, ok := interceptor.AsRefusal(err)
	if !ok || r.Reason != ReasonNoRoute || !r.NotSent() || status.Code(err) != codes.Internal || err.Error() != want {
		t.Errorf("%v, want a refusal with INTERNAL that says %s", err, want)
	}
	if st, err := s.NewStream(context.Background(), &grpc.StreamDesc{}, method); st != nil || status.Code(err) != codes.Internal {
		t.Errorf("a stream: %v, %v, want INTERNAL", st, err)
	}
}

func TestZeroSteerRefuses(t *testing.T) {
	s := new(Steer[int])
	if r, ok := interceptor.AsRefusal(s.Invoke(context.Background(), method, 0, nil)); !ok || r.Reason != ReasonNoRoute {
		t.Errorf("a call on the zero Steer: %v, want a refusal with reason NO_ROUTE", r)
	}
	if _, err := s.Update(conns{0: numbered(1)}); err == nil {
		t.Error("Update of the zero Steer: no error")
	}
}

// Calls and streams of the connection that is taken out are waited for, those of others
// are not.
func TestUpdateSaysWhatIsFree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, kept := calltest.Takes(time.Minute), &streams{}
		gone := &streams{ClientConnInterface: slow}
		s := mustNew(t, byArgs, conns{0: gone, 1: kept})
		began := time.Now()
		go s.Invoke(context.Background(), method, 0, nil)
		synctest.Wait()
		one := mustUpdate(t, s, conns{1: kept, 2: gone, 3: gone})
		<-one // The same connection with another key is not replaced.
		open := func(to any) grpc.ClientStream {
			st, err := s.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, method)
			if err == nil {
				err = st.SendMsg(to)
			}
			if err != nil {
				t.Fatal(err)
			}
			return st
		}
		st := open(3)
		defer open(1).RecvMsg(nil)
		free := mustUpdate(t, s, conns{1: kept})
		if err := s.Invoke(context.Background(), method, 2, nil); status.Code(err) != codes.Internal {
			t.Errorf("a call of a key that is gone: %v, want INTERNAL", err)
		}
		isFree := func(want bool) {
			t.Helper()
			synctest.Wait()
			select {
			case <-free:
				if !want {
					t.Errorf("free after %v, want not yet", time.Since(began))
				}
			default:
				if want {
					t.Errorf("not free after %v", time.Since(began))
				}
			}
		}
		isFree(false)
		time.Sleep(time.Minute)
		isFree(false)
		st.RecvMsg(nil)
		isFree(true)
	})
}

// While connections are replaced no call fails, and none is on a connection that is free.
func TestUpdateWhileCallsRun(t *testing.T) {
	s := mustNew(t, byArgs, conns{0: &closable{}})
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				if err := s.Invoke(t.Context(), method, 0, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for range 1000 {
		old := (*s.table.Load())[0].conn.(*closable)
		<-mustUpdate(t, s, conns{0: &closable{}})
		old.closed.Store(true)
	}
	cancel()
	wg.Wait()
}

// closable is a connection that fails once it is closed.
type closable struct {
	grpc.ClientConnInterface
	closed atomic.Bool
}

func (c *closable) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	runtime.Gosched()
	if c.closed.Load() {
		return errors.New("called though it is free")
	}
	return nil
}

func TestConfigErrors(t *testing.T) {
	var nilConn *grpc.ClientConn
	for want, f := range map[string]func() (*Steer[int], error){
		"steer: choose is nil":   func() (*Steer[int], error) { return New(nil, conns{0: numbered(1)}) },
		"steer: conns is map[]":  func() (*Steer[int], error) { return New(byArgs, nil) },
		"steer: conns[1] is nil": func() (*Steer[int], error) { return New(byArgs, conns{0: numbered(1), 1: nilConn}) },
		"steer: conns[0] is nil": func() (*Steer[int], error) { return New(byArgs, conns{0: nil}) },
		"steer: conns is map[], ": func() (*Steer[int], error) {
			s := mustNew(t, byArgs, conns{0: numbered(1)})
			_, err := s.Update(nil)
			call(t, s, 0, 1)
			return nil, err
		},
	} {
		if _, err := f(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want an error that begins with %q", err, want)
		}
	}
}

func TestArgumentsAreCopied(t *testing.T) {
	c := conns{0: numbered(1)}
	s := mustNew(t, byArgs, c)
	c[0] = nil
	call(t, s, 0, 1)
}

// uncomparable is a connection that cannot be told from others.
type uncomparable struct {
	grpc.ClientConnInterface
	_ []int
}

func TestUncomparableConnections(t *testing.T) {
	s := mustNew(t, byArgs, conns{0: uncomparable{ClientConnInterface: numbered(1)}})
	<-mustUpdate(t, s, conns{0: uncomparable{ClientConnInterface: numbered(2)}})
	call(t, s, 0, 2)
}

func TestAllocations(t *testing.T) {
	s := mustNew(t, byArgs, conns{0: numbered(42), 1: numbered(57)})
	ctx, reply := context.Background(), new(int)
	if got := testing.AllocsPerRun(100, func() { s.Invoke(ctx, method, nil, reply) }); got != 0 {
		t.Errorf("%v allocations, want 0", got)
	}
}

func BenchmarkSteer(b *testing.B) {
	s := mustNew(b, byArgs, conns{0: numbered(42), 1: numbered(57)})
	ctx, reply := context.Background(), new(int)
	b.ReportAllocs()
	for b.Loop() {
		s.Invoke(ctx, method, nil, reply)
	}
}
