// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package loadshed_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/layertest"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func shed(t testing.TB, opts ...loadshed.Option) *loadshed.Layer {
	t.Helper()
	l, err := loadshed.New(loadshed.Config{}, opts...)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func limit(t testing.TB, n int64) *concurrency.Layer {
	t.Helper()
	l, err := concurrency.New(concurrency.Config{Limit: n})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// refuses is a gate that is not ready for a reason of its own.
type refuses struct {
	interceptor.GateOnly
	err error
}

func (g *refuses) NewLayer() (interceptor.Layer, error) { return g, nil }

func (g *refuses) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		if w != interceptor.None {
			return errors.New("asked to wait")
		}
		if g.err != nil {
			return g.err
		}
		return inner.Admit(ctx, a, w)
	})
}

func TestReadyAndNotReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		calls := 0
		c := calltest.Stack(t, shed(t), limit(t, 1)).Wrap(calltest.Server(func(context.Context) error {
			calls++
			time.Sleep(time.Second)
			return status.Error(codes.NotFound, "the server's")
		}))
		calltest.Expect(t, calltest.Burst(c, 3),
			calltest.End{After: time.Second, Code: codes.NotFound}, calltest.Refused(0, interceptor.ReasonConcurrency), calltest.Refused(0, interceptor.ReasonConcurrency))
		if calls != 1 {
			t.Errorf("%d calls were sent, want 1", calls)
		}
		calltest.Expect(t, calltest.Burst(c, 1), calltest.End{After: time.Second, Code: codes.NotFound})
	})
}

func TestInnerReasonIsTold(t *testing.T) {
	for _, r := range []interceptor.Reason{
		interceptor.ReasonConcurrency, interceptor.ReasonRateLimit, interceptor.ReasonQueueFull,
		interceptor.ReasonBreakerOpen, "A_REASON_OF_ITS_OWN",
	} {
		inner := interceptor.Refuse("inner", r, "").After(time.Second)
		err := calltest.Stack(t, shed(t), &refuses{err: inner}).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil)
		if err != error(inner) || status.Code(err) != r.Code() {
			t.Errorf("an inner layer that refuses with %s: %v, want its own refusal with %v", r, err, r.Code())
		}
	}
	boom := errors.New("boom")
	err := calltest.Stack(t, shed(t, loadshed.WithName("edge")), &refuses{err: boom}).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil)
	got, ok := interceptor.AsRefusal(err)
	if !ok || got.Reason != interceptor.ReasonShed || got.Layer != "edge" || !errors.Is(err, boom) || status.Code(err) != codes.Unavailable || !got.NotSent() {
		t.Errorf("an inner layer that fails with an error that is no refusal: %v, want SHED around it", err)
	}
}

func TestCallersEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	err := calltest.Stack(t, shed(t), &refuses{err: ctx.Err()}).Wrap(calltest.Takes(0)).Invoke(ctx, calltest.Method, nil, nil)
	if status.Code(err) != codes.Canceled || !errors.Is(err, context.Canceled) {
		t.Errorf("an inner gate that returns the error of the call's context: %v, want CANCELLED", err)
	}
}

func TestUselessPlaceIsAnError(t *testing.T) {
	for _, specs := range [][]interceptor.Spec{{loadshed.Config{}}, {limit(t, 1), loadshed.Config{}}} {
		if _, err := interceptor.NewStack(specs...); err == nil || !strings.Contains(err.Error(), "loadshed") {
			t.Errorf("NewStack with a load shed innermost = %v, want an error that names it", err)
		}
	}
}

// A gate's own status says more than SHED would, and keeps its code under a shed as
// under a buffer.
func TestInnerStatusIsKept(t *testing.T) {
	for _, own := range []error{
		status.Error(codes.ResourceExhausted, "tenant over quota"),
		fmt.Errorf("quota: %w", status.Error(codes.PermissionDenied, "no tenant")),
	} {
		err := calltest.Stack(t, shed(t), &refuses{err: own}).Wrap(calltest.Takes(0)).Invoke(context.Background(), calltest.Method, nil, nil)
		if err != own {
			t.Errorf("a gate that refuses with %v: %v, want that", own, err)
		}
	}
}

func TestConfigErrors(t *testing.T) {
	if _, err := loadshed.New(loadshed.Config{}, loadshed.WithName("")); err == nil || !strings.Contains(err.Error(), `loadshed: WithName is ""`) {
		t.Errorf("New = %v, want an error that names the option", err)
	}
	l := shed(t)
	if err := l.Update(loadshed.Config{}); err != nil || l.Config() != (loadshed.Config{}) || l.String() != "loadshed" {
		t.Errorf("Update = %v, Config() = %+v, String() = %q", err, l.Config(), l)
	}
}

func TestConformance(t *testing.T) {
	layertest.RunStack(t, func() ([]interceptor.Spec, func() error) {
		l := limit(t, 20)
		return []interceptor.Spec{shed(t), l}, func() error {
			if n := l.InUse(); n != 0 {
				return errors.New("permits in use")
			}
			return nil
		}
	})
}

func unary(tb testing.TB) map[string]func() {
	full := limit(tb, 1)
	if err := full.SetLimit(0); err != nil {
		tb.Fatal(err)
	}
	calls := make(map[string]func())
	for name, l := range map[string]interceptor.Layer{"admitted": limit(tb, 1024), "refused": full} {
		ic := calltest.Stack(tb, shed(tb), l).UnaryClientInterceptor()
		calls[name] = func() { ic(context.Background(), calltest.Method, nil, nil, nil, calltest.Noop) }
	}
	return calls
}

func TestAllocations(t *testing.T) {
	for name, call := range unary(t) {
		if n := testing.AllocsPerRun(1000, call); n >= 1 {
			t.Errorf("%s: %v allocations per call, want 0", name, n)
		}
	}
}

func BenchmarkShed(b *testing.B) {
	for name, call := range unary(b) {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				call()
			}
		})
	}
}
