// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry_test

import (
	"context"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// Clients that a server told the same do not come back together. A draw is uniform on
// 250 ms, so that 200 of them lie within 150 ms by chance has a probability of 1e-42.
func TestServerDelay_spread(t *testing.T) {
	for name, pushback := range map[string]metadata.MD{"RetryInfo": nil, "pushback": metadata.Pairs("grpc-retry-pushback-ms", "500")} {
		synctest.Test(t, func(t *testing.T) {
			l := mustNew(t, retry.Config{MaxAttempts: 2})
			var at []time.Duration
			for range 200 {
				s := always(t, retryInfo(t, codes.Unavailable, 500*time.Millisecond), pushback)
				s.call(t.Context(), nil, l)
				if s.attempts() == 2 {
					at = append(at, s.at[1].Sub(s.at[0]))
				}
			}
			lo, hi := slices.Min(at), slices.Max(at)
			if pushback != nil && (lo != 500*time.Millisecond || hi != lo) {
				t.Errorf("%s: attempts after %v to %v, want exactly 500ms", name, lo, hi)
			}
			if pushback == nil && (lo < 500*time.Millisecond || hi > 750*time.Millisecond || hi-lo < 150*time.Millisecond) {
				t.Errorf("%s: %d attempts after %v to %v, want them spread over 500 to 750ms", name, len(at), lo, hi)
			}
		})
	}
}

func TestListedResourceExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := quick
		c.Codes = []codes.Code{codes.ResourceExhausted}
		s := always(t, status.Error(codes.ResourceExhausted, "busy"), nil)
		if s.call(t.Context(), nil, mustNew(t, c)); s.attempts() != 3 {
			t.Errorf("%d attempts of a call that fails with a listed RESOURCE_EXHAUSTED, want 3", s.attempts())
		}
		for _, text := range []string{"trying to send message larger than max (9 vs. 8)", "grpc: received message larger than max (9 vs. 8)"} {
			s := always(t, status.Error(codes.ResourceExhausted, text), nil)
			if s.call(t.Context(), nil, mustNew(t, c)); s.attempts() != 1 {
				t.Errorf("%d attempts of a call that fails with %q, want one", s.attempts(), text)
			}
		}
	})
}

func TestDecision(t *testing.T) {
	const most, deadline = time.Minute, 2 * time.Minute
	info := retryInfo(t, codes.Unavailable, 20*time.Millisecond)
	for _, tc := range []struct {
		name     string
		err      error
		pushback string
		d        retry.Decision
		want     []time.Duration // Between attempts, in ms.
	}{
		{"after_the_back_off", unavailable, "", retry.Decision{Repeat: true}, []time.Duration{10, 20}},
		{"after_more", unavailable, "", retry.Decision{Repeat: true, After: 15 * time.Millisecond}, []time.Duration{15, 20}},
		{"exactly", unavailable, "", retry.Decision{Repeat: true, After: time.Millisecond, Exact: true}, []time.Duration{1, 1}},
		{"at_once", unavailable, "", retry.Decision{Repeat: true, Exact: true}, []time.Duration{0, 0}},
		{"not_before_RetryInfo", info, "", retry.Decision{Repeat: true}, []time.Duration{20, 20}},
		{"exactly_before_RetryInfo", info, "", retry.Decision{Repeat: true, Exact: true}, []time.Duration{0, 0}},
		{"not_before_pushback", unavailable, "7", retry.Decision{Repeat: true, Exact: true}, []time.Duration{7, 7}},
		{"after_more_than_MaxServerDelay", unavailable, "", retry.Decision{Repeat: true, After: most + 1}, nil},
		{"after_the_deadline", unavailable, "", retry.Decision{Repeat: true, After: deadline}, nil},
		{"not", unavailable, "", retry.Decision{After: 1, Safe: true}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := quick
				if c.MaxServerDelay = most; tc.d.After == deadline {
					c.MaxServerDelay = time.Hour
				}
				var trailer metadata.MD
				if tc.pushback != "" {
					trailer = metadata.Pairs("grpc-retry-pushback-ms", tc.pushback)
				}
				ctx, cancel := context.WithTimeout(t.Context(), deadline)
				defer cancel()
				s := always(t, tc.err, trailer)
				start := time.Now()
				s.call(ctx, nil, mustNew(t, c, retry.WithPolicy(func(context.Context, *retry.Attempt) retry.Decision { return tc.d })))
				took := time.Since(start)
				var got []time.Duration
				for i := 1; i < len(s.at); i++ {
					got = append(got, s.at[i].Sub(s.at[i-1])/time.Millisecond)
				}
				if !slices.Equal(got, tc.want) {
					t.Errorf("waits of %v ms, want %v", got, tc.want)
				}
				if last := s.at[len(s.at)-1]; !last.Equal(start.Add(took)) {
					t.Errorf("the call ended %v after its last attempt, want at once", took-last.Sub(start))
				}
			})
		})
	}
}

// A policy may know that an attempt was not carried out, whatever its method.
func TestDecision_safe(t *testing.T) {
	for _, safe := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			c := quick
			c.Methods = []string{}
			s := fails(t, unavailable)
			s.call(t.Context(), nil, mustNew(t, c, retry.WithPolicy(func(_ context.Context, a *retry.Attempt) retry.Decision {
				d := a.Default
				d.Safe = safe
				return d
			})))
			if got := s.attempts() == 2; got != safe {
				t.Errorf("with Safe = %v the attempt is repeated: %v", safe, got)
			}
		})
	}
}

// The same of a stream.
func TestDecision_safeStream(t *testing.T) {
	srv := testserver.New(t)
	for safe, want := range map[bool]int{false: 1, true: 3} {
		c := quick
		c.Methods = []string{}
		asked := 0
		l := mustNew(t, c, retry.WithPolicy(func(context.Context, *retry.Attempt) retry.Decision {
			asked++
			return retry.Decision{Repeat: true, Exact: true, Safe: safe}
		}))
		stream, err := testingv1.NewTestServiceClient(calltest.Stack(t, l).Wrap(testserver.Dial(t, srv))).ServerStream(t.Context(), &testingv1.ServerStreamRequest{
			Behaviour: &testingv1.Behaviour{Status: &testingv1.Status{Code: int32(codes.Unavailable)}, ResponseCount: proto.Int32(0)},
		})
		if err != nil {
			t.Fatal(err)
		}
		_, err = stream.Recv()
		if r, refused := interceptor.AsRefusal(err); status.Code(err) != codes.Unavailable || asked != want || refused != !safe || refused && r.Reason != interceptor.ReasonNotIdempotent {
			t.Errorf("with Safe = %v: %v after %d attempts, want UNAVAILABLE after %d", safe, err, asked, want)
		}
	}
}

// On a real connection a policy sees what the server sent.
func TestAttemptSeen(t *testing.T) {
	srv := testserver.New(t)
	var seen []retry.Attempt
	l := mustNew(t, quick, retry.WithPolicy(func(_ context.Context, a *retry.Attempt) retry.Decision {
		seen = append(seen, *a)
		return retry.Decision{Repeat: a.Err != nil, Exact: true}
	}))
	conn := calltest.Stack(t, l).Wrap(testserver.Dial(t, srv))
	client := testingv1.NewTestServiceClient(conn)
	fail := &testingv1.Behaviour{
		Status:          &testingv1.Status{Code: int32(codes.Unavailable)},
		ResponseHeaders: map[string]string{"k": "header"}, ResponseTrailers: map[string]string{"k": "trailer"}, HeadersBeforeFailure: true, ResponseCount: proto.Int32(0),
	}
	check := func(kind interceptor.Kind) {
		t.Helper()
		if len(seen) != 3 {
			t.Fatalf("%v: the policy was asked %d times, want 3", kind, len(seen))
		}
		for i, a := range seen {
			h, tr := a.Header.Get("k"), a.Trailer.Get("k")
			if a.N != i+1 || a.Kind != kind || a.Outcome != interceptor.Failed || a.Elapsed <= 0 || !a.Default.Repeat || !slices.Equal(h, []string{"header"}) || !slices.Equal(tr, []string{"trailer"}) {
				t.Errorf("%v: attempt %d was seen as %+v, want it sent, with header and trailer", kind, i+1, a)
			}
		}
		seen = nil
	}
	client.Unary(t.Context(), &testingv1.UnaryRequest{Behaviour: fail})
	check(interceptor.Unary)
	stream, err := client.ServerStream(t.Context(), &testingv1.ServerStreamRequest{Behaviour: fail})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the stream ended with %v, want UNAVAILABLE", err)
	}
	check(interceptor.ServerStream)

	err = conn.Invoke(t.Context(), testingv1.TestService_Unary_FullMethodName, wrapperspb.Bytes(make([]byte, 100)), new(testingv1.UnaryResponse), grpc.MaxCallSendMsgSize(10))
	if len(seen) != 3 || seen[0].Outcome != interceptor.NotSent || len(seen[0].Header)+len(seen[0].Trailer) != 0 || seen[0].Default.Repeat {
		t.Errorf("an attempt that gRPC could not send was seen as %+v with error %v, want it not sent and not repeated by default", seen, err)
	}
	seen = nil
	srv.Stop()
	for range 10 { // The connection may not know yet.
		client.Unary(t.Context(), &testingv1.UnaryRequest{})
	}
	if n := len(seen); n == 0 || seen[n-1].Outcome != interceptor.NotConnected || !seen[n-1].Default.Repeat {
		t.Errorf("attempts without a connection were seen as %+v, want them not connected and repeated by default", seen)
	}
}

// A reply that the policy takes for a failure does not become a success because there may
// be no further attempt.
func TestPolicy_errorOfTheLastAttempt(t *testing.T) {
	incomplete := status.Error(codes.DataLoss, "incomplete")
	policy := func(_ context.Context, a *retry.Attempt) retry.Decision {
		a.Err = incomplete
		return retry.Decision{Repeat: true}
	}
	for name, tc := range map[string]struct {
		change func(*retry.Config)
		limit  time.Duration // Of the call.
		want   int
	}{
		"number":   {func(c *retry.Config) { c.MaxAttempts = 2 }, time.Hour, 2},
		"budget":   {func(c *retry.Config) { c.Budget = budget.Config{MinPerSecond: 0.1, Ratio: budget.None} }, time.Hour, 2},
		"method":   {func(c *retry.Config) { c.Methods = []string{} }, time.Hour, 1},
		"deadline": {func(*retry.Config) {}, 15 * time.Millisecond, 2}, // Back-offs of 10 and 20 ms.
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), tc.limit)
			defer cancel()
			c := quick
			tc.change(&c)
			s := fails(t)
			if _, err := s.call(ctx, nil, mustNew(t, c, retry.WithPolicy(policy))); status.Convert(err).Message() != "incomplete" || s.attempts() != tc.want {
				t.Errorf("%s: %d attempts, %v; want %d and the policy's error", name, s.attempts(), err, tc.want)
			}
		})
	}
	// A failure that it takes for a success is one.
	synctest.Test(t, func(t *testing.T) {
		c := quick
		c.MaxAttempts = 1
		forgive := func(_ context.Context, a *retry.Attempt) retry.Decision {
			a.Err = nil
			return retry.Decision{Repeat: true}
		}
		s := fails(t, unavailable)
		if _, err := s.call(t.Context(), nil, mustNew(t, c, retry.WithPolicy(forgive))); err != nil {
			t.Errorf("got %v, want the success that the policy makes of it", err)
		}
	})
}
