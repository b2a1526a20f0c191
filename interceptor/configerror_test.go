// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"errors"
	"math"
	"reflect"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/adapt"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/filter"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/maker"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/interceptor/steer"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/limit"
)

// A configCase makes and updates the layer of one package.
type configCase struct {
	layer  string
	good   any // A Config that is valid.
	new    func(c any) (layer any, err error)
	update func(layer, c any) error
	config func(layer any) any
}

type updatable[C any] interface {
	Update(C) error
	Config() C
}

func configCaseOf[C any, L updatable[C]](layer string, good C, make func(C) (L, error)) configCase {
	return configCase{
		layer: layer, good: good,
		new:    func(c any) (any, error) { return make(c.(C)) },
		update: func(layer, c any) error { return layer.(L).Update(c.(C)) },
		config: func(layer any) any { return layer.(L).Config() },
	}
}

// withOptions is a constructor without its options.
func withOptions[C, L, O any](make func(C, ...O) (L, error)) func(C) (L, error) {
	return func(c C) (L, error) { return make(c) }
}

func configCases() []configCase {
	bound := withOptions(concurrency.New)
	return []configCase{
		configCaseOf("breaker", breaker.Config{
			Jitter: breaker.None, SlowCallRatio: 1, SlowCall: time.Second, FailureCodes: []codes.Code{},
		}, withOptions(breaker.New)),
		configCaseOf("budget", budget.Config{Ratio: budget.None}, budget.New),
		configCaseOf("buffer", buffer.Config{Size: 1}, withOptions(buffer.New)),
		configCaseOf("concurrency", concurrency.Config{Limit: 1, DropCodes: []codes.Code{}}, bound),
		configCaseOf("concurrency", concurrency.Config{AIMD: &limit.AIMDConfig{}}, bound),
		configCaseOf("concurrency", concurrency.Config{Gradient2: &limit.Gradient2Config{}}, bound),
		configCaseOf("concurrency", concurrency.Config{Vegas: &limit.VegasConfig{}}, bound),
		configCaseOf("failfast", failfast.Config{}, withOptions(failfast.New)),
		configCaseOf("filter", filter.Config{Code: codes.NotFound}, func(c filter.Config) (*filter.Filter, error) {
			return filter.New(c, func(ctx context.Context, _ *interceptor.Call, _ any) (context.Context, error) { return ctx, nil })
		}),
		configCaseOf("filter", filter.Config{}, func(c filter.Config) (*filter.Gate, error) {
			return filter.NewGate(c, func(context.Context, *interceptor.Admission, any) error { return nil })
		}),
		configCaseOf("hedge", hedge.Config{NonFatal: []codes.Code{}}, withOptions(hedge.New)),
		configCaseOf("loadshed", loadshed.Config{}, withOptions(loadshed.New)),
		configCaseOf("maker", maker.Config{IdleTimeout: maker.None, MaxWait: maker.None}, func(c maker.Config) (*maker.Maker, error) {
			return maker.New(c, func(context.Context, string, any) (string, error) { return "", nil },
				func(context.Context, string) (maker.Conn, error) { return nil, errors.New("unused") })
		}),
		configCaseOf("ratelimit", ratelimit.Config{Limit: 5}, withOptions(ratelimit.New)),
		configCaseOf("retry", retry.Config{Codes: []codes.Code{}}, withOptions(retry.New)),
		configCaseOf("throttle", throttle.Config{RejectCodes: []codes.Code{codes.Internal}}, withOptions(throttle.New)),
		configCaseOf("timeout", timeout.Config{Timeout: time.Second, Adaptive: &timeout.Adaptive{Min: 1}}, withOptions(timeout.New)),
	}
}

// badFields calls f for each field of a Config, after it has set it to a value that
// no field may have, and sets it back.
func badFields(v reflect.Value, path string, f func(field string, value any)) {
	if v.Kind() == reflect.Pointer {
		if !v.IsNil() {
			c := reflect.New(v.Type().Elem())
			c.Elem().Set(v.Elem())
			v.Set(c) // What good points to is not changed.
			badFields(c.Elem(), path, f)
		}
		return
	}
	if by, ok := v.Interface().(interceptor.KeyBy); ok {
		for _, bad := range []interceptor.KeyBy{{Method: true, Metadata: "unused"}, {Metadata: "tenant id"}, {Metadata: ":authority"}} {
			v.Set(reflect.ValueOf(bad))
			f(path[1:], bad)
		}
		v.Set(reflect.ValueOf(by))
		return
	}
	if v.Kind() == reflect.Struct {
		for i := range v.NumField() {
			badFields(v.Field(i), path+"."+v.Type().Field(i).Name, f)
		}
		return
	}
	good := reflect.New(v.Type()).Elem()
	good.Set(v)
	defer v.Set(good)
	field, value := path[1:], any(nil)
	switch v.Kind() {
	case reflect.Bool:
		return
	case reflect.String:
		v.SetString("unused")
	case reflect.Float64:
		v.SetFloat(math.NaN())
	case reflect.Int, reflect.Int64:
		v.SetInt(-7)
	case reflect.Uint8, reflect.Uint32:
		v.SetUint(99)
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.String { // Of methods.
			v.Set(reflect.ValueOf([]string{"/orders.Orders/", "orders.Orders/Get"}))
			field, value = field+"[1]", "orders.Orders/Get"
			break
		}
		v.Set(reflect.ValueOf([]codes.Code{codes.Internal, 99}))
		field, value = field+"[1]", codes.Code(99)
	}
	if value == nil {
		value = v.Interface()
	}
	f(field, value)
}

func TestConfigError(t *testing.T) {
	for _, c := range configCases() {
		l, err := c.new(c.good)
		if err != nil {
			t.Errorf("%s: New(%+v) = %v", c.layer, c.good, err)
			continue
		}
		n := 0
		bad := reflect.New(reflect.TypeOf(c.good)).Elem()
		bad.Set(reflect.ValueOf(c.good))
		badFields(bad, "", func(field string, value any) {
			n++
			_, err := c.new(bad.Interface())
			calltest.WantConfigError(t, err, c.layer, field, value)
			calltest.WantConfigError(t, c.update(l, bad.Interface()), c.layer, field, value)
		})
		if n == 0 && c.layer != "loadshed" {
			t.Errorf("%s: no field was tried", c.layer)
		}
		if got := c.config(l); !reflect.DeepEqual(got, c.good) {
			t.Errorf("%s: Config() = %+v after bad updates, want %+v as it was given", c.layer, got, c.good)
		}
	}
}

func TestConfigError_options(t *testing.T) {
	type option struct {
		layer, field string
		value        any
		err          error
	}
	errOf := func(_ any, err error) error { return err }
	pred := func(ctx context.Context, _ *interceptor.Call, _ any) (context.Context, error) { return ctx, nil }
	key := func(context.Context, string, any) (string, error) { return "", nil }
	conn := func(context.Context, string) (maker.Conn, error) { return nil, nil }
	allow := func(context.Context) (func(interceptor.Outcome, error), error) { return nil, nil }
	for _, o := range []option{
		{"breaker", "opts[0]", nil, errOf(breaker.New(breaker.Config{}, nil))},
		{"buffer", "opts[0]", nil, errOf(buffer.New(buffer.Config{}, nil))},
		{"concurrency", "opts[0]", nil, errOf(concurrency.New(concurrency.Config{}, nil))},
		{"failfast", "opts[0]", nil, errOf(failfast.New(failfast.Config{}, nil))},
		{"filter", "opts[0]", nil, errOf(filter.New(filter.Config{}, pred, nil))},
		{"hedge", "opts[0]", nil, errOf(hedge.New(hedge.Config{}, nil))},
		{"loadshed", "opts[0]", nil, errOf(loadshed.New(loadshed.Config{}, nil))},
		{"maker", "opts[0]", nil, errOf(maker.New(maker.Config{}, key, conn, nil))},
		{"ratelimit", "opts[0]", nil, errOf(ratelimit.New(ratelimit.Config{}, nil))},
		{"retry", "opts[0]", nil, errOf(retry.New(retry.Config{}, nil))},
		{"stackconfig", "opts[0]", nil, errOf(stackconfig.NewStackFromConfig(nil, nil))},
		{"throttle", "opts[0]", nil, errOf(throttle.New(throttle.Config{}, nil))},
		{"timeout", "opts[0]", nil, errOf(timeout.New(timeout.Config{}, nil))},
		{"adapt", "FromSemaphore.sem", nil, errOf(adapt.FromSemaphore("x", nil).NewLayer())},
		{"adapt", "FromPermit.acquire", nil, errOf(adapt.FromPermit("x", "", nil).NewLayer())},
		{"adapt", "FromAllow.allow", nil, errOf(adapt.FromAllow("x", "", nil).NewLayer())},
		{"adapt", "FromAllow.name", "", errOf(adapt.FromAllow("", "", allow).NewLayer())},
		{"adapt", "FromLimiter.limiter", nil, errOf(adapt.FromLimiter("x", nil).NewLayer())},
		{"breaker", "WithName", "", errOf(breaker.New(breaker.Config{}, breaker.WithName("")))},
		{"breaker", "WithOnStateChange", nil, errOf(breaker.New(breaker.Config{}, breaker.WithOnStateChange(nil)))},
		{"buffer", "WithName", "", errOf(buffer.New(buffer.Config{}, buffer.WithName("")))},
		{"concurrency", "WithName", "", errOf(concurrency.New(concurrency.Config{}, concurrency.WithName("")))},
		{"failfast", "WithName", "", errOf(failfast.New(failfast.Config{}, failfast.WithName("")))},
		{"filter", "WithName", "", errOf(filter.New(filter.Config{}, pred, filter.WithName("")))},
		{"filter", "WithMessages", nil, errOf(filter.New(filter.Config{}, pred, filter.WithMessages(nil)))},
		{"filter", "predicate", nil, errOf(filter.NewGate(filter.Config{}, nil))},
		{"hedge", "WithName", "", errOf(hedge.New(hedge.Config{}, hedge.WithName("")))},
		{"hedge", "WithBudget", nil, errOf(hedge.New(hedge.Config{}, hedge.WithBudget(nil)))},
		{"hedge", "WithIdempotent", nil, errOf(hedge.New(hedge.Config{}, hedge.WithIdempotent(nil)))},
		{"interceptor", "Foreign.unary", nil, errOf(interceptor.Foreign("x", nil, nil).NewLayer())},
		{"loadshed", "WithName", "", errOf(loadshed.New(loadshed.Config{}, loadshed.WithName("")))},
		{"maker", "WithName", "", errOf(maker.New(maker.Config{}, key, conn, maker.WithName("")))},
		{"maker", "key", nil, errOf(maker.New(maker.Config{}, nil, conn))},
		{"maker", "makeConn", nil, errOf(maker.New(maker.Config{}, key, nil))},
		{"otelobserver", "p", nil, errOf(otelobserver.New(nil))},
		{"ratelimit", "WithName", "", errOf(ratelimit.New(ratelimit.Config{}, ratelimit.WithName("")))},
		{"ratelimit", "WithPriority", nil, errOf(ratelimit.New(ratelimit.Config{}, ratelimit.WithPriority(nil)))},
		{"ratelimit", "WithFailOpen", "set", errOf(ratelimit.New(ratelimit.Config{}, ratelimit.WithFailOpen()))},
		{"ratelimit", "FromRate.limiter", nil, errOf(ratelimit.FromRate(nil).NewLayer())},
		{"ratelimit", "FromLimiter.limiter", nil, errOf(ratelimit.FromLimiter(nil, interceptor.KeyBy{}).NewLayer())},
		{"retry", "WithName", "", errOf(retry.New(retry.Config{}, retry.WithName("")))},
		{"retry", "WithBudget", nil, errOf(retry.New(retry.Config{}, retry.WithBudget(nil)))},
		{"retry", "WithIdempotent", nil, errOf(retry.New(retry.Config{}, retry.WithIdempotent(nil)))},
		{"retry", "WithPolicy", nil, errOf(retry.New(retry.Config{}, retry.WithPolicy(nil)))},
		{"steer", "choose", nil, errOf(steer.New[string](nil, nil))},
		{"throttle", "WithName", "", errOf(throttle.New(throttle.Config{}, throttle.WithName("")))},
		{"timeout", "WithName", "", errOf(timeout.New(timeout.Config{}, timeout.WithName("")))},
	} {
		calltest.WantConfigError(t, o.err, o.layer, o.field, o.value)
	}
}

func TestConfigError_text(t *testing.T) {
	for want, c := range map[string]retry.Config{
		"retry: MaxAttempts is 101, must be from 1 to 100, or 0 for 3":                               {MaxAttempts: 101},
		"retry: Codes[0] is OK, must be a code from Canceled to Unauthenticated":                     {Codes: []codes.Code{codes.OK}},
		"retry: Backoff.Max is 1s, must be at least Initial, 5s":                                     {Backoff: retry.Backoff{Initial: 5 * time.Second, Max: time.Second}},
		"retry: Budget.Ratio is -2, must be from 0.000001 to 1000, None (-1) for none, or 0 for 0.2": {Budget: budget.Config{Ratio: -2}},
		"retry: Budget.TTL is 2h0m0s, must be from 1s to 1m, or 0 for 10s":                           {Budget: budget.Config{TTL: 2 * time.Hour}},
		"retry: MaxAttempts is -1, must be from 1 to 100, or 0 for 3\nretry: Backoff.Jitter is Jitter(9), must be FullJitter, EqualJitter, DecorrelatedJitter or NoJitter": {
			MaxAttempts: -1, Backoff: retry.Backoff{Jitter: 9},
		},
	} {
		if _, err := retry.New(c); err == nil || err.Error() != want {
			t.Errorf("retry.New(%+v): error\n%v, want\n%s", c, err, want)
		}
	}
	for want, o := range map[string]retry.Option{
		`retry: WithName is "", must not be empty`:     retry.WithName(""),
		"retry: WithPolicy is nil, must be a function": retry.WithPolicy(nil),
	} {
		if _, err := retry.New(retry.Config{}, o); err == nil || err.Error() != want {
			t.Errorf("retry.New: error %v, want %s", err, want)
		}
	}
}
