// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"math"
	"strings"
)

// margin is how much better than the base a peer must be for the page to say that it wins.
const margin = 0.05

// boundBusy is the share of the processors' time from which on calls wait for them.
const boundBusy = 0.9

// A win is a figure in which a peer is better than the base.
type win struct {
	section *section
	group   *group
	metric  int
	peer    *row
	base    *row
	ratio   float64 // below 1: of the worse to the better one, whichever is the greater
}

// better returns how much better r is than o in a metric, as a ratio below 1 if it is better;
// NaN if they cannot be compared.
func (g *group) better(i int, r, o *row) float64 {
	if g.metrics[i].higher {
		r, o = o, r
	}
	return r.ratio(i, o)
}

// wins returns where peers are better than the base by more than the margin. Neighbours count,
// what nobody can reach does not.
func wins(sections []*section) []win {
	var all []win
	for _, s := range sections {
		for _, g := range s.groups {
			b := g.base()
			if b == nil {
				continue
			}
			for _, r := range g.rows {
				if r.role != peer && r.role != neighbour {
					continue
				}
				for i, m := range g.metrics {
					if ratio := g.better(i, r, b); m.judged && ratio < 1-margin {
						all = append(all, win{s, g, i, r, b, ratio})
					}
				}
			}
		}
	}
	return all
}

// A reason explains why a peer is better where when returns true. None looks at who the peer is:
// what the code of a peer does is in its row, and the rest is figures.
type reason struct {
	when func(w win) bool
	text func(w win) string
}

const noReason = "No reason is known."

// reasons are tried in order; the first that applies is given, and noReason if there is none.
var reasons = []reason{
	{ // The repeats do not agree.
		when: func(w win) bool {
			return w.lost() > 0
		},
		text: func(w win) string {
			return fmt.Sprintf("Within the noise: in %d of %d repeats it was the other way round.", w.lost(), len(w.peer.values[w.metric]))
		},
	},
	{ // The peer's code does less.
		when: func(w win) bool { return w.peer.less != "" },
		text: func(w win) string {
			text := w.peer.less
			like := w.group.row(w.peer.like)
			if like == nil || !like.measured() || !w.peer.measured() {
				return text
			}
			if w.group.better(w.metric, like, w.peer) < 1 {
				text += fmt.Sprintf(" belfry's policy of its kind, `%s`, is ahead of it: %s in ratio to it.", like.name, formatRatio(like.ratio(w.metric, w.peer)))
			}
			return text
		},
	},
	{ // Busy processors.
		when: func(w win) bool { return w.base.busy >= boundBusy },
		text: func(w win) string {
			return fmt.Sprintf("The processors were the bound (%.0f %% busy under %s, %.0f %% under this one): what calls wait for a processor is in the figures, and no policy can shorten it.", 100*w.base.busy, w.base.name, 100*w.peer.busy)
		},
	},
	{ // Proxies see what a client cannot.
		when: func(w win) bool { return w.peer.role == neighbour },
		text: func(win) string {
			return "All calls go through it, so it knows what every server has in flight at any moment; a client knows its own calls."
		},
	},
	{ // The median is bought with the tail.
		when: func(w win) bool {
			tail := w.group.metric("p99, ms")
			return w.group.metrics[w.metric].name == "p50, ms" && tail >= 0 && w.group.better(tail, w.base, w.peer) < 1
		},
		text: func(w win) string {
			tail := w.group.metric("p99, ms")
			return fmt.Sprintf("It answers half of the calls sooner and the slowest hundredth later: its p99 is %s times the default's.", formatRatio(w.peer.ratio(tail, w.base)))
		},
	},
	{ // Nothing to choose.
		when: func(w win) bool {
			tail := w.group.metric("p99, ms")
			oracle := w.group.oracle()
			return tail >= 0 && oracle != nil && w.base.ratio(tail, oracle) < 1+margin
		},
		text: func(w win) string {
			return "The default is within 5 % of the oracle here, which knows the servers but not the work of a call: there is nothing left to win but luck."
		},
	},
	{ // One repeat.
		when: func(w win) bool { return len(w.peer.ratios(w.metric, w.base)) == 1 },
		text: func(win) string { return "One repeat alone was made, which may be noise. " + noReason },
	},
}

// oracle returns the row that knows what no client can, nil if there is none.
func (g *group) oracle() *row {
	for _, r := range g.rows {
		if r.role == bound && r.measured() {
			return r
		}
	}
	return nil
}

// lost returns in how many repeats the base was not worse.
func (w win) lost() int {
	n := 0
	for _, r := range w.peer.ratios(w.metric, w.base) {
		if w.group.metrics[w.metric].higher {
			r = 1 / r
		}
		if r >= 1 {
			n++
		}
	}
	return n
}

// why returns the reason of a win.
func (w win) why() string {
	for _, r := range reasons {
		if r.when(w) {
			return r.text(w)
		}
	}
	return noReason
}

// A claim is something that is said of belfry, and whether the figures bear it out.
type claim struct {
	text   string
	missed []string // where it does not hold, with the figure and the reason
	tried  int      // in how many places it was looked at
	failed int      // in how many of them it does not hold
}

// claims compares the sections with what belfry claims.
func claims(sections []*section) []claim {
	var all []claim
	for _, s := range sections {
		switch s.key {
		case "interceptors":
			all = append(all, againstFailsafe(s))
		case "calls":
			all = append(all, throughput(s))
		case "cluster":
			all = append(all, tail(s))
		}
	}
	return all
}

// miss says that the peer of w is better.
func (w win) miss(what string) string {
	return fmt.Sprintf("%s: %s, %s %s. %s", w.group.name, what, w.group.metrics[w.metric].name, formatRatio(w.peer.ratio(w.metric, w.base)), w.why())
}

// againstFailsafe is that belfry takes less than failsafe-go in each row.
func againstFailsafe(s *section) claim {
	c := claim{text: "Each interceptor takes fewer nanoseconds and allocations than failsafe-go's."}
	for _, g := range s.groups {
		b := g.base()
		for _, r := range g.rows {
			if !strings.HasPrefix(r.name, "failsafe-go") || !r.measured() {
				continue
			}
			for i, m := range g.metrics {
				if !m.judged {
					continue
				}
				c.tried++
				if ratio := g.better(i, r, b); !(ratio > 1) {
					c.failed++
					c.missed = append(c.missed, win{s, g, i, r, b, ratio}.miss(r.name))
				}
			}
		}
	}
	return c
}

// throughput is that whole calls through belfry are at least as many as through round_robin.
func throughput(s *section) claim {
	c := claim{text: "Whole calls through belfry's policy, with a full stack too, and with a hedge besides, are at least as many in a second as through bare round_robin."}
	for _, g := range s.groups {
		rr, calls := g.row(rrName), g.metric("calls/s")
		if rr == nil || calls < 0 {
			continue
		}
		for _, r := range g.rows {
			if r.role != base && r.role != ours || !r.measured() {
				continue
			}
			c.tried++
			ratio := r.ratio(calls, rr)
			if ratio >= 1 {
				continue
			}
			text := fmt.Sprintf("%s: %s times the calls of round_robin.", r.name, formatRatio(ratio))
			if n := (win{s, g, calls, rr, r, ratio}).lost(); n > 0 {
				text += fmt.Sprintf(" Within the noise: in %d of %d repeats it was the other way round.", n, len(r.values[calls]))
			}
			text += " The processors are the bound, so a call that costs more is made less often."
			for _, name := range []string{"CPU, µs", "allocations"} {
				if i := g.metric(name); i >= 0 {
					text += fmt.Sprintf(" %s: %s, bare %s.", upperFirst(name), formatValue(r.median(i), 3), formatValue(rr.median(i), 3))
				}
			}
			if r.less != "" {
				text += " " + r.less
			}
			c.failed++
			c.missed = append(c.missed, text)
		}
	}
	return c
}

// tail is that no client-only policy has a p99 that is lower by more than the margin.
func tail(s *section) claim {
	c := claim{text: "In every scenario the default has the lowest p99 of all policies that a client has, or is within 5 % of it."}
	for _, g := range s.groups {
		b, p99 := g.base(), g.metric("p99, ms")
		if b == nil || p99 < 0 || !b.measured() {
			continue
		}
		c.tried++
		var reasons []string
		ahead := make(map[string][]string) // by reason
		for _, r := range g.rows {
			if r == b || r.role != peer && r.role != ours || !r.measured() {
				continue
			}
			if ratio := g.better(p99, r, b); ratio < 1-margin {
				why := win{s, g, p99, r, b, ratio}.why()
				if ahead[why] == nil {
					reasons = append(reasons, why)
				}
				ahead[why] = append(ahead[why], r.name+" "+formatRatio(ratio))
			}
		}
		for _, why := range reasons {
			c.missed = append(c.missed, fmt.Sprintf("%s, p99 in ratio to the default's: %s. %s", g.name, strings.Join(ahead[why], ", "), why))
		}
		if len(reasons) > 0 {
			c.failed++
		}
	}
	return c
}

// formatRatio returns a ratio with two significant digits or two decimals.
func formatRatio(r float64) string {
	switch {
	case math.IsNaN(r):
		return "–"
	case math.IsInf(r, 0):
		return "∞"
	case r >= 10:
		return fmt.Sprintf("%.0f", r)
	default:
		return fmt.Sprintf("%.2f", r)
	}
}
