// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import "testing"

func newCandidate() *candidate {
	c := &candidate{}
	c.tally.add(tallyOffset)
	return c
}

// One word counts picks, attempts and streams, and none of the counts changes another.
func TestTally(t *testing.T) {
	const lap = 1 << (64 - picksAt)
	c := newCandidate()
	for range lap - 2 {
		c.picked(false)
		c.tally.add(-oneAttempt)
	}
	for range 5 {
		c.picked(false)
	}
	c.picked(true)
	// The end of a stream is counted before its first response, which comes at the
	// same moment.
	c.tally.add(-oneStream)
	attempts, streams := c.tally.read()
	if got := c.picks(); got != lap+4 || attempts != 5 || streams != 0 {
		t.Errorf("%d picks, %d attempts, %d streams before the response, want %d, 5 and 0", got, attempts, streams, lap+4)
	}
	c.tally.add(oneStream - oneAttempt)
	attempts, streams = c.tally.read()
	if got := c.picks(); got != lap+4 || attempts != 4 || streams != 0 {
		t.Errorf("%d picks, %d attempts, %d streams, want %d, 4 and 0", got, attempts, streams, lap+4)
	}
}

// A kept cost is good until its tick. If it was kept with attempts in flight, it is good only
// until one starts or ends, even if the number in flight is the same again. The cost of an idle
// endpoint is good whenever the endpoint is idle again.
func TestKeptCost(t *testing.T) {
	c := newCandidate()
	if c.changed(); good(c) {
		t.Error("good before the meter was asked")
	}
	keep := func() { c.cost.Store(7<<32 | 10_000<<tagBits | uint64(c.tag())) }
	keep()
	for _, test := range []struct {
		tick uint32
		want bool
	}{{9_999, true}, {10_000, false}, {10_001, false}, {10_000 - uint32(mostGood>>tickBits), true}, {9_999 - uint32(mostGood>>tickBits), false}} {
		if _, good := c.kept(test.tick); good != test.want {
			t.Errorf("in tick %d good is %v, want %v", test.tick, good, test.want)
		}
	}
	for n := range 3 {
		keep()
		c.picked(false)
		if good(c) {
			t.Errorf("with %d in flight good after an attempt started", n)
		}
		c.tally.add(-oneAttempt)
		if good(c) != (n == 0) {
			t.Errorf("with %d in flight, after an attempt started and ended, good is %v", n, good(c))
		}
		c.picked(false)
		keep()
		if !good(c) {
			t.Errorf("with %d in flight not good", n+1)
		}
	}
	for n := 3; n > 0; n-- {
		if c.changed(); good(c) {
			t.Errorf("with %d in flight good after a change", n)
		}
		c.tally.add(-oneAttempt)
	}
}

func good(c *candidate) bool {
	_, is := c.kept(9_999)
	return is
}
