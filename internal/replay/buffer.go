// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"encoding/binary"
	"slices"
	"strings"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"

	"github.com/belfry-go/belfry/internal/message"
)

// frame is what each message takes beside its bytes: here its length, and in gRPC also
// whether it is compressed. Counting it bounds how many empty messages are kept.
const frame = 5

// A Total counts the bytes that all streams of a layer keep. The zero Total is ready for
// use, by any number of goroutines.
type Total struct{ used atomic.Int64 }

// take takes n bytes, unless more than limit would be taken then.
func (t *Total) take(n, limit int) bool {
	if t.used.Add(int64(n)) > int64(limit) {
		t.give(n)
		return false
	}
	return true
}

func (t *Total) give(n int) { t.used.Add(-int64(n)) }

// Used returns how many bytes are kept now.
func (t *Total) Used() int { return int(t.used.Load()) }

// A buffer holds messages as bytes, one after the other, each after its frame.
type buffer struct {
	bytes []byte
	kind  message.Type // Of all of them.
}

// add adds a message that is encoded in data.
func (b *buffer) add(data mem.BufferSlice) {
	n := data.Len()
	b.bytes = slices.Grow(b.bytes, frame+n)
	b.bytes = binary.BigEndian.AppendUint32(append(b.bytes, 0), uint32(n))
	for _, d := range data {
		b.bytes = append(b.bytes, d.ReadOnlyData()...)
	}
}

// at returns the message at an offset, and the offset of the next one. What it returns
// stays as it is when more is added.
func (b *buffer) at(i int) (data []byte, next int) {
	n := int(binary.BigEndian.Uint32(b.bytes[i+1:]))
	next = i + frame + n
	return b.bytes[i+frame : next : next], next
}

// A codec encodes what a call sends, as gRPC does. Nil is a call whose codec is not known.
type codec interface {
	Marshal(v any) (mem.BufferSlice, error)
	Unmarshal(data mem.BufferSlice, v any) error
}

// codecOf returns the codec of a call with these options. It does not have to be the one
// that the messages are sent with, because messages are decoded before they are sent
// again: it has to know their type. plain says that no option has chosen it.
func codecOf(opts []grpc.CallOption) (c codec, plain bool) {
	var forced codec
	name := proto.Name
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.ForceCodecV2CallOption:
			forced = o.CodecV2
		case grpc.ForceCodecCallOption:
			forced = codecV1{o.Codec}
		case grpc.CustomCodecCallOption:
			forced = codecV1{o.Codec}
		case grpc.ContentSubtypeCallOption:
			name = strings.ToLower(o.ContentSubtype)
		}
	}
	if forced != nil {
		return forced, false
	}
	plain = name == proto.Name
	if c := encoding.GetCodec(name); c != nil {
		return codecV1{c}, plain
	}
	if c := encoding.GetCodecV2(name); c != nil {
		return c, plain
	}
	return nil, false
}

// codecV1 is a codec of one piece of memory.
type codecV1 struct {
	of interface {
		Marshal(v any) ([]byte, error)
		Unmarshal(data []byte, v any) error
	}
}

func (c codecV1) Marshal(v any) (mem.BufferSlice, error) {
	b, err := c.of.Marshal(v)
	if err != nil {
		return nil, err
	}
	return mem.BufferSlice{mem.SliceBuffer(b)}, nil
}

func (c codecV1) Unmarshal(data mem.BufferSlice, v any) error {
	return c.of.Unmarshal(data.Materialize(), v)
}
