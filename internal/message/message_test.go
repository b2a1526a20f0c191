// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package message

import (
	"maps"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

func TestACopyOfAProtocolBufferReplacesWhatWasThere(t *testing.T) {
	src, dst := wrapperspb.Int32(0), wrapperspb.Int32(7)
	if n := NewLike(dst).(*wrapperspb.Int32Value); n == dst || n.Value != 0 {
		t.Errorf("NewLike = %v, want a new, empty message", n)
	}
	CopyInto(dst, src)
	if !proto.Equal(dst, src) {
		t.Errorf("copied %v, want %v", dst, src)
	}
}

func TestADynamicMessageKeepsItsType(t *testing.T) {
	m := dynamicpb.NewMessage((*wrapperspb.StringValue)(nil).ProtoReflect().Descriptor())
	if err := proto.Unmarshal([]byte("\x0a\x01x"), m); err != nil {
		t.Fatal(err)
	}
	n := NewLike(m).(*dynamicpb.Message)
	if n.Descriptor() != m.Descriptor() || proto.Size(n) != 0 {
		t.Errorf("NewLike = %v of %v, want an empty message of %v", n, n.Descriptor(), m.Descriptor())
	}
	if CopyInto(n, m); !proto.Equal(n, m) {
		t.Errorf("copied %v, want %v", n, m)
	}
}

// The race detector is the judge.
func TestAMessageIsMadeLikeOneThatIsBeingWritten(t *testing.T) {
	m := new(wrapperspb.StringValue)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 100 {
			if err := proto.Unmarshal([]byte("\x0a\x01x"), m); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 100 {
		NewLike(m)
	}
	<-done
}

func TestACopyOfOtherMessagesReplacesWhatWasThere(t *testing.T) {
	type msg struct{ A, B int }
	dst := &msg{A: 1}
	src := NewLike(dst).(*msg)
	src.B = 2
	if CopyInto(dst, src); *dst != (msg{B: 2}) {
		t.Errorf("copied %+v, want %+v", *dst, msg{B: 2})
	}
	m := map[string]int{"old": 1}
	n := NewLike(m).(map[string]int)
	n["new"] = 2
	if CopyInto(m, n); !maps.Equal(m, n) {
		t.Errorf("copied %v, want %v", m, n)
	}
	if got := NewLike(nil); got != nil {
		t.Errorf("NewLike(nil) = %v, want nil", got)
	}
	CopyInto(nil, nil) // A call without a reply.
}
