// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"errors"
	"net"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
)

// PerCall is what the options of one call say about its attempts. It is not changed once
// the call has begun.
type PerCall struct {
	MaxRetry, MaxHedge int  // The most attempts; 0 if the call does not say.
	Idempotent, Unsafe bool // Whether it may, or must not, be carried out more than once.
	Timeout            time.Duration
	Record             *Record
	Owner              bool // The stack fills the caller's report at the end.
	Why                Why  // Of this attempt, for the Record.
}

// Why says why a further attempt is made. It is zero for the first.
type Why struct {
	Layer, Reason string
	Delay         time.Duration // Before it.
}

// An Option is a call option that changes the PerCall.
type Option struct {
	grpc.EmptyCallOption
	Set func(*PerCall)
}

// A ReportOption is a call option that asks for a report. Fill is called once, before the
// caller can know that the call is over.
type ReportOption struct {
	grpc.EmptyCallOption
	Fill func(made []Made, hedges int, hedgeWon bool)
}

// Made is an attempt that was handed to a connection.
type Made struct {
	Why
	Start, Took time.Duration
	Peer        net.Addr
	Err         error
}

// A Record notes the attempts of one call, of all stacks on its way. It is safe for
// concurrent use. What comes after Close is ignored.
type Record struct {
	fill  func([]Made, int, bool)
	began time.Time

	mu     sync.Mutex // Guards the fields below; nothing is locked under it.
	made   []*Entry
	hedges int
	won    bool
	closed bool
}

// NewRecord returns a Record for o.
func (o ReportOption) NewRecord() *Record { return &Record{fill: o.Fill, began: time.Now()} }

// An Entry is an attempt in a Record, and the call option that tells a stack behind the
// connection about it.
type Entry struct {
	grpc.EmptyCallOption
	Record *Record
	made   Made
	over   bool
}

// Begin notes that an attempt is handed to the connection.
func (r *Record) Begin(w Why) *Entry {
	r.mu.Lock()
	defer r.mu.Unlock()
	e := &Entry{Record: r, made: Made{Why: w, Start: time.Since(r.began)}}
	r.made = append(r.made, e)
	return e
}

// Replace removes the attempt, for a stack behind the connection that notes its own. The
// first of those has the same grounds.
func (e *Entry) Replace() (Why, *Record) {
	e.Record.mu.Lock()
	defer e.Record.mu.Unlock()
	e.Record.made = slices.DeleteFunc(e.Record.made, func(o *Entry) bool { return o == e })
	return e.made.Why, e.Record
}

// Seen notes the peer of the attempt.
func (e *Entry) Seen(peer net.Addr) {
	e.Record.mu.Lock()
	defer e.Record.mu.Unlock()
	e.made.Peer = peer
}

// End notes how the attempt ended. Only the first end counts.
func (e *Entry) End(err error) {
	e.Record.mu.Lock()
	defer e.Record.mu.Unlock()
	if !e.over {
		e.over, e.made.Took, e.made.Err = true, time.Since(e.Record.began)-e.made.Start, err
	}
}

// Hedge notes that a hedge was fired, or that it won. r may be nil.
func (r *Record) Hedge(won bool) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if won {
		r.won = true
	} else {
		r.hedges++
	}
}

// Close fills the caller's report. err is how the call ended. Attempts that still run ended
// with it, unless it comes from another attempt: then they end with superseded.
func (r *Record) Close(err, superseded error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return
	}
	r.closed = true
	unfinished := err
	if err == nil || slices.ContainsFunc(r.made, func(e *Entry) bool { return e.over && e.made.Err != nil && errors.Is(err, e.made.Err) }) {
		unfinished = superseded
	}
	made := make([]Made, len(r.made))
	for i, e := range r.made {
		if made[i] = e.made; !e.over {
			made[i].Took, made[i].Err = time.Since(r.began)-e.made.Start, unfinished
		}
	}
	r.fill(made, r.hedges, r.won)
}
