// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

// observer counts what the layers do. A program would rather use package
// otelobserver, which makes metrics of it.
type observer struct {
	interceptor.NopObserver

	mu        sync.Mutex     // Guards the fields below.
	did       map[string]int // What a layer did, and how often.
	ended     map[string]int // What callers got.
	latencies []time.Duration
}

func newObserver() *observer { return &observer{did: map[string]int{}, ended: map[string]int{}} }

func (o *observer) count(what string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.did[what]++
}

// Refused is called when a layer refuses a call or a further attempt.
func (o *observer) Refused(_ interceptor.Observed, r *interceptor.Refusal) {
	o.count(fmt.Sprintf("%-11s refused, %s", r.Layer, r.Reason))
}

// Waited is called when a gate has waited.
func (o *observer) Waited(_ interceptor.Observed, layer string, _ time.Duration) {
	o.count(fmt.Sprintf("%-11s had to wait", layer))
}

// Attempt is called when an attempt is sent.
func (o *observer) Attempt(c interceptor.Observed) {
	if c.Attempt == 0 {
		o.count("calls sent")
	} else {
		o.count("further attempts sent")
	}
}

// HedgeFired is called when a hedge starts an extra attempt.
func (o *observer) HedgeFired(_ interceptor.Observed, layer string) {
	o.count(fmt.Sprintf("%-11s extra attempts", layer))
}

// HedgeWon is called when the result of an extra attempt is the call's.
func (o *observer) HedgeWon(_ interceptor.Observed, layer string) {
	o.count(fmt.Sprintf("%-11s extra attempts that won", layer))
}

// returned notes what a caller got.
func (o *observer) returned(took time.Duration, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended[status.Code(err).String()]++
	o.latencies = append(o.latencies, took)
}

// take describes what has happened since it was last called.
func (o *observer) take() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	var b strings.Builder
	if n := len(o.latencies); n > 0 {
		slices.Sort(o.latencies)
		fmt.Fprintf(&b, "  %6d calls, p50 %v, p99 %v:", n, brief(o.latencies[n/2]), brief(o.latencies[n*99/100]))
		for _, code := range slices.Sorted(maps.Keys(o.ended)) {
			fmt.Fprintf(&b, " %d %s", o.ended[code], code)
		}
		b.WriteString("\n")
	}
	for _, what := range slices.Sorted(maps.Keys(o.did)) {
		fmt.Fprintf(&b, "  %6d %s\n", o.did[what], what)
	}
	clear(o.did)
	clear(o.ended)
	o.latencies = nil
	return b.String()
}

func brief(d time.Duration) time.Duration { return d.Round(100 * time.Microsecond) }
