// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"reflect"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/protobuf/proto"
)

// newLike returns a new, empty message of m's type: a reply for an attempt of its
// own. m is a protocol buffer message, or whatever the call's codec can fill,
// which is a pointer or a map.
func newLike(m any) any {
	if p, ok := m.(proto.Message); ok {
		return p.ProtoReflect().New().Interface()
	}
	v := reflect.ValueOf(m)
	switch v.Kind() {
	case reflect.Pointer:
		return reflect.New(v.Type().Elem()).Interface()
	case reflect.Map:
		return reflect.MakeMap(v.Type()).Interface()
	}
	return m // Nothing that a codec could write to.
}

// copyInto makes dst equal to src, which is of the same type and not used again.
func copyInto(dst, src any) {
	if p, ok := dst.(proto.Message); ok {
		proto.Reset(p)
		proto.Merge(p, src.(proto.Message))
		return
	}
	d, s := reflect.ValueOf(dst), reflect.ValueOf(src)
	switch d.Kind() {
	case reflect.Pointer:
		if !d.IsNil() {
			d.Elem().Set(s.Elem())
		}
	case reflect.Map:
		d.Clear()
		for it := s.MapRange(); it.Next(); {
			d.SetMapIndex(it.Key(), it.Value())
		}
	}
}

// outs is where an attempt writes what the caller asked for by Header, Trailer
// and Peer options. If the attempt is adopted it is copied to the caller's
// variables when the attempt has ended, in whichever order that happens. A nil
// *outs is an attempt nobody asked anything of.
type outs struct {
	// Written by gRPC before the attempt ends, and not read before that.
	header, trailer metadata.MD
	peer            peer.Peer

	to []grpc.CallOption // The options as they were; not changed.

	mu             sync.Mutex // Guards the fields below; nothing is locked under it.
	adopted, ended bool
}

// redirect returns opts with the options that have results pointed at a new
// outs; opts itself and nil if there is none.
func redirect(opts []grpc.CallOption) (*outs, []grpc.CallOption) {
	var o *outs
	own := opts
	for i, opt := range opts {
		var repl grpc.CallOption
		switch opt.(type) {
		case grpc.HeaderCallOption, grpc.TrailerCallOption, grpc.PeerCallOption:
			if o == nil {
				o = new(outs)
				own = append([]grpc.CallOption(nil), opts...)
			}
			o.to = append(o.to, opt)
		default:
			continue
		}
		switch opt.(type) {
		case grpc.HeaderCallOption:
			repl = grpc.Header(&o.header)
		case grpc.TrailerCallOption:
			repl = grpc.Trailer(&o.trailer)
		case grpc.PeerCallOption:
			repl = grpc.Peer(&o.peer)
		}
		own[i] = repl
	}
	return o, own
}

func (o *outs) adopt() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.adopted {
		return
	}
	o.adopted = true
	if o.ended {
		o.copyLocked()
	}
}

func (o *outs) end() {
	if o == nil {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return
	}
	o.ended = true
	if o.adopted {
		o.copyLocked()
	}
}

func (o *outs) copyLocked() {
	for _, opt := range o.to {
		switch opt := opt.(type) {
		case grpc.HeaderCallOption:
			*opt.HeaderAddr = o.header
		case grpc.TrailerCallOption:
			*opt.TrailerAddr = o.trailer
		case grpc.PeerCallOption:
			*opt.PeerAddr = o.peer
		}
	}
}
