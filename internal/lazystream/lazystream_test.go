// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package lazystream

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// fake says what it was asked to do.
type fake struct {
	grpc.ClientStream
	ctx context.Context
}

func (f *fake) SendMsg(m any) error          { return errors.New("sent " + m.(string)) }
func (f *fake) RecvMsg(m any) error          { return errors.New("received " + m.(string)) }
func (f *fake) CloseSend() error             { return errors.New("closed") }
func (f *fake) Header() (metadata.MD, error) { return nil, errors.New("header") }
func (f *fake) Trailer() metadata.MD         { return metadata.Pairs("k", "v") }
func (f *fake) Context() context.Context     { return f.ctx }

func opened(t *testing.T, s grpc.ClientStream, want context.Context) {
	t.Helper()
	_, err := s.Header()
	if got := errors.Join(err, s.RecvMsg("b"), s.CloseSend()).Error(); got != "header\nreceived b\nclosed" {
		t.Errorf("an open stream answered %q, want the answers of the inner one", got)
	}
	if s.Context() != want || len(s.Trailer()) != 1 {
		t.Errorf("an open stream has context %v and trailer %v, want those of the inner one", s.Context(), s.Trailer())
	}
}

func TestStream(t *testing.T) {
	type key struct{}
	inner := context.WithValue(t.Context(), key{}, 1)
	var got []any
	open := func(req any) (grpc.ClientStream, error) {
		got = append(got, req)
		return &fake{ctx: inner}, nil
	}

	t.Run("opened_by_its_first_message", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			got = nil
			s := New(t.Context(), open)
			if s.Context() != t.Context() || s.Trailer() != nil {
				t.Errorf("before: context %v and trailer %v, want that of the call and none", s.Context(), s.Trailer())
			}
			ends := make(chan error, 2)
			go func() { ends <- s.RecvMsg("early") }()
			go func() { _, err := s.Header(); ends <- err }()
			synctest.Wait()
			if len(ends)+len(got) != 0 {
				t.Error("RecvMsg or Header did not wait for the first message")
			}
			if err := s.SendMsg("a"); err.Error() != "sent a" {
				t.Errorf("SendMsg: %v, want the answer of the inner stream", err)
			}
			<-ends
			<-ends
			opened(t, s, inner)
			s.SendMsg("b")
			if len(got) != 1 || got[0] != "a" {
				t.Errorf("opened with %v, want once, with a", got)
			}
		})
	})

	t.Run("opened_by_CloseSend", func(t *testing.T) {
		got = nil
		s := New(t.Context(), open)
		if err := s.CloseSend(); err.Error() != "closed" {
			t.Errorf("CloseSend: %v, want the answer of the inner stream", err)
		}
		opened(t, s, inner)
		if len(got) != 1 || got[0] != nil {
			t.Errorf("opened with %v, want once, with nil", got)
		}
	})

	t.Run("error_of_opening_is_that_of_the_stream", func(t *testing.T) {
		refused := errors.New("refused")
		s := New(t.Context(), func(any) (grpc.ClientStream, error) { return nil, refused })
		for range 2 {
			if err := s.SendMsg("a"); err != refused {
				t.Errorf("SendMsg: %v, want %v", err, refused)
			}
		}
		if _, header := s.Header(); header != refused || s.RecvMsg("a") != refused || s.CloseSend() != refused {
			t.Errorf("Header: %v, want %v, as of RecvMsg and CloseSend", header, refused)
		}
		if s.Context() != t.Context() || s.Trailer() != nil {
			t.Errorf("context %v and trailer %v, want that of the call and none", s.Context(), s.Trailer())
		}
	})

	t.Run("panic_of_opening_leaves_nobody_waiting", func(t *testing.T) {
		s := New(t.Context(), func(any) (grpc.ClientStream, error) { panic("boom") })
		func() {
			defer func() { recover() }()
			s.SendMsg("a")
		}()
		if err := s.RecvMsg("a"); status.Code(err) != codes.Internal {
			t.Errorf("RecvMsg: %v, want INTERNAL", err)
		}
	})

	t.Run("waits_as_long_as_its_context", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := New(ctx, open).RecvMsg("a"); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("RecvMsg: %v, want DEADLINE_EXCEEDED", err)
			}
		})
	})
}
