// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/load"
)

func TestGrace(t *testing.T) {
	failure := balancer.DoneInfo{Err: status.Error(codes.Unavailable, "always"), BytesSent: true, BytesReceived: true}
	// failed is the world when the only READY endpoint has failed, and has another call.
	failed := func(t *testing.T, w *world) (inFlight func(balancer.DoneInfo)) {
		t.Helper()
		if err := w.update(`{"exploreEvery":0}`, some("bad:1", "good:1", "good:2")...); err != nil {
			t.Fatal(err)
		}
		w.settle()
		w.ready("bad:1")
		w.wantState("an endpoint is READY", connectivity.Ready)
		_, done := w.mustPick()
		_, inFlight = w.mustPick()
		done(failure)
		w.wantState("all that is READY has only failed", connectivity.Connecting)
		if _, _, err := w.pick(); err != balancer.ErrNoSubConnAvailable {
			t.Errorf("a pick returns %v, must wait", err)
		}
		return inFlight
	}

	t.Run("ends with another endpoint", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			failed(t, w)(failure)
			w.ready("good:2")
			w.wantState("another endpoint is READY", connectivity.Ready)
			if addr, _ := w.mustPick(); addr != "good:2" {
				t.Errorf("picked %s, want the one that has not failed", addr)
			}
		})
	})
	t.Run("ends with an answer", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			failed(t, w)(success)
			w.wantState("an attempt was answered", connectivity.Ready)
		})
	})
	t.Run("ends when no other connects", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			failed(t, w)(failure)
			w.fail("good:1")
			w.wantState("one more may connect", connectivity.Connecting)
			w.fail("good:2")
			w.wantState("no other connects", connectivity.Ready)
		})
	})
	t.Run("ends in time, until an endpoint has not failed", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			failed(t, w)(failure)
			time.Sleep(maxGrace)
			w.settle()
			w.wantState("calls have waited for long", connectivity.Ready)
			_, done := w.mustPick()
			done(failure)
			w.wantState("another call failed", connectivity.Ready)
			w.ready("good:1")
			w.lose("good:1")
			w.wantState("a good endpoint was READY", connectivity.Connecting)
		})
	})
	t.Run("remembers what failed before the channel was idle", func(t *testing.T) {
		bubble(t, func(t *testing.T, w *world) {
			metric := must(load.NewExpectedLatency(load.DefaultExpectedLatencyConfig()))
			bad := &measure{Meter: metric.NewMeter(load.Endpoint{}), room: &room{}}
			bad.note(everFailed)
			w.p.started, w.p.metric, w.p.recalled = true, metric, map[string]*measure{"bad:1": bad}
			if err := w.update(`{}`, some("bad:1", "good:1")...); err != nil {
				t.Fatal(err)
			}
			w.settle()
			w.ready("bad:1")
			w.wantState("only a bad endpoint is READY", connectivity.Connecting)
			w.ready("good:1")
			w.wantState("a good endpoint is READY", connectivity.Ready)
		})
	})
}

// inGrace reports whether calls wait although an endpoint is READY.
func (w *world) inGrace() bool {
	w.p.mu.Lock()
	defer w.p.mu.Unlock()
	return w.p.inGraceLocked()
}
