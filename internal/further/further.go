// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package further makes the further attempts of retry and hedge. Those decide which calls
// get one, and when. This package pays for it, waits, has it admitted and sent, and takes
// the payment back if it was not sent.
package further

import (
	"context"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/check"
)

// Options are the common options of layers that make further attempts.
type Options struct {
	Name       string
	Budget     *budget.Budget
	Shared     bool // Budget was given.
	Idempotent func(method string) bool
}

// SetBudget is the option WithBudget.
func (o *Options) SetBudget(errs *check.Errors, b *budget.Budget) {
	errs.NotNil(b == nil, "WithBudget", "a budget")
	o.Budget, o.Shared = b, true
}

// SetIdempotent is the option WithIdempotent.
func (o *Options) SetIdempotent(errs *check.Errors, f func(method string) bool) {
	errs.NotNil(f == nil, "WithIdempotent", "a function")
	o.Idempotent = f
}

// CheckBudget checks the field Budget of a Config. given is the field, and filled the same
// with the layer's defaults. WithBudget replaces both.
func (o *Options) CheckBudget(errs *check.Errors, given, filled budget.Config) {
	if o.Shared {
		errs.Require(given == (budget.Config{}), "Budget", given, "must not be set if WithBudget is used")
		return
	}
	_, err := budget.New(filled)
	errs.Nested("Budget", err)
}

// A Maker is the part of a layer that makes further attempts.
type Maker struct {
	Options
	exhausted *interceptor.Refusal
	cancelled *interceptor.Refusal
}

// NewMaker returns a Maker with a budget made of own, unless o has one.
func NewMaker(o Options, own budget.Config) (*Maker, error) {
	m := &Maker{
		Options:   o,
		exhausted: interceptor.Refuse(o.Name, interceptor.ReasonBudget, "the budget for further attempts is spent"),
		cancelled: interceptor.Refuse(o.Name, interceptor.ReasonCancelled, "the caller gave up before the next attempt"),
	}
	if !o.Shared {
		var err error
		if m.Budget, err = budget.New(own); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// Update changes the configuration of the budget if it is the layer's own.
func (m *Maker) Update(own budget.Config) error {
	if m.Shared {
		return nil
	}
	return m.Budget.Update(own)
}

// May reports whether calls of the method may be sent more than once; see
// [attempt.May].
func (m *Maker) May(declared bool, method string) bool {
	return attempt.May(declared, m.Idempotent, method)
}

// Gate returns the gate of the layer, which counts calls for the budget.
func (m *Maker) Gate(inner interceptor.Gate) interceptor.Gate {
	return &gate{maker: m, inner: inner}
}

type gate struct {
	maker *Maker
	inner interceptor.Gate
}

func (g *gate) Admit(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
	g.maker.Budget.Count(a, g.maker.Name)
	return g.inner.Admit(ctx, a, w)
}

// A Call is a call of which a layer can make further attempts. It is immutable.
type Call struct {
	*interceptor.Call
	Maker  *Maker
	Origin interceptor.Origin // The call as the layer passes it on.
	Again  interceptor.Again
}

// Of returns a Call by value.
func (m *Maker) Of(c *interceptor.Call, o interceptor.Origin, again interceptor.Again) Call {
	return Call{Call: c, Maker: m, Origin: o, Again: again}
}

// Plan describes a further attempt to make.
type Plan struct {
	Delay time.Duration // How long to wait before it.
	// Run carries it out. ctx is that of the attempt.
	Run func(ctx context.Context, a *interceptor.Call) error
}

// An Attempt is a further attempt that was admitted and has ended, or for a stream is
// open.
type Attempt struct {
	Call *interceptor.Call
	Err  error
	Sent bool // gRPC made a stream for it. If it did not, it costs nothing.
}

// Make makes a further attempt. If none was made, because the budget is spent, the wait
// was cut short or a layer inside refused it, err is a refusal that says so. Then the
// observer was told, and the budget got its payment back. ctx may end earlier than the
// call. Make may be called concurrently.
func (c *Call) Make(ctx context.Context, p Plan) (a Attempt, err error) {
	m, o, now := c.Maker, c.Observer(), interceptor.Now()
	if !m.Budget.Withdraw(now) {
		o.Budget(m.Name, m.Budget.Balance())
		c.Internals().ReportRefusal(m.exhausted)
		return Attempt{}, m.exhausted
	}
	o.Budget(m.Name, m.Budget.Balance())
	refund := true
	defer func() {
		if refund {
			m.Budget.Refund(now)
			o.Budget(m.Name, m.Budget.Balance())
		}
	}()
	if p.Delay > 0 {
		if err := c.sleep(ctx, now.Add(p.Delay)); err != nil {
			return Attempt{}, err
		}
	}
	f, err := c.Again(ctx, &c.Origin, interceptor.Forever)
	if err != nil {
		return Attempt{}, err // The stack has told the observer.
	}
	refund = false
	f.Internals().WantTrailer()
	err = p.Run(ctx, f)
	refund = !f.Internals().Outcome(ctx, err).Sent()
	if r, ok := interceptor.AsRefusal(err); ok && r.NotSent() {
		if ctx.Err() != context.Canceled { // Otherwise nobody wants the attempt any more.
			c.Internals().ReportRefusal(err)
		}
		return Attempt{}, err
	}
	return Attempt{Call: f, Err: err, Sent: !refund}, nil
}

// sleep waits until a moment, unless the call, its stack or its connection ends first.
func (c *Call) sleep(ctx context.Context, until interceptor.Instant) error {
	parked, done := c.Park(ctx)
	defer done()
	if interceptor.Forever.Sleep(parked, until) == nil {
		return nil
	}
	err := interceptor.Ended(parked, c.Maker.Name)
	if ctx.Err() == nil { // The end of ctx is reported as the end of the call.
		c.Internals().ReportRefusal(err)
	}
	return err
}

// Refused returns the error of a call whose last attempt ended with last, and whose
// further attempt was refused with refused. It is nil if last is.
func (c *Call) Refused(ctx context.Context, refused, last error) error {
	switch {
	case last == nil:
		return nil
	case ctx.Err() == context.Canceled && reason(refused) == interceptor.ReasonCancelled:
		return c.Maker.cancelled.Because(last, true)
	}
	return interceptor.RefusedAgain(refused, last)
}

func reason(err error) interceptor.Reason {
	if r, ok := interceptor.AsRefusal(err); ok {
		return r.Reason
	}
	return ""
}
