// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"math"
	"sync/atomic"
)

// A method is what a channel knows of one method, or of all methods for which the table
// has no room.
type method struct {
	name  string
	index uint32

	fleet fleet         // the means of its divided latencies, and of the attempts in flight when those attempts were sent
	count atomic.Uint64 // how many samples it had, as float64 bits; halved when a method has manyCalls
	scale atomic.Uint64 // G/g within 1/256, as float64 bits; 0 means 1
	_     [8]byte
}

// scaled returns G/g: what the latencies of the method are multiplied by.
func (m *method) scaled() float64 {
	if w := m.scale.Load(); w != 0 {
		return math.Float64frombits(w)
	}
	return 1
}

// methods is the table of a channel. A new method replaces the whole table.
type methods struct {
	all    []*method // the first is for all methods without one of their own
	byName map[string]*method
}

// Up to few methods are compared one by one. A name is almost always the same string as
// the last time, and then the comparison is one of two pointers.
const few = 4

func (t *methods) find(name string) *method {
	if len(t.all) <= few+1 {
		for _, m := range t.all[1:] {
			if m.name == name {
				return m
			}
		}
		return nil
	}
	return t.byName[name]
}

// method returns the method of a name. It adds the method if the table has room.
func (e *ExpectedLatency) method(name string) *method {
	t := e.methods.Load()
	if m := t.find(name); m != nil {
		return m
	}
	if len(t.all) >= e.params.Load().methods {
		return t.all[0]
	}
	return e.addMethod(name)
}

func (e *ExpectedLatency) addMethod(name string) *method {
	e.mu.Lock()
	defer e.mu.Unlock()
	old := e.methods.Load()
	if m := old.find(name); m != nil {
		return m
	}
	if len(old.all) >= e.params.Load().methods {
		return old.all[0]
	}
	m := &method{name: name, index: uint32(len(old.all))}
	t := &methods{all: append(old.all[:len(old.all):len(old.all)], m), byName: make(map[string]*method, len(old.all))}
	for _, m := range t.all[1:] {
		t.byName[m.name] = m
	}
	e.methods.Store(t)
	return m
}

// unit returns the latency of the average call: the geometric mean of the methods'
// means, each weighted by how often the method is called. An arithmetic mean would be
// that of rare slow methods, and would jump with each of their samples.
func (t *methods) unit() float64 {
	var sum, weight float64
	var last float64
	known := 0
	for _, m := range t.all {
		if g := m.fleet.mean(); g > 0 {
			n := math.Float64frombits(m.count.Load())
			sum += n * math.Log(g)
			weight += n
			last = g
			known++
		}
	}
	if known < 2 {
		return last
	}
	return math.Exp(sum / weight)
}

// rescale sets the scales of methods for a unit. A scale that changes by 1/256 at most is
// not written, because all cores read it.
func (t *methods) rescale(unit float64) {
	for _, m := range t.all {
		g, old := m.fleet.mean(), m.scaled()
		if g <= 0 {
			continue
		}
		if scale := unit / g; math.Abs(scale-old) > old/256 {
			m.scale.Store(math.Float64bits(scale))
		}
	}
}

// called counts n samples of a method. It halves all counts when one is large, so that
// they follow a change of how often methods are called.
func (t *methods) called(m *method, n int) {
	count := math.Float64frombits(m.count.Load()) + float64(n)
	m.count.Store(math.Float64bits(count))
	if count > manyCalls {
		for _, m := range t.all {
			m.count.Store(math.Float64bits(math.Float64frombits(m.count.Load()) / 2))
		}
	}
}

const manyCalls = 2000
