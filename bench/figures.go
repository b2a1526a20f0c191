// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"math"

	"github.com/belfry-go/belfry/internal/loadgen"
)

// A role says what a row is in its group.
type role int

const (
	peer      role = iota // does the same job, without knowing more
	ours                  // belfry's, but not what its users get by default
	base                  // belfry's, to which the others are set in ratio
	bound                 // what nobody can do without, or an oracle that knows what nobody can
	neighbour             // does the job elsewhere: a proxy
)

// A metric is something that is measured of all rows of a group.
type metric struct {
	name   string // head of the column, with its unit
	digits int    // significant ones
	higher bool   // higher is better
	// judged metrics are compared: where a peer is better, the page says so.
	judged bool
}

// A row is a subject and what was measured of it.
type row struct {
	name   string
	role   role
	values [][]float64 // by metric, by repeat; empty if it was not measured
	// less is what it does less than the base, as a full sentence: a reason to be cheaper.
	// It is about its code, and says nothing of figures.
	less string
	like string  // the row of belfry's that does the same, if that is not the base
	note string  // why it was not measured
	busy float64 // the share of the machine's processors that were used, from 0 to 1; NaN if not known
}

// A group is rows that do the same job, measured in turn in each repeat.
type group struct {
	name    string
	about   string
	metrics []metric
	rows    []*row
}

// A section is a part of the page.
type section struct {
	key    string // what -only calls it
	title  string
	about  string
	groups []*group
	chart  string // the name of its file, empty if there is none
}

// add appends a repeat of the row's values, in the order of the metrics.
func (r *row) add(values ...float64) {
	if r.values == nil {
		r.values = make([][]float64, len(values))
	}
	for i, v := range values {
		r.values[i] = append(r.values[i], v)
	}
}

// measured reports whether the row has values.
func (r *row) measured() bool { return len(r.values) > 0 }

// median returns the median of metric i, NaN if it was not measured.
func (r *row) median(i int) float64 {
	if !r.measured() {
		return math.NaN()
	}
	return loadgen.Median(r.values[i])
}

// ratios returns metric i of r in ratio to that of o, for each repeat that both have.
func (r *row) ratios(i int, o *row) []float64 {
	var all []float64
	if r.measured() && o.measured() {
		for k := range min(len(r.values[i]), len(o.values[i])) {
			all = append(all, quotient(r.values[i][k], o.values[i][k]))
		}
	}
	return all
}

// ratio returns the median of the ratios, NaN if there are none.
func (r *row) ratio(i int, o *row) float64 {
	all := r.ratios(i, o)
	if len(all) == 0 {
		return math.NaN()
	}
	return loadgen.Median(all)
}

// quotient is a/b, where two zeros are equal.
func quotient(a, b float64) float64 {
	if a == b {
		return 1
	}
	return a / b
}

// base returns the row to which the others are set in ratio, nil if there is none.
func (g *group) base() *row {
	for _, r := range g.rows {
		if r.role == base {
			return r
		}
	}
	return nil
}

// row returns the row of a name, nil if there is none.
func (g *group) row(name string) *row {
	for _, r := range g.rows {
		if r.name == name {
			return r
		}
	}
	return nil
}

// metric returns the position of the metric of a name, -1 if there is none.
func (g *group) metric(name string) int {
	for i, m := range g.metrics {
		if m.name == name {
			return i
		}
	}
	return -1
}
