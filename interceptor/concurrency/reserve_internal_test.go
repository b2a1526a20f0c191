// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package concurrency

import (
	"testing"
	"time"

	"github.com/belfry-go/belfry/interceptor"
)

func TestReserveLevels(t *testing.T) {
	now := interceptor.Instant(time.Hour)
	at := func() interceptor.Instant { return now }
	r := new(reserve)
	r.init()
	refuse := func(priority, times int) {
		for range times {
			r.refused(priority, 10, 10, at)
		}
	}
	keeps := func(when string, priority int, want int64) {
		t.Helper()
		if got := r.against(priority, now); got != want {
			t.Errorf("%s: %d permits are kept from priority %d, want %d", when, got, priority, want)
		}
	}
	refuse(5, 100)
	if r.active.Load() {
		t.Error("permits are kept for the only priority")
	}
	refuse(0, 1)
	if r.active.Load() {
		t.Error("permits are kept for the lowest priority")
	}
	refuse(5, 8)
	keeps("after 8 refusals", 0, 2)
	keeps("after 8 refusals", 4, 2)
	keeps("after 8 refusals", 5, 0)
	refuse(3, 12)
	keeps("the greatest of the higher ones", 0, 3)
	keeps("the greatest of the higher ones", 3, 2)
	refuse(3, 1000)
	keeps("all but one at most", 0, 9)

	now = now.Add(reserveHold + reserveHalf)
	keeps("half of it a while later", 0, 4)
	now = now.Add(reserveForget)
	keeps("nothing in the end", 0, 0)
	if r.active.Load() {
		t.Error("a reserve that keeps nothing is still looked at")
	}

	// More priorities than there are levels: those seen last have none.
	for p := 10; p < 20; p++ {
		refuse(p, 4)
	}
	n := 0
	for p := 10; p < 20; p++ {
		if l, _ := r.level(p); l != nil {
			n++
		}
	}
	if n != reserveLevels {
		t.Errorf("%d of ten priorities have a level, want %d", n, reserveLevels)
	}
	if l, _ := r.level(3); l != nil {
		t.Error("a priority that is forgotten still has a level")
	}
}

// Calls of the priority itself hold most of the permits: keeping more helps little.
func TestReserveShare(t *testing.T) {
	now := interceptor.Instant(time.Hour)
	at := func() interceptor.Instant { return now }
	r := new(reserve)
	r.init()
	r.refused(0, 10, 10, at)
	r.refused(1, 10, 10, at)
	for range 10 {
		if level := r.admitted(1, 1, now); level != 1 {
			t.Fatalf("level %d, want 1", level)
		}
	}
	l, _ := r.level(1)
	before := l.at(now)
	r.refused(1, 10, 10, at)
	if got := l.at(now); got != before {
		t.Errorf("%v permits are kept, want %v as before: no lower priority holds one", got, before)
	}
	for range 2 {
		r.released(1, 1)
	}
	r.refused(1, 10, 10, at)
	if got, want := l.at(now), before+reserveStep*0.4; got < want-1e-9 || got > want+1e-9 {
		t.Errorf("%v permits are kept, want %v", got, want)
	}
}
