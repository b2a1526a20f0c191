// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package layertest

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"github.com/belfry-go/belfry/interceptor"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// counter is a gate that counts what it has given out.
type counter struct {
	interceptor.GateOnly
	held     atomic.Int64
	outcomes [4]atomic.Int64
}

func (l *counter) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, c *interceptor.Call, w interceptor.Wait) error {
		l.held.Add(1)
		c.Hold(l, 7)
		return inner.Admit(ctx, c, w)
	})
}

func (l *counter) Release(token int64, o interceptor.Outcome, err error) {
	if token == 7 && (err == nil) == (o == interceptor.OK) {
		l.held.Add(-1)
	}
	l.outcomes[o].Add(1)
}

func (l *counter) atRest() error {
	if n := l.held.Load(); n != 0 {
		return fmt.Errorf("%d tickets held, want 0", n)
	}
	return nil
}

// through is a layer in the call path, with a gate inside and one outside.
type through struct {
	outer *counter
}

func (l *through) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return l.outer.WrapGate(inner)
}

func (l *through) WrapCall(next interceptor.Next, _ interceptor.Gate) interceptor.Next {
	return next
}

func TestAGateIsAtRestAfterEveryEndOfEveryKindOfCall(t *testing.T) {
	Run(t, func() (interceptor.Layer, func() error) {
		l := new(counter)
		return l, l.atRest
	})
}

func TestALayerInTheCallPathIsAtRestAfterEveryEndOfEveryKindOfCall(t *testing.T) {
	Run(t, func() (interceptor.Layer, func() error) {
		l := &through{outer: new(counter)}
		return l, l.outer.atRest
	})
}

// A kit that finds nothing must be able to find something.
func TestRestFindsATicketThatWasNotGivenBack(t *testing.T) {
	l := new(counter)
	f := newFixture(t, []interceptor.Layer{l})
	if err := f.call(f.ctx, f.conn, interceptor.Unary, "ok"); err != nil {
		t.Fatal(err)
	}
	l.held.Add(1) // As if a Release had been lost.
	if err := l.atRest(); err == nil {
		t.Error("atRest() = nil with a ticket held, want an error")
	}
}
