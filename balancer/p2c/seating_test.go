// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"testing"

	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/place"
)

func drainingEndpoint(addr string, drains bool) resolver.Endpoint {
	return place.SetDraining(one(addr), drains)
}

func TestDraining(t *testing.T) {
	t.Run("gets no new calls and keeps its connection", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			r := w.record()
			w.start(constantConfig, some("a", "b", "c")...)
			w.start(constantConfig, drainingEndpoint("a", true), one("b"), one("c"))
			if got := w.counts(100); got["a"] != 0 {
				t.Errorf("calls by endpoint are %v, want none to a", got)
			}
			if w.cc.isShutdown("a") {
				t.Error("the connection of the draining endpoint is closed")
			}
			if e := w.of("a"); e.PassedOver != Draining || !e.Draining {
				t.Errorf("it is passed over for %q, want %q", e.PassedOver, Draining)
			}
			if got := r.values["endpoint_conditions draining"]; got != 1 {
				t.Errorf("metrics are %v, want one endpoint draining", r.values)
			}
			if len(logs.with("endpoint a is draining")) == 0 {
				t.Error("nothing is logged")
			}
			w.start(constantConfig, some("a", "b", "c")...)
			// None of 200 in 1 of 1e35 runs.
			if got := w.counts(200); got["a"] == 0 {
				t.Errorf("calls by endpoint are %v, want some to a, which stays", got)
			}
		})
	})
	t.Run("the last one still serves", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			w.start(constantConfig, drainingEndpoint("a", true), one("b"))
			w.lose("b")
			w.wantState("the one that stays has no connection", connectivity.Ready)
			if got := w.counts(100); got["a"] != 100 {
				t.Errorf("calls by endpoint are %v, want 100 to a", got)
			}
			w.ready("b")
			if got := w.counts(100); got["b"] != 100 {
				t.Errorf("calls by endpoint are %v, want 100 to b", got)
			}
			w.start(constantConfig, drainingEndpoint("a", true), drainingEndpoint("b", true))
			if got := w.counts(100); len(got) != 2 {
				t.Errorf("calls by endpoint are %v, want both", got)
			}
			w.start(constantConfig, drainingEndpoint("a", true))
			if got := w.counts(100); got["a"] != 100 {
				t.Errorf("calls by endpoint are %v, want 100 to a", got)
			}
		})
	})
}
