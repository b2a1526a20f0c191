// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

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

// kept is where a unary attempt leaves its trailer for a layer ([Call.KeepTrailer]).
// It lives in the Call, so that asking for a trailer costs no allocation.
type kept struct {
	md   metadata.MD
	on   bool
	opts [6]grpc.CallOption // Room for the options with one more.
}

// KeepTrailer asks for the trailer of a unary attempt, for a layer that obeys
// what a server says in it. It is called before the call is passed on, after
// Origin, so that forks do not share it; [Call.Trailer] returns the trailer
// afterwards. It does nothing for a stream, which has a Trailer of its own.
func (c *Call) KeepTrailer() {
	k := &c.kept
	k.md = nil
	if k.on || c.kind != Unary {
		return
	}
	k.on = true
	c.opts = append(append(k.opts[:0], c.opts...), grpc.Trailer(&k.md))
}

// Trailer returns the trailer of a unary attempt that has ended, if
// [Call.KeepTrailer] was called before it began; otherwise, or if the server
// sent none, nil.
func (c *Call) Trailer() metadata.MD { return c.kept.md }

// Balanced reports whether a picker may choose the endpoint of the attempt,
// which is so for every connection. It is not for an interceptor that was given
// none, as in a test; a layer then need not say for the picker what it knows.
func (c *Call) Balanced() bool { return c.cc != nil || c.conn != nil }
