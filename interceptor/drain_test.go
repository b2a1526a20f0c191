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
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

func TestDrain(t *testing.T) {
	t.Run("refuses_new_calls_and_waits_for_those_in_flight", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := calltest.Stack(t, newLimit("limit", 1))
			c := s.Wrap(calltest.Takes(time.Second))
			start := time.Now()
			ends := calltest.Begin(c, 2) // One runs, one waits.
			ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
			defer cancel()
			if err := s.Drain(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "1 calls") {
				t.Errorf("Drain with a short deadline: %v, want 1 call in flight and the deadline", err)
			}
			err := c.Invoke(context.Background(), calltest.Method, nil, nil)
			if status.Code(err) != codes.Unavailable || calltest.Reason(err) != interceptor.ReasonDrain {
				t.Errorf("a call to a draining stack: %v, want UNAVAILABLE and DRAIN", err)
			}
			if err := s.Drain(context.Background()); err != nil || time.Since(start) != time.Second {
				t.Errorf("Drain returned %v after %v, want nil after 1s", err, time.Since(start))
			}
			calltest.Expect(t, ends(), calltest.OK(time.Second), calltest.Refused(0, interceptor.ReasonDrain))
			if err := s.Drain(context.Background()); err != nil {
				t.Errorf("Drain again: %v", err)
			}
		})
	})

	t.Run("refused_call_is_finished", func(t *testing.T) {
		s := calltest.Stack(t)
		if err := s.Drain(context.Background()); err != nil {
			t.Fatal(err)
		}
		var finished []interceptor.Reason
		opt := grpc.OnFinish(func(err error) { finished = append(finished, calltest.Reason(err)) })
		c := s.Wrap(&conn{})
		c.Invoke(context.Background(), calltest.Method, nil, nil, opt)
		c.NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method, opt)
		if want := []interceptor.Reason{interceptor.ReasonDrain, interceptor.ReasonDrain}; !slices.Equal(finished, want) {
			t.Errorf("OnFinish saw %q, want %q", finished, want)
		}
	})

	t.Run("waits_for_streams", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c := &conn{stream: func(ctx context.Context, _ *grpc.StreamDesc, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
				return &scriptStream{ctx: ctx, errs: []error{nil, io.EOF}}, nil
			}}
			s := calltest.Stack(t, newLimit("limit", 1), &passToy{})
			st, err := s.Wrap(c).NewStream(context.Background(), &grpc.StreamDesc{ServerStreams: true}, calltest.Method)
			if err != nil {
				t.Fatal(err)
			}
			drained := make(chan error, 1)
			go func() { drained <- s.Drain(context.Background()) }()
			if err := st.RecvMsg(nil); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if len(drained) != 0 {
				t.Fatal("Drain returned while a stream is open")
			}
			if err := st.RecvMsg(nil); err != io.EOF {
				t.Fatal(err)
			}
			if err := <-drained; err != nil {
				t.Error(err)
			}
		})
	})
}
