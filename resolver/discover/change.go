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
	// OpServiceConfig sets the channel's service config.
	OpServiceConfig
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
	case OpServiceConfig:
		return "ServiceConfig"
	}
	return fmt.Sprintf("Op(%d)", uint8(op))
}

// A Change is one step in what a [Source] knows. Make one with [Insert],
// [Remove], [Synced] or [ServiceConfig].
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
// It is due once per [Source.Watch], at the end of the snapshot that the watch
// starts with, and welcome again at the end of every later batch of changes.
func Synced() Change {
	return Change{Op: OpSynced}
}

// ServiceConfig sets the channel's service config to json, in the form of
// grpc.WithDefaultServiceConfig, over which it takes precedence. A channel
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
// Watch returns a sequence that begins with the source's full set as it is now
// (an [Insert] for each endpoint, in any order, then [Synced], also if there
// are none) and goes on with what changes, until ctx is done or nothing can
// change any more. The sequence is ranged over once, on a goroutine of the
// caller's, so it may block between changes as long as it likes, and need not
// be safe for concurrent use. Watch itself must not block.
//
// Watch is called once for every channel, again each time a channel comes back
// from idle, and again after a failure. Calls may overlap. Nothing carries
// over from one sequence to the next: a key that is not inserted again before
// Synced is gone.
//
// How a sequence ends:
//
//   - After an error it has failed: Watch will be called again, with backoff,
//     and the set as it was stays in use until the new sequence is synced.
//   - Without one it is over: the set stays as it is, for good. So a source
//     whose connection was lost must not just return.
//
// An error, yielded with a zero Change, does not by itself end the sequence.
// It is reported to the channel, and a source that can go on may go on; the
// sequence has failed if the error was the last thing it yielded. A source
// that goes on after errors paces itself.
//
// The sequence must end promptly when ctx is done and yield nothing more; an
// error yielded then is dropped. Closing a channel (and going idle) waits for
// it, for at most five seconds. A source that takes longer is logged as an
// error and left behind, with the goroutine it holds.
//
// Endpoints that were yielded are not modified, and may share data with one
// another. A source fills Address.ServerName only from data as trustworthy as
// the program itself: it decides which certificate is accepted.
type Source interface {
	Watch(ctx context.Context) iter.Seq2[Change, error]
}

// Nudges returns a channel that receives a value when the gRPC channel would
// like the source to look again: a connection failed or was lost, or the
// balancing policy rejected the set. The context is the one passed to
// [Source.Watch]; for any other the result is nil, from which receiving blocks
// for ever.
//
// A nudge is a hint. A source that is told of changes needs none of them; one
// that asks for them may ask early, but keeps a distance between two requests,
// since nudges come as often as connections fail.
func Nudges(ctx context.Context) <-chan struct{} {
	return watchEnvOf(ctx).nudge
}
