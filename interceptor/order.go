// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"fmt"
	"reflect"
	"slices"
	"time"

	"google.golang.org/grpc/grpclog"

	"github.com/belfry-go/belfry/internal/order"
)

var logger = grpclog.Component("belfry")

// check returns an error if the order of layers is not valid. It counts the boundaries
// and collects the advice.
func (p *program) check() error {
	for i, l := range p.layers {
		for j, m := range p.layers[:i] {
			if same(l, m) || same(l, bare(m)) || same(bare(l), m) {
				return fmt.Errorf("interceptor: layer %d (%s) is the same value as layer %d: each call would take from it twice", i, nameOf(l), j)
			}
		}
		if traitsOf(l)&Governs != 0 && !slices.ContainsFunc(p.layers[i+1:], waits) {
			return fmt.Errorf("interceptor: layer %d (%s) has nothing inside that can be not ready: put it outside of a limit, as in [%s > concurrency]", i, nameOf(l), nameOf(l))
		}
		if !isGateOnly(l) {
			p.boundaries++
		}
	}
	p.advice = order.Advice(described(p.layers))
	return nil
}

func waits(l Layer) bool { return traitsOf(l)&Waits != 0 }

// described returns what the order of layers depends on.
func described(layers []Layer) []order.Layer {
	ds := make([]order.Layer, len(layers))
	for i, l := range layers {
		t := traitsOf(l)
		_, only := l.(*onlyGate) // It leaves other calls alone.
		ds[i] = order.Layer{
			Name: nameOf(l), Waits: t&Waits != 0, Decides: t&Decides != 0, Governs: t&Governs != 0,
			Sheds: t&Sheds != 0 && !only, Retries: t&Retries != 0, Hedges: t&Hedges != 0,
		}
		if t, ok := bare(l).(interface {
			Timeout(method string) time.Duration
		}); ok {
			ds[i].Timeout = t.Timeout("")
		}
	}
	return ds
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
