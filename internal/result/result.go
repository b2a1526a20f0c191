// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package result carries what a caller asked for with the options Header, Trailer and Peer
// from the attempt that counts to the caller's variables. Each attempt writes to variables
// of its own, so that one that ends late changes nothing.
package result

import (
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
)

// Vars are the variables of one attempt. Nil is valid: the caller asked for nothing.
type Vars struct {
	header, trailer metadata.MD
	peer            peer.Peer

	to      []grpc.CallOption // The options as they were; not changed.
	written atomic.Bool
	done    chan struct{} // Closed when they are written.
}

// Redirect returns opts with Header, Trailer and Peer pointed at new Vars, or nil and opts
// itself if there is none of them.
func Redirect(opts []grpc.CallOption) (*Vars, []grpc.CallOption) {
	var v *Vars
	own := opts
	for i, opt := range opts {
		switch opt.(type) {
		case grpc.HeaderCallOption, grpc.TrailerCallOption, grpc.PeerCallOption:
		default:
			continue
		}
		if v == nil {
			v = &Vars{done: make(chan struct{})}
			own = append([]grpc.CallOption(nil), opts...)
		}
		v.to = append(v.to, opt)
		switch opt.(type) {
		case grpc.HeaderCallOption:
			own[i] = grpc.Header(&v.header)
		case grpc.TrailerCallOption:
			own[i] = grpc.Trailer(&v.trailer)
		case grpc.PeerCallOption:
			own[i] = grpc.Peer(&v.peer)
		}
	}
	return v, own
}

// SetWritten records that gRPC has written the variables and will not do so again. It may
// be called concurrently, and more than once.
func (v *Vars) SetWritten() {
	if v != nil && v.written.CompareAndSwap(false, true) {
		close(v.done)
	}
}

// patience is how long Await waits. gRPC ends a stream at once when its context ends; a
// third-party interceptor may keep the end from it.
const patience = time.Second

// Await waits for an attempt that is about to end to write its variables.
func (v *Vars) Await() {
	if v != nil && !v.Written() {
		Await(v.done)
	}
}

// Await waits until done is closed, by the end of an attempt or operation that is about to
// come. It gives up after a second, and then returns false.
func Await(done <-chan struct{}) bool {
	t := time.NewTimer(patience)
	defer t.Stop()
	select {
	case <-done:
		return true
	case <-t.C:
		return false
	}
}

// Written reports whether SetWritten was called. Only then may Copy be called for an
// attempt that other goroutines run.
func (v *Vars) Written() bool { return v != nil && v.written.Load() }

// Copy copies the variables to where the options pointed before Redirect.
func (v *Vars) Copy() {
	if v == nil {
		return
	}
	for _, opt := range v.to {
		switch opt := opt.(type) {
		case grpc.HeaderCallOption:
			*opt.HeaderAddr = v.header
		case grpc.TrailerCallOption:
			*opt.TrailerAddr = v.trailer
		case grpc.PeerCallOption:
			*opt.PeerAddr = v.peer
		}
	}
}
