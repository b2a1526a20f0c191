// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"path"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/adaptivelimiter"
	"github.com/failsafe-go/failsafe-go/adaptivethrottler"
	"github.com/failsafe-go/failsafe-go/budget"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/failsafegrpc"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	failsafetimeout "github.com/failsafe-go/failsafe-go/timeout"
	"github.com/go-kratos/aegis/circuitbreaker/sre"
	ggmratelimit "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/ratelimit"
	ggmretry "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/retry"
	ggmtimeout "github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/timeout"
	"github.com/sony/gobreaker/v2"
	zerobreaker "github.com/zeromicro/go-zero/core/breaker"
	"golang.org/x/sync/semaphore"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/filter"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

// A contender does the job of a group of interceptors.
type contender struct {
	name string
	role role
	less string
	make func() (grpc.UnaryClientInterceptor, error)
}

// A contest is the contenders for one job.
type contest struct {
	name, about string
	// failures is how many calls fail first, with UNAVAILABLE.
	failures int
	// calls is how many calls succeed after that, before refused and the measurement.
	calls int
	// refused says that calls are refused from then on; otherwise they succeed.
	refused    bool
	contenders []contender
}

// stackOf returns a stack's interceptor.
func stackOf(specs ...interceptor.Spec) func() (grpc.UnaryClientInterceptor, error) {
	return func() (grpc.UnaryClientInterceptor, error) {
		s, err := interceptor.NewStack(specs...)
		if err != nil {
			return nil, err
		}
		return s.UnaryClientInterceptor(), nil
	}
}

// always returns the interceptor that make makes, which cannot fail.
func always(make func() grpc.UnaryClientInterceptor) func() (grpc.UnaryClientInterceptor, error) {
	return func() (grpc.UnaryClientInterceptor, error) { return make(), nil }
}

// safe returns failsafe-go's interceptor of the policies that make makes.
func safe(make func() []failsafe.Policy[any]) func() (grpc.UnaryClientInterceptor, error) {
	return always(func() grpc.UnaryClientInterceptor { return failsafegrpc.NewUnaryClientInterceptor(make()...) })
}

// one is a list of one policy.
func one(p failsafe.Policy[any]) []failsafe.Policy[any] { return []failsafe.Policy[any]{p} }

// failsafeSix are the policies of failsafe-go that come closest to sixLayers. It has none
// that sheds and none that is a buffer: the bulkhead waits.
func failsafeSix() []failsafe.Policy[any] {
	return []failsafe.Policy[any]{
		failsafetimeout.New[any](time.Hour),
		failsafegrpc.NewRetryPolicyBuilder[any]().WithBudget(budget.New()).Build(),
		bulkhead.NewBuilder[any](1000).WithMaxWaitTime(time.Second).Build(),
		ratelimiter.NewBursty[any](1e9, time.Second),
		circuitbreaker.NewWithDefaults[any](),
		adaptivethrottler.NewWithDefaults[any](),
	}
}

// sixLayers do with calls what a service typically asks for.
func sixLayers() []interceptor.Spec {
	return []interceptor.Spec{
		timeout.Config{Timeout: time.Hour},
		retry.Config{AllMethods: true},
		concurrency.Config{Limit: 1000},
		ratelimit.Config{Limit: 1e9, Burst: 1e9},
		breaker.Config{},
		throttle.Config{},
	}
}

const noQueue = "It takes no place in a queue, gives no token back for what was never sent, and serves no priorities."

// contests returns what is compared. Each contender is made again for each repeat.
func contests() []contest {
	failure := func(err error) bool { return status.Code(err) == codes.Unavailable }
	return []contest{
		{
			name:  "six layers",
			about: "Timeout, retry with a budget, limit of concurrency, rate, breaker and throttle; and grpc's own chain of six interceptors that only pass calls on.",
			contenders: []contender{
				{"belfry", base, "", stackOf(sixLayers()...)},
				{"failsafe-go", peer, "", safe(failsafeSix)},
				{"grpc's chain of six that do nothing", peer, "Its interceptors do nothing at all.", always(func() grpc.UnaryClientInterceptor { return calltest.Chain(6) })},
			},
		},
		{
			name:  "retry",
			about: "The call succeeds the first time.",
			contenders: []contender{
				{"belfry retry", base, "", stackOf(retry.Config{AllMethods: true})},
				{"failsafe-go retrypolicy", peer, "It has no budget.", safe(func() []failsafe.Policy[any] { return one(failsafegrpc.NewRetryPolicyBuilder[any]().Build()) })},
				{"failsafe-go retrypolicy with budget", peer, "", safe(func() []failsafe.Policy[any] {
					return one(failsafegrpc.NewRetryPolicyBuilder[any]().WithBudget(budget.New()).Build())
				})},
				{"go-grpc-middleware retry", peer, "It has no budget, and does not find out whether a call was sent.", always(func() grpc.UnaryClientInterceptor {
					return ggmretry.UnaryClientInterceptor(ggmretry.WithMax(3), ggmretry.WithCodes(codes.Unavailable))
				})},
			},
		},
		{
			name:  "hedge",
			about: "No call takes long enough to be hedged.",
			contenders: []contender{
				{"belfry hedge", base, "", stackOf(hedge.Config{AllMethods: true, Delay: time.Hour})},
				{"failsafe-go hedgepolicy", peer, "It has no budget, and attempts share the message that the reply goes to.", safe(func() []failsafe.Policy[any] { return one(hedgepolicy.NewWithDelay[any](time.Hour)) })},
				{"failsafe-go hedgepolicy with budget", peer, "Attempts share the message that the reply goes to.", safe(func() []failsafe.Policy[any] {
					return one(hedgepolicy.NewBuilderWithDelay[any](time.Hour).WithBudget(budget.New()).Build())
				})},
			},
		},
		{
			name:  "timeout",
			about: "Shorter than the deadline of the call, so that the call gets a context of its own.",
			contenders: []contender{
				{"belfry timeout", base, "", stackOf(timeout.Config{Timeout: time.Minute})},
				{"failsafe-go timeout", peer, "", safe(func() []failsafe.Policy[any] { return one(failsafetimeout.New[any](time.Minute)) })},
				{"go-grpc-middleware timeout", peer, "It is `context.WithTimeout` and nothing else: it does not say whose deadline passed.", always(func() grpc.UnaryClientInterceptor { return ggmtimeout.UnaryClientInterceptor(time.Minute) })},
			},
		},
		{
			name:  "rate",
			about: "A rate that is not used up.",
			contenders: []contender{
				{"belfry ratelimit", base, "", stackOf(ratelimit.Config{Limit: 1e9, Burst: 1e9})},
				{"failsafe-go ratelimiter, smooth", peer, noQueue, safe(func() []failsafe.Policy[any] { return one(ratelimiter.NewSmoothWithMaxRate[any](time.Nanosecond)) })},
				{"failsafe-go ratelimiter, bursty", peer, noQueue, safe(func() []failsafe.Policy[any] { return one(ratelimiter.NewBursty[any](1e9, time.Second)) })},
				{"x/time/rate through go-grpc-middleware", peer, noQueue, always(func() grpc.UnaryClientInterceptor {
					return ggmratelimit.UnaryClientInterceptor(allower{rate.NewLimiter(1e9, 1e9)})
				})},
			},
		},
		{
			name:    "rate, used up",
			about:   "Each call is refused.",
			calls:   1,
			refused: true,
			contenders: []contender{
				{"belfry loadshed, ratelimit", base, "", stackOf(loadshed.Config{}, ratelimit.Config{Limit: 1, Per: 24 * time.Hour})},
				{"failsafe-go ratelimiter, smooth", peer, "", safe(func() []failsafe.Policy[any] { return one(ratelimiter.NewSmoothWithMaxRate[any](24 * time.Hour)) })},
				{"failsafe-go ratelimiter, bursty", peer, "", safe(func() []failsafe.Policy[any] { return one(ratelimiter.NewBursty[any](1, 24*time.Hour)) })},
				{"x/time/rate through go-grpc-middleware", peer, "Its refusal is a plain error: it does not say which limit, nor when to come back.", always(func() grpc.UnaryClientInterceptor {
					return ggmratelimit.UnaryClientInterceptor(allower{rate.NewLimiter(rate.Every(24*time.Hour), 1)})
				})},
			},
		},
		{
			name:  "concurrency",
			about: "A limit of 1,000 that is not reached.",
			contenders: []contender{
				{"belfry concurrency", base, "", stackOf(concurrency.Config{Limit: 1000})},
				{"failsafe-go bulkhead", peer, noQueue, safe(func() []failsafe.Policy[any] { return one(bulkhead.New[any](1000)) })},
				{"x/sync/semaphore", peer, noQueue, always(func() grpc.UnaryClientInterceptor { return semaphoreInterceptor(1000) })},
			},
		},
		{
			name:  "concurrency that finds its limit",
			about: "Measures each call.",
			contenders: []contender{
				{"belfry concurrency", base, "", stackOf(concurrency.Config{})},
				{"failsafe-go adaptivelimiter", peer, "", safe(func() []failsafe.Policy[any] { return one(adaptivelimiter.NewWithDefaults[any]()) })},
			},
		},
		{
			name:  "breaker",
			about: "Closed.",
			contenders: []contender{
				{"belfry breaker", base, "", stackOf(breaker.Config{})},
				{"failsafe-go circuitbreaker", peer, "It counts failures in a row only, by default; belfry's has a window of time besides.", safe(func() []failsafe.Policy[any] { return one(circuitbreaker.NewWithDefaults[any]()) })},
				{"failsafe-go circuitbreaker with a window", peer, "", safe(func() []failsafe.Policy[any] {
					return one(circuitbreaker.NewBuilder[any]().WithFailureRateThreshold(0.5, 20, 10*time.Second).Build())
				})},
				{"sony/gobreaker", peer, "It counts failures in a row only, by default; belfry's has a window of time besides.", always(func() grpc.UnaryClientInterceptor { return goBreaker(gobreaker.Settings{}) })},
			},
		},
		{
			name:     "breaker, open",
			about:    "Each call is refused.",
			failures: 10,
			refused:  true,
			contenders: []contender{
				{"belfry breaker", base, "", stackOf(breaker.Config{ConsecutiveFailures: 5, OpenFor: time.Hour, MaxOpenFor: time.Hour})},
				{"failsafe-go circuitbreaker", peer, "", safe(func() []failsafe.Policy[any] {
					return one(circuitbreaker.NewBuilder[any]().WithFailureThreshold(5).WithDelay(time.Hour).Build())
				})},
				{"sony/gobreaker", peer, "Its refusal is a plain error: it does not say when to come back.", always(func() grpc.UnaryClientInterceptor {
					return goBreaker(gobreaker.Settings{Timeout: time.Hour, ReadyToTrip: func(c gobreaker.Counts) bool { return c.ConsecutiveFailures >= 5 }})
				})},
			},
		},
		{
			name:  "throttle",
			about: "The SRE book's. The server accepts all calls.",
			contenders: []contender{
				{"belfry throttle", base, "", stackOf(throttle.Config{})},
				{"failsafe-go adaptivethrottler", peer, "", safe(func() []failsafe.Policy[any] { return one(adaptivethrottler.NewWithDefaults[any]()) })},
				{"aegis sre", peer, "", always(aegisBreaker)},
				{"go-zero breaker", peer, "", always(func() grpc.UnaryClientInterceptor { return zeroBreaker("127.0.0.1:443", failure) })},
			},
		},
		{
			name:  "without a peer",
			about: "What the others have not, and an empty stack.",
			contenders: []contender{
				{"belfry, no layer", base, "", stackOf()},
				{"belfry loadshed, concurrency", ours, "", stackOf(loadshed.Config{}, concurrency.Config{Limit: 1000})},
				{"belfry failfast, concurrency", ours, "", stackOf(failfast.Config{}, concurrency.Config{Limit: 1000})},
				{"belfry buffer, concurrency", ours, "", stackOf(buffer.Config{Size: 100}, concurrency.Config{Limit: 1000})},
				{"belfry filter", ours, "", stackOf(filter.Predicate(func(context.Context, *interceptor.Call, any) (context.Context, error) { return nil, nil }))},
				{"belfry mapping", ours, "", stackOf(mapping.Error(func(_ context.Context, _ string, err error) error { return err }))},
			},
		},
	}
}

// allower is x/time/rate for go-grpc-middleware, which has no limiter of its own.
type allower struct{ limiter *rate.Limiter }

var errLimited = errors.New("rate limited")

// Limit implements ratelimit.Limiter.
func (a allower) Limit(context.Context) error {
	if !a.limiter.Allow() {
		return errLimited
	}
	return nil
}

// semaphoreInterceptor holds one of n while a call runs, as programs do that have no limiter.
func semaphoreInterceptor(n int64) grpc.UnaryClientInterceptor {
	s := semaphore.NewWeighted(n)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := s.Acquire(ctx, 1); err != nil {
			return err
		}
		defer s.Release(1)
		return next(ctx, method, req, reply, cc, opts...)
	}
}

// goBreaker is gobreaker as its README uses it; it has no interceptor.
func goBreaker(settings gobreaker.Settings) grpc.UnaryClientInterceptor {
	b := gobreaker.NewCircuitBreaker[struct{}](settings)
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		_, err := b.Execute(func() (struct{}, error) {
			return struct{}{}, next(ctx, method, req, reply, cc, opts...)
		})
		return err
	}
}

// aegisBreaker is aegis's breaker as kratos's client middleware uses it.
func aegisBreaker() grpc.UnaryClientInterceptor {
	b := sre.NewBreaker()
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		if err := b.Allow(); err != nil {
			b.MarkFailed()
			return err
		}
		err := next(ctx, method, req, reply, cc, opts...)
		if err != nil {
			b.MarkFailed()
		} else {
			b.MarkSuccess()
		}
		return err
	}
}

// zeroBreaker is go-zero's breaker as its interceptor uses it, which is in an internal package
// and asks the connection for its target.
func zeroBreaker(target string, failure func(error) bool) grpc.UnaryClientInterceptor {
	acceptable := func(err error) bool { return !failure(err) }
	return func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		return zerobreaker.DoWithAcceptableCtx(ctx, path.Join(target, method), func() error {
			return next(ctx, method, req, reply, cc, opts...)
		}, acceptable)
	}
}

var interceptorMetrics = []metric{
	{name: "ns", digits: 3, judged: true},
	{name: "ns, parallel", digits: 3, judged: true},
	{name: "allocations", digits: 2, judged: true},
	{name: "bytes", digits: 3},
}

// interceptors measures unary calls through interceptors, with an invoker that does nothing.
func interceptors(ctx context.Context, p plan, progress func(string)) (*section, error) {
	s := &section{key: "interceptors", title: "Interceptors", chart: "interceptors.svg", about: `
A unary call through one interceptor and an invoker that does nothing: what the interceptor itself costs, on one goroutine and on as many as there are processors. The call has a deadline of half an hour. failsafe-go is used through its package failsafegrpc.`}
	for _, c := range contests() {
		g := &group{name: c.name, about: c.about, metrics: interceptorMetrics}
		s.groups = append(s.groups, g)
		for _, x := range c.contenders {
			g.rows = append(g.rows, &row{name: x.name, role: x.role, less: x.less, busy: math.NaN()})
		}
		for repeat := range p.repeats {
			for i, x := range c.contenders {
				if ctx.Err() != nil {
					return nil, ctx.Err()
				}
				progress(fmt.Sprintf("interceptors: %s, %s, repeat %d", c.name, x.name, repeat+1))
				if err := c.measure(x, g.rows[i]); err != nil {
					return nil, fmt.Errorf("%s, %s: %w", c.name, x.name, err)
				}
			}
		}
	}
	return s, nil
}

// measure adds a repeat of a contender to its row.
func (c contest) measure(x contender, r *row) error {
	unary, err := x.make()
	if err != nil {
		return err
	}
	// Not a child of the program's: each call of some enters itself with the parent.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	opts := []grpc.CallOption{grpc.StaticMethod()} // as generated code passes
	call := func(invoker grpc.UnaryInvoker) error {
		return unary(ctx, calltest.Method, nil, nil, nil, invoker, opts...)
	}
	failure := status.Error(codes.Unavailable, "the server is down")
	for range c.failures {
		_ = call(func(context.Context, string, any, any, *grpc.ClientConn, ...grpc.CallOption) error { return failure })
	}
	for range c.calls {
		if err := call(calltest.Noop); err != nil {
			return fmt.Errorf("a call was refused too early: %w", err)
		}
	}
	check := func() error {
		if err := call(calltest.Noop); (err != nil) != c.refused {
			return fmt.Errorf("a call ended with error %v, but refused is %t", err, c.refused)
		}
		return nil
	}
	if err := check(); err != nil {
		return err
	}
	run := func() { _ = call(calltest.Noop) }
	serial, parallel := measure(run), measureParallel(run)
	if err := check(); err != nil {
		return err
	}
	r.add(serial.ns, parallel.ns, serial.allocs, serial.bytes)
	return nil
}
