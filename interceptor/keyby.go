// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"google.golang.org/grpc/metadata"
)

// A KeyFunc says which key a call belongs to. It is called for each admission,
// concurrently, and must not block.
type KeyFunc func(ctx context.Context, a *Admission) string

// KeyBy says how a layer tells calls apart, so that each key has its own limit, rate or
// circuit. At most one field is set. The zero KeyBy does not tell calls apart.
type KeyBy struct {
	// Method tells calls apart by their full method name.
	Method bool
	// Metadata tells calls apart by the first value of this entry of their outgoing
	// metadata; calls without it share one key, which is empty. Case does not matter.
	// It costs a copy of the metadata.
	Metadata string
	// Func tells calls apart by what it returns.
	Func KeyFunc
}

// IsSet reports whether calls are told apart.
func (k KeyBy) IsSet() bool { return k.Method || k.Metadata != "" || k.Func != nil }

// Check returns an error of the named layer if more than one field is set, or if no
// call can have an entry of the name that Metadata is.
func (k KeyBy) Check(layer string) error {
	switch {
	case len(k.set()) > 1:
		return &ConfigError{Layer: layer, Field: "KeyBy", Value: k, Rule: "must have at most one of Method, Metadata and Func"}
	case !metadataKey(k.Metadata):
		return &ConfigError{Layer: layer, Field: "KeyBy", Value: k, Rule: "must have a Metadata of letters, digits, '-', '_' and '.', as gRPC's metadata"}
	}
	return nil
}

// metadataKey reports whether gRPC takes entries of that name.
func metadataKey(name string) bool {
	for _, c := range []byte(name) {
		if !('a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '-' || c == '_' || c == '.') {
			return false
		}
	}
	return true
}

// Same reports whether k and o are set alike. Two functions count as the same, because
// Go cannot compare them.
func (k KeyBy) Same(o KeyBy) bool {
	return k.Method == o.Method && k.Metadata == o.Metadata && (k.Func == nil) == (o.Func == nil)
}

// String names what is set, such as "Method".
func (k KeyBy) String() string {
	if !k.IsSet() {
		return "nothing"
	}
	return strings.Join(k.set(), " and ")
}

func (k KeyBy) set() (fields []string) {
	if k.Method {
		fields = append(fields, "Method")
	}
	if k.Metadata != "" {
		fields = append(fields, fmt.Sprintf("Metadata %q", k.Metadata))
	}
	if k.Func != nil {
		fields = append(fields, "Func")
	}
	return fields
}

// Key returns the key of a call.
func (k KeyBy) Key(ctx context.Context, a *Admission) string {
	switch {
	case k.Method:
		return a.Method()
	case k.Metadata != "":
		return firstOutgoing(ctx, k.Metadata)
	case k.Func != nil:
		return k.Func(ctx, a)
	}
	return ""
}

// firstOutgoing returns the first value of an entry of the outgoing metadata.
func firstOutgoing(ctx context.Context, key string) string {
	md, _ := metadata.FromOutgoingContext(ctx)
	if v := md.Get(key); len(v) > 0 {
		return v[0]
	}
	return ""
}

// A PriorityFunc returns the priority of a call that has to wait. It is called
// concurrently, and must not block.
type PriorityFunc func(ctx context.Context, a *Admission) int

type priorityKey struct{}

// ContextWithPriority returns a context whose calls have the given priority in every
// queue of a stack. The default is 0; a higher priority goes first and is refused last.
func ContextWithPriority(ctx context.Context, priority int) context.Context {
	return context.WithValue(ctx, priorityKey{}, priority)
}

// ContextPriority is the default PriorityFunc: what [ContextWithPriority] set.
func ContextPriority(ctx context.Context, _ *Admission) int {
	p, _ := ctx.Value(priorityKey{}).(int)
	return p
}

// MetadataPriority returns a PriorityFunc that reads the priority from the call's
// outgoing metadata, so that it can be passed on from server to server. A call without
// the entry, or with one that is not a decimal number, has priority 0.
func MetadataPriority(key string) PriorityFunc {
	return func(ctx context.Context, _ *Admission) int {
		p, err := strconv.Atoi(firstOutgoing(ctx, key))
		if err != nil {
			return 0
		}
		return p
	}
}
