// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// byName chooses the list by the method's name.
func byName(methods ...string) func(string) int {
	return func(method string) int {
		for i, m := range methods {
			if m == method {
				return i
			}
		}
		return -1
	}
}

func TestPrepareByMethod(t *testing.T) {
	log := &eventLog{}
	a, b := &logToy{name: "a", log: log}, &logToy{name: "b", log: log}
	both := &logToy{name: "both", log: log}
	s := calltest.Stack(t)
	commit, err := s.PrepareByMethod(byName("/s/a", "/s/b"), []interceptor.Layer{both, a}, []interceptor.Layer{both, b})
	if err != nil {
		t.Fatalf("PrepareByMethod: %v", err)
	}
	if got := s.Layers(); len(got) != 0 {
		t.Errorf("Layers() = %v before commit, want none", got)
	}
	commit()
	unary, stream := s.UnaryClientInterceptor(), s.StreamClientInterceptor()
	opens := func(ctx context.Context, _ *grpc.StreamDesc, _ *grpc.ClientConn, _ string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
		return nil, context.Canceled
	}
	for method, want := range map[string]string{
		"/s/a": "a 0 ok OK,both 0 ok OK,a 0 failed Unknown,both 0 failed Unknown",
		"/s/b": "b 0 ok OK,both 0 ok OK,b 0 failed Unknown,both 0 failed Unknown",
		"/s/c": "",
	} {
		if err := unary(t.Context(), method, nil, nil, nil, calltest.Noop); err != nil {
			t.Errorf("%s: a unary call: %v", method, err)
		}
		if _, err := stream(t.Context(), &grpc.StreamDesc{ServerStreams: true}, nil, method, opens); err == nil {
			t.Errorf("%s: a stream that cannot be opened returned no error", method)
		}
		if got := strings.Join(log.take(), ","); got != want {
			t.Errorf("%s: the layers saw %q, want %q", method, got, want)
		}
	}
	if n := s.InFlight(); n != 0 {
		t.Errorf("InFlight() = %d at rest, want 0", n)
	}
	if got, want := len(s.Layers()), 4; got != want {
		t.Errorf("len(Layers()) = %d, want %d", got, want)
	}
	if err := s.Drain(t.Context()); err != nil {
		t.Fatalf("Drain: %v", err)
	}
	if err := unary(t.Context(), "/s/c", nil, nil, nil, calltest.Noop); err == nil {
		t.Errorf("a call without layers was admitted by a stack that drains")
	}
}

func TestPrepareByMethod_BadListsChangeNothing(t *testing.T) {
	l := &gateToy{}
	s := calltest.Stack(t, l)
	before := s.String()
	if _, err := s.PrepareByMethod(nil, []interceptor.Layer{l}); err == nil {
		t.Errorf("PrepareByMethod without choose returned no error")
	}
	_, err := s.PrepareByMethod(byName("/s/a"), []interceptor.Layer{l}, []interceptor.Layer{l, l})
	if err == nil || !strings.Contains(err.Error(), "list 1") {
		t.Errorf("a layer twice in list 1: error %v, want one that names the list", err)
	}
	if got := s.String(); got != before {
		t.Errorf("after errors the stack is %s, want %s as before", got, before)
	}
}
