// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"fmt"
	"reflect"
	"time"

	"google.golang.org/grpc/grpclog"
)

var logger = grpclog.Component("belfry")

// check returns an error if the order of layers is not valid. It counts the boundaries
// and collects the advice.
func (p *program) check() error {
	for i, l := range p.layers {
		inside := p.layers[i+1:]
		for j, m := range p.layers[:i] {
			if same(l, m) || same(l, bare(m)) || same(bare(l), m) {
				return fmt.Errorf("interceptor: layer %d (%s) is the same value as layer %d: each call would take from it twice", i, nameOf(l), j)
			}
		}
		if traitsOf(l)&Governs != 0 && !anyHas(inside, Waits) {
			return fmt.Errorf("interceptor: layer %d (%s) has nothing inside that can be not ready: put it outside of a limit, as in [%s > concurrency]", i, nameOf(l), nameOf(l))
		}
		if !isGateOnly(l) {
			p.boundaries++
		}
	}
	p.advise()
	return nil
}

func anyHas(layers []Layer, t Traits) bool {
	for _, l := range layers {
		if traitsOf(l)&t != 0 {
			return true
		}
	}
	return false
}

// advise collects what is legal and surprising.
func (p *program) advise() {
	say := func(format string, args ...any) { p.advice = append(p.advice, fmt.Sprintf(format, args...)) }
	for i, outer := range p.layers {
		t := traitsOf(outer)
		shed := false // Inside a load shed, where nothing waits.
		for _, inner := range p.layers[i+1:] {
			u := traitsOf(inner)
			if u&Governs != 0 {
				shed = sheds(inner)
			}
			// A rate both waits and decides: two rates are right in any order.
			if !shed && t&Decides != 0 && u&Waits != 0 && (t&Waits == 0 || u&Decides == 0) {
				say("%s is outside %s: it decides when a call arrives and not when it is sent, so calls that it let pass wait and are sent later, when its decision may be wrong; put it inside", nameOf(outer), nameOf(inner))
				break
			}
		}
		for _, inner := range p.layers[i+1:] {
			u := traitsOf(inner)
			if u&Waits != 0 || t&Governs == 0 {
				break
			}
			if sheds(inner) {
				say("%s is outside %s, which lets no call wait: it never acts; put it inside", nameOf(outer), nameOf(inner))
				break
			}
		}
		for _, inner := range p.layers[i+1:] {
			if t&traitsOf(inner)&(Retries|Hedges) != 0 {
				say("%s is outside %s: each of its attempts makes attempts of its own, so a call makes up to as many as both multiplied; leave one out", nameOf(outer), nameOf(inner))
			}
			if t&Retries != 0 && traitsOf(inner)&Hedges != 0 {
				say("%s is outside %s: each of its attempts may be hedged, so a call makes up to as many attempts as both multiplied; put the hedge outside", nameOf(outer), nameOf(inner))
			}
			if a, b := timeoutOf(outer), timeoutOf(inner); a > 0 && b >= a {
				say("%s (%v) is inside %s (%v), which ends first: it never acts; give it less time", nameOf(inner), b, nameOf(outer), a)
			}
		}
	}
}

// sheds reports whether no call waits inside l. An [Only] leaves other calls alone.
func sheds(l Layer) bool {
	_, only := l.(*onlyGate)
	return !only && traitsOf(l)&Sheds != 0
}

// timeoutOf returns the timeout of a layer, zero if it has none.
func timeoutOf(l Layer) time.Duration {
	if t, ok := bare(l).(interface{ Timeout() time.Duration }); ok {
		return t.Timeout()
	}
	return 0
}

// Advice returns what is legal in the order of the layers and rarely meant, one sentence
// each: a breaker, throttle or rate outside what waits, a buffer or fail-fast outside a
// load shed, an inner timeout that is not shorter than an outer one, a retry outside a
// hedge or another retry. The package documentation has the arithmetic. NewStack logs it
// once. Later there is one more, which is logged as well, if a call was made on a channel
// whose service config has a retryPolicy, and the stack retries or hedges.
func (s *Stack) Advice() []string {
	advice := append([]string(nil), s.prog.Load().advice...)
	if a := s.retryPolicy.Load(); a != nil {
		advice = append(advice, *a)
	}
	return advice
}

func (s *Stack) logAdvice() {
	for _, a := range s.Advice() {
		logger.Warningf("stack %v: %s", s, a)
	}
}

// readyPlaces returns the indexes of the layers before which readyGate asks for the
// readiness of the connection. A call that waits for a connection should hold nothing
// meanwhile, so that is directly inside the last layer that governs waiting, or
// outermost if there is none, and again inside each layer further in that makes further
// attempts, because those do not pass the first gate.
func readyPlaces(layers []Layer) map[int]bool {
	first := 0
	for i, l := range layers {
		if traitsOf(l)&Governs != 0 {
			first = i + 1
		}
	}
	places := map[int]bool{first: true}
	for i := first; i < len(layers); i++ {
		if _, isForeign := layers[i].(*foreign); isForeign || traitsOf(layers[i])&(Retries|Hedges) != 0 {
			places[i+1] = true
		}
	}
	return places
}

// same reports whether l and m are one value. It is also true of two layers without
// state, such as empty structs: they would do no harm twice, but no good either.
func same(l, m Layer) bool {
	t := reflect.TypeOf(l)
	return t == reflect.TypeOf(m) && reflect.ValueOf(l).Comparable() && reflect.ValueOf(m).Comparable() && l == m
}

// bare returns the layer that l applies to the calls that match, if it is an [Only].
// The same layer may be behind several matchers, of which a call matches one, but not
// also by itself.
func bare(l Layer) Layer {
	for {
		switch o := l.(type) {
		case *onlyGate:
			l = o.layer
		case *onlyCall:
			l = o.layer
		default:
			return l
		}
	}
}
