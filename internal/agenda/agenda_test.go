// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package agenda

import (
	"math/rand/v2"
	"testing"
)

// Agenda is in order of time then of scheduling.
func TestAgendaOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var a Agenda[func()]
	var last Event[func()]
	for range 20_000 {
		if a.Len() == 0 || r.IntN(5) < 3 {
			at := last.At + r.Int64N(50)
			if number := a.Add(at, nil); number == 0 {
				t.Fatal("an event has the number 0, which stands for none")
			}
			continue
		}
		e := a.Pop()
		if e.before(&last) {
			t.Fatalf("event %d at %d comes after event %d at %d", e.Number, e.At, last.Number, last.At)
		}
		last = e
	}
}

func TestQueueKeepsTheOrder(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 1))
	var q Queue[int]
	pushed, popped := 0, 0
	for range 20_000 {
		if q.Len() == 0 || r.IntN(2) == 0 {
			q.Push(pushed)
			pushed++
			continue
		}
		front := *q.Front()
		if got := q.Pop(); front != popped || got != popped {
			t.Fatalf("front and pop returned %d and %d, want %d", front, got, popped)
		}
		popped++
	}
	if got, want := q.Len(), pushed-popped; got != want {
		t.Errorf("length is %d, want %d", got, want)
	}
}
