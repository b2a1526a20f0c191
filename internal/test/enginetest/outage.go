// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package enginetest

import (
	"flag"
	"slices"
	"strings"
	"testing"
	"time"
)

// Outage is how long an engine is down, slow or answers nonsense in [Channel.Survive].
var Outage = flag.Duration("outage", 200*time.Millisecond, "how long engines of discovery are out of order, in tests of sources")

// A Disturbance is something that happens to an engine.
type Disturbance struct {
	Name  string
	Begin func()
	End   func()
	Told  string // what an error contains that must be reported meanwhile, each once; "": none need be
}

// Disturb returns what a proxy in front of an engine at addr can do to it.
func (p *Proxy) Disturb(addr func() string) []Disturbance {
	back := func() { p.ForwardTo(addr()) }
	return []Disturbance{
		{Name: "down", Begin: func() { p.ForwardTo("") }, End: back},
		{Name: "slow", Begin: func() { p.Delay(50 * time.Millisecond) }, End: func() { p.Delay(0) }},
		{Name: "silent", Begin: p.Stall, End: p.Resume},
		{Name: "nonsense", Begin: p.Babble, End: back},
	}
}

// Survive disturbs the engine in one way after the other, each for [Outage], while calls
// run. It fails the test if no call is answered meanwhile, if there is no error where one
// must be, or that is reported twice.
// After each disturbance it changes the engine, and waits until the channel has what
// change returns, which must be another set than before.
func (c *Channel) Survive(t *testing.T, change func() Set, disturbances ...Disturbance) {
	t.Helper()
	for _, d := range disturbances {
		before, answered := len(c.Errors()), c.made.Load()
		d.Begin()
		time.Sleep(*Outage)
		if !c.wait(func() bool {
			return d.Told == "" || slices.ContainsFunc(c.errs[before:], func(err string) bool { return strings.Contains(err, d.Told) })
		}) {
			t.Fatalf("%s: errors %q, want one that contains %q", d.Name, c.Errors()[before:], d.Told)
		}
		for end := time.Now().Add(patience); c.made.Load() < answered+10; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s: no calls meanwhile", d.Name)
			}
		}
		errs := c.Errors()[before:]
		d.End()
		c.WaitSet(t, change())
		c.WaitWell(t)
		t.Logf("%s: errors %q", d.Name, errs)
		slices.Sort(errs)
		if n := len(errs); d.Told != "" && len(slices.Compact(errs)) < n {
			t.Errorf("%s: errors were reported twice", d.Name)
		}
	}
}
