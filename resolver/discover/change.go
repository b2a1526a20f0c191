// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"fmt"
	"iter"

	"google.golang.org/grpc/resolver"
)

// An Op says what a [Change] does.
type Op uint8

// The kinds of [Change]. The zero Op is not one of them: a Change without an
// Op is ignored and reported as a fault of the source.
const (
	// OpInsert gives Key the endpoint Endpoint, whatever it had before.
	OpInsert Op = iota + 1
	// OpRemove removes Key. Removing a key that is not there does nothing.
	OpRemove
	// OpSynced says that the changes so far make a complete set.
	OpSynced
	// OpFinal says that the changes so far make a complete set, and the last one.
	OpFinal
	// OpServiceConfig sets the channel's service config.
	OpServiceConfig
	// OpBatch makes the changes in Changes, in their order.
	OpBatch
)

// String returns the name of the constructor that makes a Change of this Op.
func (op Op) String() string {
	switch op {
	case OpInsert:
		return "Insert"
	case OpRemove:
		return "Remove"
	case OpSynced:
		return "Synced"
	case OpFinal:
		return "Final"
	case OpServiceConfig:
		return "ServiceConfig"
	case OpBatch:
		return "Batch"
	}
	return fmt.Sprintf("Op(%d)", uint8(op))
}

// A Change is one step in what a [Source] knows. Make one with [Insert],
// [Remove], [Synced], [Final], [ServiceConfig] or [Batch].
type Change struct {
	// Op says what happens, and which of the other fields mean anything.
	Op Op
	// Key names the endpoint within its source, for OpInsert and OpRemove. Any
	// string will do; the order of the keys is the order of the published set.
	Key string
	// Endpoint is what OpInsert gives the key. It needs at least one address.
	Endpoint resolver.Endpoint
	// ServiceConfig is what OpServiceConfig sets, as JSON.
	ServiceConfig string
	// Changes are what OpBatch makes.
	Changes []Change
}

// All returns the changes that c makes, in their order: those in a [Batch],
// or else c alone. A batch may hold batches.
func (c Change) All() iter.Seq[Change] {
	return func(yield func(Change) bool) { c.each(yield) }
}

func (c Change) each(yield func(Change) bool) bool {
	if c.Op != OpBatch {
		return yield(c)
	}
	for _, inner := range c.Changes {
		if !inner.each(yield) {
			return false
		}
	}
	return true
}

// Insert gives key the endpoint, in place of the one it has, if any.
func Insert(key string, endpoint resolver.Endpoint) Change {
	return Change{Op: OpInsert, Key: key, Endpoint: endpoint}
}

// Remove removes key and its endpoint. It does nothing if there is no such key.
func Remove(key string) Change {
	return Change{Op: OpRemove, Key: key}
}

// Synced says that the changes so far make a complete set, which may be empty.
// A source yields it once per [Source.Watch], at the end of the snapshot that the
// watch starts with. It may yield it again at the end of every later group of
// changes, to publish the group at once.
func Synced() Change {
	return Change{Op: OpSynced}
}

// Final says that the changes so far make a complete set, and that nothing will
// change any more. It ends the watch: nothing after it is read, and the channel
// does not watch the source again until it has been idle.
func Final() Change {
	return Change{Op: OpFinal}
}

// Batch makes several changes in one element of the sequence, which costs less
// than one element for each. They are published together. Do not modify the
// slice afterwards.
func Batch(changes ...Change) Change {
	return Change{Op: OpBatch, Changes: changes}
}

// ServiceConfig sets the channel's service config to json, in the form of
// grpc.WithDefaultServiceConfig. It takes precedence over that one. A channel
// dialled with grpc.WithDisableServiceConfig ignores it. A config that does
// not parse is reported, and the one before it stays in force.
//
// An empty string says that the source has no service config. gRPC keeps the
// last one even then; send "{}" to go back to gRPC's defaults.
func ServiceConfig(json string) Change {
	return Change{Op: OpServiceConfig, ServiceConfig: json}
}

// A Source knows a set of endpoints and how it changes.
//
// Watch returns a sequence that starts with the source's full set as it is now:
// an [Insert] for each endpoint, in any order, then [Synced], even if there are
// no endpoints. It continues with the changes of the set until ctx is done. The
// sequence is ranged over once, on a goroutine of the caller's. It may block
// between changes, for any time, and need not be safe for concurrent use. Watch
// itself must not block.
//
// Watch is called once for every channel, again each time a channel comes back
// from idle, and again after a failure. Calls may overlap. Nothing carries
// over from one sequence to the next: a key that is not inserted again before
// Synced is gone.
//
// A sequence that ends without [Final] has failed, even if it yielded no error.
// Watch is then called again, with backoff. The last complete set stays in use
// until the new sequence says Synced, however long that takes. A panic in Watch
// or in the sequence is a failure too.
//
// An error is yielded with a zero Change. It does not end the sequence: a source
// may continue after it. It is reported to the channel, at most one a second.
//
// When ctx is done the sequence must end promptly and yield nothing more; an
// error yielded then is dropped. Nothing waits for it when a channel is closed
// or becomes idle. If a source has not stopped after five seconds, that is logged
// as an error, and its goroutine is left behind.
//
// Do not modify an endpoint after it was yielded. Endpoints may share data with
// one another. A source fills Address.ServerName only from data as trustworthy as
// the program itself, because it decides which certificate is accepted.
type Source interface {
	Watch(ctx context.Context) iter.Seq2[Change, error]
}

// Nudges returns a channel that receives a value when the gRPC channel would
// like the source to look again: a connection failed or was lost, or the
// balancing policy rejected the set. The context is the one passed to
// [Source.Watch] or derived from it. For any other the result is nil, from which
// receiving blocks for ever.
//
// A nudge is a hint. A source that is told of changes can ignore it. A source
// that asks for them may ask early, but must leave time between two requests,
// because nudges come as often as connections fail.
func Nudges(ctx context.Context) <-chan struct{} {
	return watchEnvOf(ctx).nudge
}
