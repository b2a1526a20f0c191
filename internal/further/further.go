// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package further makes the further attempts of retry and hedge. Those decide which calls
// get one, and when. This package pays for it, waits, has it admitted and sent, and takes
// the payment back if it was not sent.
package further

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"sync"
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

// Methods are the methods that a Config allows to be carried out more than once. It is
// immutable.
type Methods struct {
	all   bool
	named map[string]struct{} // "/service/method", or "/service/" for all of a service.
}

// CheckMethods checks the fields AllMethods and Methods of a Config.
func CheckMethods(errs *check.Errors, all bool, methods []string) Methods {
	errs.Require(!all || len(methods) == 0, "Methods", methods, "must be empty if AllMethods is true")
	m := Methods{all: all, named: make(map[string]struct{}, len(methods))}
	for i, name := range methods {
		service, method, ok := strings.Cut(strings.TrimPrefix(name, "/"), "/")
		ok = ok && name[0] == '/' && service != "" && !strings.Contains(method, "/")
		ok = ok && !strings.ContainsAny(name, "* ") // A pattern would match nothing.
		errs.Require(ok, fmt.Sprintf("Methods[%d]", i), name, `must be a method, "/pkg.Service/Method", or a service, "/pkg.Service/"`)
		m.named[name] = struct{}{}
	}
	return m
}

func (m *Methods) has(method string) bool {
	if m.all || len(m.named) == 0 {
		return m.all
	}
	if _, ok := m.named[method]; ok {
		return true
	}
	_, ok := m.named[method[:strings.LastIndexByte(method, '/')+1]]
	return ok
}

// A Maker is the part of a layer that makes further attempts.
type Maker struct {
	Options
	exhausted, crowded, cancelled, undeclared, unsafe *interceptor.Refusal // Made once.
	// declared says of methods whose file is linked in whether they are declared
	// idempotent. It spares a call the lock of protobuf's registry.
	declared sync.Map // Of string to bool.
}

// NewMaker returns a Maker with a budget made of own, unless o has one.
func NewMaker(o Options, own budget.Config) (*Maker, error) {
	m := &Maker{
		Options:   o,
		exhausted: interceptor.Refuse(o.Name, interceptor.ReasonBudget, "the budget for further attempts is spent"),
		crowded:   interceptor.Refuse(o.Name, interceptor.ReasonBudget, "there are as many further attempts at once as the budget's MaxConcurrent allows"),
		cancelled: interceptor.Refuse(o.Name, interceptor.ReasonCancelled, "the caller gave up before the next attempt"),
		undeclared: interceptor.Refuse(o.Name, interceptor.ReasonNotIdempotent,
			"not repeated, because nothing says that the method is idempotent: if it is, name it in Methods, declare it in its .proto file, or say attempts.Idempotent(true) of the call"),
		unsafe: interceptor.Refuse(o.Name, interceptor.ReasonNotIdempotent, "not repeated, because the call says attempts.Idempotent(false)"),
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

// May reports whether the call may be carried out more than once: the call itself says so,
// the Config, WithIdempotent or the method's .proto file.
func (m *Maker) May(allowed *Methods, c *interceptor.Call) bool {
	if p := c.Internals().PerCall(); p.Idempotent || p.Unsafe {
		return p.Idempotent
	}
	method := c.Method()
	if allowed.has(method) || m.Idempotent != nil && m.Idempotent(method) {
		return true
	}
	if v, ok := m.declared.Load(method); ok {
		return v.(bool)
	}
	yes, known := attempt.Declared(method)
	if known { // Others may be any number.
		m.declared.Store(method, yes)
	}
	return yes
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

// Plan describes a further attempt to make.
type Plan struct {
	Hedge  bool          // whether a hedge makes it
	Delay  time.Duration // How long to wait before it.
	After  error         // What the attempt before it failed with; nil if it did not.
	Reason string        // Why it is made.
	// Run carries it out. ctx is that of the attempt.
	Run func(ctx context.Context, a *interceptor.Call) error
}

// An Attempt is a further attempt that was admitted and has ended, or for a stream is
// open.
type Attempt struct {
	Call    *interceptor.Call
	Err     error
	Outcome interceptor.Outcome // If it was not sent, it costs nothing.
}

// Make makes a further attempt. If none was made, because the budget is spent, the wait
// was cut short or a layer inside refused it, err is a refusal that says so. Then the
// observer was told, and the budget got its payment back. ctx may end earlier than the
// call. Make may be called concurrently.
func (c *Call) Make(ctx context.Context, p Plan) (a Attempt, err error) {
	m, o := c.Maker, c.Observer()
	pay := &payment{m, o, interceptor.Now()}
	if refused := m.pay(pay.at); refused != nil {
		o.Budget(m.Name, m.Budget.Balance())
		c.Internals().ReportRefusal(refused)
		return Attempt{}, refused
	}
	held := false
	defer func() {
		if !held { // Or a panic.
			pay.end(false)
		}
	}()
	o.Budget(m.Name, m.Budget.Balance())
	if p.Delay > 0 {
		if err := c.sleep(ctx, pay.at.Add(p.Delay)); err != nil {
			return Attempt{}, err
		}
	}
	f, err := c.Again(ctx, &c.Origin, interceptor.Forever)
	if err != nil {
		return Attempt{}, err // The stack has told the observer.
	}
	f.Internals().Hold(pay)
	held = true
	f.Internals().WantTrailer()
	c.announce(ctx, f, p)
	err = p.Run(ctx, f)
	outcome := f.Internals().Outcome(ctx, err)
	if r, ok := interceptor.AsRefusal(err); ok && r.NotSent() {
		if ctx.Err() != context.Canceled { // Otherwise nobody wants the attempt any more.
			c.Internals().ReportRefusal(err)
		}
		return Attempt{}, err
	}
	return Attempt{Call: f, Err: err, Outcome: outcome}, nil
}

// announce tells the observer and the call's report why f is made. If the observer panics
// it gives f up.
func (c *Call) announce(ctx context.Context, f *interceptor.Call, p Plan) {
	told := false
	defer func() {
		if !told {
			f.GiveUp()
		}
	}()
	f.Internals().SetWhy(attempt.Why{Layer: c.Maker.Name, Reason: p.Reason, Delay: p.Delay})
	if ctx.Err() == nil { // Otherwise nobody wants the attempt any more.
		c.Observer().Further(f.Internals().Seen(), c.Maker.Name, interceptor.FurtherAttempt{Hedge: p.Hedge, Attempt: f.Attempt(), Reason: p.Reason, Delay: p.Delay, After: p.After})
	}
	told = true
}

// Readings yields the balance of the budget.
func (m *Maker) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		yield(interceptor.Reading{Layer: m.Name, What: interceptor.ReadingBudget, Value: m.Budget.Balance()})
	}
}

// A payment is what the budget got for a further attempt. The attempt holds it as a ticket.
type payment struct {
	maker *Maker
	obs   interceptor.Observer
	at    interceptor.Instant
}

// pay pays for a further attempt, or refuses it.
func (m *Maker) pay(now interceptor.Instant) *interceptor.Refusal {
	if !m.Budget.Begin() {
		return m.crowded
	}
	if !m.Budget.Withdraw(now) {
		m.Budget.End()
		return m.exhausted
	}
	return nil
}

// end ends the attempt. One that was not sent gets its payment back.
func (p *payment) end(sent bool) {
	p.maker.Budget.End()
	if !sent {
		p.maker.Budget.Refund(p.at)
		p.obs.Budget(p.maker.Name, p.maker.Budget.Balance())
	}
}

// Release ends the attempt.
func (p *payment) Release(_ int64, e interceptor.End) { p.end(e.Outcome.Sent()) }

// HedgeFired tells the observer and the call's report of an extra attempt.
func (c *Call) HedgeFired() {
	c.Observer().HedgeFired(c.Internals().Seen(), c.Maker.Name)
	c.Internals().PerCall().Record.Hedge(false)
}

// HedgeWon tells them that the call's result is an extra attempt's.
func (c *Call) HedgeWon() {
	c.Observer().HedgeWon(c.Internals().Seen(), c.Maker.Name)
	c.Internals().PerCall().Record.Hedge(true)
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

// Forbidden tells the observer that c gets no further attempt because it may not be
// carried out more than once, and returns the refusal.
func (m *Maker) Forbidden(c *interceptor.Call) *interceptor.Refusal {
	why := m.undeclared
	if c.Internals().PerCall().Unsafe {
		why = m.unsafe
	}
	c.Internals().ReportRefusal(why)
	return why
}

// NotIdempotent returns the error of a call whose attempt ended with last, and is not
// repeated because it was sent and its method may not be carried out again. It is nil if
// last is. It tells the observer.
func (c *Call) NotIdempotent(last error) error {
	why := c.Maker.Forbidden(c.Call)
	if last == nil {
		return nil
	}
	return interceptor.RefusedAgain(why, last)
}

func reason(err error) interceptor.Reason {
	if r, ok := interceptor.AsRefusal(err); ok {
		return r.Reason
	}
	return ""
}
