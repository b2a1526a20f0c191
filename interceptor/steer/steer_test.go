// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package steer

import (
	"context"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
	"golang.org/x/sync/semaphore"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const method = "/s/m"

// numbered is a connection that answers with its number.
type numbered int

func (n numbered) Invoke(_ context.Context, _ string, _, reply any, _ ...grpc.CallOption) error {
	*reply.(*int) = int(n)
	return nil
}

func (n numbered) NewStream(context.Context, *grpc.StreamDesc, string, ...grpc.CallOption) (grpc.ClientStream, error) {
	return stream{n: int(n)}, nil
}

type stream struct {
	grpc.ClientStream
	n int
}

// byArgs chooses by the request, and 1 for streams.
func byArgs(_ context.Context, _ string, args any) int {
	if args == nil {
		return 1
	}
	return args.(int)
}

func mustNew(t testing.TB, choose func(context.Context, string, any) int, conns ...grpc.ClientConnInterface) *Steer {
	t.Helper()
	s, err := New(choose, conns...)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func call(t *testing.T, c grpc.ClientConnInterface, args any, want int) {
	t.Helper()
	var got int
	if err := c.Invoke(context.Background(), method, args, &got); err != nil || got != want {
		t.Errorf("a call for connection %v: answered by %d, %v, want %d", args, got, err, want)
	}
}

func TestChosenByNumber(t *testing.T) {
	s := mustNew(t, byArgs, numbered(42), numbered(57))
	call(t, s, 1, 57)
	call(t, s, 0, 42)
	st, err := s.NewStream(context.Background(), &grpc.StreamDesc{}, method)
	if err != nil || st.(stream).n != 57 {
		t.Errorf("a stream: %v, %v, want one of 57", st, err)
	}
}

func TestChosenByKey(t *testing.T) {
	s, err := NewKeyed(func(ctx context.Context, method string, args any) string {
		return method[:2]
	}, map[string]grpc.ClientConnInterface{"/s": numbered(42), "/t": numbered(57)})
	if err != nil {
		t.Fatal(err)
	}
	var got int
	if err := s.Invoke(context.Background(), "/t/m", nil, &got); err != nil || got != 57 {
		t.Errorf("a call of /t/m: answered by %d, %v, want 57", got, err)
	}
	call(t, s, nil, 42)
	err = s.Invoke(context.Background(), "/u/m", nil, nil)
	want := `belfry: steer: NO_ROUTE: "/u" was chosen for /u/m, must be one of 2 keys`
	if err == nil || err.Error() != want {
		t.Errorf("a call of /u/m: %v, want %s", err, want)
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
		s := mustNew(t, byArgs, stack.Wrap(numbered(42)), numbered(57))
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

func TestChoiceOutOfRange(t *testing.T) {
	s := mustNew(t, byArgs, numbered(42), numbered(57))
	for _, i := range []int{-1, 2} {
		err := s.Invoke(context.Background(), method, i, nil)
		r, ok := interceptor.AsRefusal(err)
		if !ok || r.Reason != ReasonNoRoute || !r.NotSent() || status.Code(err) != codes.Internal {
			t.Errorf("choice %d: %v, want a refusal with INTERNAL and reason NO_ROUTE", i, err)
		}
		if err == nil || !strings.Contains(err.Error(), "was chosen for /s/m, must be between 0 and 1") {
			t.Errorf("choice %d: %v, want an error that names the method and the range", i, err)
		}
	}
	one := mustNew(t, byArgs, numbered(42))
	if st, err := one.NewStream(context.Background(), &grpc.StreamDesc{}, method); st != nil || status.Code(err) != codes.Internal {
		t.Errorf("a stream: %v, %v, want INTERNAL", st, err)
	}
}

func TestZeroSteerRefuses(t *testing.T) {
	err := new(Steer).Invoke(context.Background(), method, 0, nil)
	if r, ok := interceptor.AsRefusal(err); !ok || r.Reason != ReasonNoRoute {
		t.Errorf("a call on the zero Steer: %v, want a refusal with reason NO_ROUTE", err)
	}
}

func TestReplace(t *testing.T) {
	s := mustNew(t, byArgs, numbered(0), numbered(1))
	next := mustNew(t, byArgs, numbered(0), numbered(1), numbered(2))
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 1000 {
				call(t, s, 1, 1)
			}
		})
	}
	if err := s.Replace(next); err != nil {
		t.Error(err)
	}
	for _, bad := range []*Steer{nil, new(Steer)} {
		if err := s.Replace(bad); err == nil || !strings.HasPrefix(err.Error(), "steer: by is nil") {
			t.Errorf("Replace(%v): %v, want an error", bad, err)
		}
	}
	call(t, s, 2, 2)
	wg.Wait()
}

func TestConfigErrors(t *testing.T) {
	var nilConn *grpc.ClientConn
	keyed := func(context.Context, string, any) string { return "" }
	for want, f := range map[string]func() (*Steer, error){
		"steer: choose is nil":     func() (*Steer, error) { return New(nil, numbered(1)) },
		"steer: conns is []":       func() (*Steer, error) { return New(byArgs) },
		"steer: conns[1] is nil":   func() (*Steer, error) { return New(byArgs, numbered(1), nilConn) },
		"steer: conns[0] is nil":   func() (*Steer, error) { return New(byArgs, nil) },
		"steer: choose is nil, ":   func() (*Steer, error) { return NewKeyed[string](nil, nil) },
		"steer: conns is map[]":    func() (*Steer, error) { return NewKeyed(keyed, nil) },
		`steer: conns["a"] is nil`: func() (*Steer, error) { return NewKeyed(keyed, map[string]grpc.ClientConnInterface{"a": nil}) },
	} {
		if _, err := f(); err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want an error that begins with %q", err, want)
		}
	}
}

func TestArgumentsAreCopied(t *testing.T) {
	conns := []grpc.ClientConnInterface{numbered(1)}
	s := mustNew(t, byArgs, conns...)
	conns[0] = nil
	call(t, s, 0, 1)
}

func TestAllocations(t *testing.T) {
	s := mustNew(t, func(context.Context, string, any) int { return 1 }, numbered(42), numbered(57))
	ctx, reply := context.Background(), new(int)
	if got := testing.AllocsPerRun(100, func() { s.Invoke(ctx, method, nil, reply) }); got != 0 {
		t.Errorf("%v allocations, want 0", got)
	}
}

func BenchmarkSteer(b *testing.B) {
	s := mustNew(b, func(context.Context, string, any) int { return 1 }, numbered(42), numbered(57))
	ctx, reply := context.Background(), new(int)
	b.ReportAllocs()
	for b.Loop() {
		s.Invoke(ctx, method, nil, reply)
	}
}
