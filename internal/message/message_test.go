// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package message

import (
	"maps"
	"reflect"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// A copy of a protocol buffer replaces what was there.
func TestCopyReplacesProto(t *testing.T) {
	src, dst := wrapperspb.Int32(0), wrapperspb.Int32(7)
	if n := NewLike(dst).(*wrapperspb.Int32Value); n == dst || n.Value != 0 {
		t.Errorf("NewLike = %v, want a new, empty message", n)
	}
	CopyInto(dst, src)
	if !proto.Equal(dst, src) {
		t.Errorf("copied %v, want %v", dst, src)
	}
}

// What a message refers to is not copied, so that a large reply costs what a small one does.
func TestCopyLargeProto(t *testing.T) {
	src := protodesc.ToFileDescriptorProto(wrapperspb.File_google_protobuf_wrappers_proto)
	src.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5000, protowire.VarintType), 7))
	src.Options.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5000, protowire.VarintType), 8))
	want, dst := proto.CloneOf(src), &descriptorpb.FileDescriptorProto{Name: proto.String("before"), Edition: descriptorpb.Edition_EDITION_2023.Enum()}
	CopyInto(dst, src)
	if !proto.Equal(dst, want) {
		t.Errorf("copied %v, want %v", dst, want)
	}
	if n := testing.AllocsPerRun(100, func() { CopyInto(dst, src) }); n > 20 {
		t.Errorf("%v allocations, want a few", n)
	}
}

// A dynamic message keeps its type.
func TestNewOfDynamicMessage(t *testing.T) {
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
func TestNewDuringWrite(t *testing.T) {
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

// A copy of other messages replaces what was there.
func TestCopyReplacesOtherTypes(t *testing.T) {
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

type withText struct {
	proto.Message
	Text string
}

type hidden struct{ *wrapperspb.Int32Value }

type unexported struct{ *hidden }

// A reply may be whatever gRPC's codec takes.
func TestReply(t *testing.T) {
	fill := func(m any) {
		if err := proto.Unmarshal([]byte("\x08\x07"), m.(proto.Message)); err != nil {
			t.Fatal(err)
		}
	}
	of := func() *wrapperspb.Int32Value { return wrapperspb.Int32(3) }
	in := of()
	for name, tc := range map[string]struct {
		reply any
		fill  func(m any)
		got   func(reply any) any
		want  any
	}{
		"wrapper_by_pointer": {&struct{ proto.Message }{in}, fill, func(any) any { return in.GetValue() }, int32(7)},
		"wrapper_by_value":   {struct{ proto.Message }{in}, fill, func(any) any { return in.GetValue() }, int32(7)},
		"wrapper_of_a_type":  {&struct{ *wrapperspb.Int32Value }{of()}, fill, func(m any) any { return m.(interface{ GetValue() int32 }).GetValue() }, int32(7)},
		"wrapper_of_wrapper": {&struct{ proto.Message }{&struct{ proto.Message }{in}}, fill, func(any) any { return in.GetValue() }, int32(7)},
		"unexported":         {&unexported{&hidden{of()}}, fill, func(m any) any { return m.(*unexported).GetValue() }, int32(7)},
		"with_a_field": {&withText{Message: in, Text: "old"}, func(m any) { m.(*withText).Text = "new"; fill(m) },
			func(m any) any { return m.(*withText).Text + in.String() }, "new" + wrapperspb.Int32(7).String()},
		"embedded_by_value": {&struct{ wrapperspb.Int32Value }{}, fill, func(m any) any { return m.(interface{ GetValue() int32 }).GetValue() }, int32(7)},
		"bytes":             {new([]byte), func(m any) { *m.(*[]byte) = []byte("x") }, func(m any) any { return string(*m.(*[]byte)) }, "x"},
		"slice":             {make([]byte, 1), func(m any) { copy(m.([]byte), "x") }, func(m any) any { return string(m.([]byte)) }, "x"},
		"interface":         {new(any), func(m any) { *m.(*any) = 7 }, func(m any) any { return *m.(*any) }, 7},
	} {
		t.Run(name, func(t *testing.T) {
			n := NewLike(tc.reply)
			tc.fill(n)
			CopyInto(tc.reply, n)
			if got := tc.got(tc.reply); got != tc.want {
				t.Errorf("the reply holds %v, want %v", got, tc.want)
			}
		})
	}
	f := func() {}
	CopyInto(f, NewLike(f)) // Only its codec knows what it is for.
}

func TestType(t *testing.T) {
	dynamic := func(m proto.Message) *dynamicpb.Message { return dynamicpb.NewMessage(m.ProtoReflect().Descriptor()) }
	text := wrapperspb.String("a")
	for name, tc := range map[string]struct {
		m, same, other any
		fill           func(any) error
	}{
		"message": {text, wrapperspb.String("b"), wrapperspb.Int32(1), nil},
		"dynamic": {dynamic(text), dynamic(text), dynamic(wrapperspb.Int32(1)), nil},
		"wrapper": {struct{ proto.Message }{text}, struct{ proto.Message }{wrapperspb.String("b")}, struct{ proto.Message }{wrapperspb.Int32(1)}, nil},
		"bytes":   {[]byte("x"), []byte("y"), text, func(m any) error { *m.(*[]byte) = []byte("x"); return nil }},
		"struct":  {struct{ A int }{1}, struct{ A int }{2}, &struct{ A int }{1}, func(m any) error { m.(*struct{ A int }).A = 1; return nil }},
	} {
		t.Run(name, func(t *testing.T) {
			typ := TypeOf(tc.m)
			if !typ.Is(tc.same) || typ.Is(tc.other) || typ.Is(nil) || (Type{}).Is(tc.m) {
				t.Errorf("Is = %v of %T, %v of %T", typ.Is(tc.same), tc.same, typ.Is(tc.other), tc.other)
			}
			fill := tc.fill
			if fill == nil {
				b, err := proto.Marshal(tc.m.(proto.Message))
				if err != nil {
					t.Fatal(err)
				}
				fill = func(m any) error { return proto.Unmarshal(b, m.(proto.Message)) }
			}
			got, err := typ.Decode(fill)
			if err != nil || !typ.Is(got) {
				t.Errorf("decoded a %T, %v; want a %T", got, err, tc.m)
			}
			if p, ok := got.(proto.Message); ok {
				if !proto.Equal(p, tc.m.(proto.Message)) {
					t.Errorf("decoded %v, want %v", p, tc.m)
				}
			} else if !reflect.DeepEqual(got, tc.m) {
				t.Errorf("decoded %v, want %v", got, tc.m)
			}
		})
	}
}
