// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"

	"github.com/belfry-go/belfry/interceptor/attempts"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// opaque hides what a connection is.
type opaque struct{ grpc.ClientConnInterface }

// hurried gives the attempts of its streams a timeout.
type hurried struct{ *grpc.ClientConn }

func (l hurried) NewStream(ctx context.Context, desc *grpc.StreamDesc, method string, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	return l.ClientConn.NewStream(ctx, desc, method, append(opts, attempts.Timeout(200*time.Microsecond))...)
}

// However a stream ends, its results are there when its caller is told, and not written
// after it. The race detector is the judge.
func TestResultsAreWrittenBeforeTheEndIsTold(t *testing.T) {
	srv := testserver.New(t, testserver.GRPC(grpc.ChainStreamInterceptor(func(_ any, s grpc.ServerStream, _ *grpc.StreamServerInfo, _ grpc.StreamHandler) error {
		s.SetTrailer(metadata.Pairs("key", "value"))
		for s.Context().Err() == nil {
			if err := s.SendMsg(&testingv1.BidiResponse{}); err != nil {
				return err
			}
			time.Sleep(100 * time.Microsecond)
		}
		return s.Context().Err()
	})))
	rejects := mapping.Response(func(_ context.Context, _ string, m *testingv1.BidiResponse) error {
		return errors.New("rejected")
	})
	lifetime := timeout.Config{Lifetime: time.Hour}
	repeats := retry.Config{AllMethods: true}
	conn := testserver.Dial(t, srv)
	for name, c := range map[string]grpc.ClientConnInterface{
		"a layer":                testserver.Dial(t, srv, calltest.Stack(t, lifetime).DialOptions()...),
		"a retry":                testserver.Dial(t, srv, calltest.Stack(t, lifetime, repeats).DialOptions()...),
		"a short lifetime":       testserver.Dial(t, srv, calltest.Stack(t, timeout.Config{Lifetime: time.Millisecond}).DialOptions()...),
		"a rejected message":     testserver.Dial(t, srv, calltest.Stack(t, rejects).DialOptions()...),
		"an attempt's timeout":   hurried{testserver.Dial(t, srv, calltest.Stack(t).DialOptions()...)},
		"a stack behind another": calltest.Stack(t).Wrap(opaque{calltest.Stack(t, lifetime, repeats).Wrap(conn)}),
		"retries behind a retry": calltest.Stack(t, lifetime, repeats).Wrap(opaque{calltest.Stack(t, lifetime, repeats).Wrap(conn)}),
		"an end behind two":      calltest.Stack(t, repeats).Wrap(opaque{calltest.Stack(t).Wrap(opaque{calltest.Stack(t, repeats).Wrap(conn)})}),
	} {
		t.Run(name, func(t *testing.T) {
			for range 50 {
				ctx, cancel := context.WithCancel(t.Context())
				var h, trailer metadata.MD
				var p peer.Peer
				told := make(chan int, 1)
				s, err := testingv1.NewTestServiceClient(c).Bidi(ctx, grpc.Header(&h), grpc.Trailer(&trailer), grpc.Peer(&p), grpc.OnFinish(func(error) {
					told <- len(h) + len(trailer)
				}))
				if err != nil {
					cancel()
					continue
				}
				time.AfterFunc(time.Millisecond, cancel)
				for err == nil {
					_, err = s.Recv()
				}
				s.Trailer()
				if got, ok := peer.FromContext(s.Context()); ok && p.Addr != got.Addr {
					t.Errorf("the peer is %v, want %v; %v %v %v", p.Addr, got.Addr, err, h, trailer)
				}
				<-told
				cancel()
			}
		})
	}
}
