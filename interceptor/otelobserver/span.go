// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver

import (
	"context"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"
)

// span is a span that records.
type span struct{ trace.Span }

func spanOf(ctx context.Context) (span, bool) {
	s := trace.SpanFromContext(ctx)
	return span{s}, s.IsRecording()
}

func (s span) event(name string, kvs ...attribute.KeyValue) {
	s.AddEvent(name, trace.WithAttributes(kvs...))
}

func (s span) eventAt(t time.Time, name string, kvs ...attribute.KeyValue) {
	s.AddEvent(name, trace.WithTimestamp(t), trace.WithAttributes(kvs...))
}
