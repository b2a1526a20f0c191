// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package further makes the further attempts of retry and hedge. Those decide which calls
// get one, and when. This package pays for it, waits, has it admitted and sent, and takes
// the payment back if it was not sent.
package further

import (
	"context"
	"fmt"
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
		errs.Require(ok && name[0] == '/' && service != "" && !strings.Contains(method, "/"), fmt.Sprintf("Methods[%d]", i), name,
			`must be a method, "/pkg.Service/Method", or a service, "/pkg.Service/"`)
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
	exhausted, cancelled, notIdempotent *interceptor.Refusal // Made once.
	// declared says of methods whose file is linked in whether they are declared
	// idempotent. It spares a call the lock of protobuf's registry.
	declared sync.Map // Of string to bool.
}

// NewMaker returns a Maker with a budget made of own, unless o has one.
func NewMaker(o Options, own budget.Config) (*Maker, error) {
	m := &Maker{
		Options:       o,
		exhausted:     interceptor.Refuse(o.Name, interceptor.ReasonBudget, "the budget for further attempts is spent"),
		cancelled:     interceptor.Refuse(o.Name, interceptor.ReasonCancelled, "the caller gave up before the next attempt"),
		notIdempotent: interceptor.Refuse(o.Name, interceptor.ReasonNotIdempotent, "not repeated, because nothing says that the method is idempotent (see Config.Methods)"),
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

// May reports whether calls of the method may be carried out more than once: the Config
// or WithIdempotent says so, or the method's .proto file.
func (m *Maker) May(allowed *Methods, method string) bool {
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

// NotIdempotent returns the error of a call whose attempt ended with last, and is not
// repeated because it was sent and its method may not be carried out again. It is nil if
// last is. It tells the observer.
func (c *Call) NotIdempotent(last error) error {
	c.Internals().ReportRefusal(c.Maker.notIdempotent)
	if last == nil {
		return nil
	}
	return interceptor.RefusedAgain(c.Maker.notIdempotent, last)
}

func reason(err error) interceptor.Reason {
	if r, ok := interceptor.AsRefusal(err); ok {
		return r.Reason
	}
	return ""
}
