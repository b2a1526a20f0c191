// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"errors"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/interceptor"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// bad are configs with the path of the field that is wrong.
var bad = []struct{ js, field string }{
	// Not a config.
	{``, ``},
	{`[]`, ``},
	{`{"methodConfig": [}`, ``},
	{`{"methodConfig": {}}`, `methodConfig`},
	{`{"methodConfig": [null]}`, `methodConfig[0]`},
	{`{"methodConfig": [3]}`, `methodConfig[0]`},
	{`{"layers": []}`, `layers`},
	{`{"methodConfig": [{"name": [{}], "layer": []}]}`, `methodConfig[0].layer`},
	{`{"sharedLayers": []}`, `sharedLayers`},
	{`{"sharedLayers": {"a": {"buffer": {"size": "many"}}}}`, `sharedLayers["a"].buffer.size`},
	{all(`{"timeout": {"call": "soon"}}`), `methodConfig[0].layers[0].timeout.call`},
	{all(`{"timeout": {"call": 3}}`), `methodConfig[0].layers[0].timeout.call`},
	{all(`{"retry": {"backoff": {"jitter": "JITTER_SOME"}}}`), `methodConfig[0].layers[0].retry.backoff.jitter`},
	{all(`{"retry": {"codes": ["UNAVAILABLE", 14]}}`), `methodConfig[0].layers[0].retry.codes[1]`},
	{all(`{"retry": {"codes": "UNAVAILABLE"}}`), `methodConfig[0].layers[0].retry.codes`},
	{all(`{"retry": {"allMethods": 1}}`), `methodConfig[0].layers[0].retry.allMethods`},
	{all(`{"retry": {"backoff": {"multiplier": "x"}}}`), `methodConfig[0].layers[0].retry.backoff.multiplier`},
	{all(`{"loadShed": {"rate": 1}}`), `methodConfig[0].layers[0].loadShed.rate`},
	{all(`{"loadShed": {}}, {"retry": {}, "buffer": {"size": 3}}`), `methodConfig[0].layers[1].retry`},

	// Names.
	{`{"methodConfig": [{}]}`, `methodConfig[0].name`},
	{`{"methodConfig": [{"name": [{"method": "M"}]}]}`, `methodConfig[0].name[0].service`},
	{`{"methodConfig": [{"name": [{"service": "/s.S"}]}]}`, `methodConfig[0].name[0].service`},
	{`{"methodConfig": [{"name": [{"service": "s.S", "method": "a/b"}]}]}`, `methodConfig[0].name[0].method`},
	{`{"methodConfig": [{"name": [{"service": "s.*"}]}]}`, `methodConfig[0].name[0].service`},
	{`{"methodConfig": [{"name": [{"service": "s.S", "method": "*"}]}]}`, `methodConfig[0].name[0].method`},
	{`{"methodConfig": [{"name": [{}], "layers": [{"retry": {"methods": ["/s.S/*"]}}]}]}`, `methodConfig[0].layers[0].retry.methods[0]`},
	{`{"methodConfig": [{"name": [{}]}, {"name": [{"service": "s.S"}, {}]}]}`, `methodConfig[1].name[1]`},
	{`{"methodConfig": [{"name": [{"service": "s.S", "method": "M"}, {"service": "s.S", "method": "M"}]}]}`, `methodConfig[0].name[1]`},

	// Layers and what they refer to.
	{all(`{}`), `methodConfig[0].layers[0]`},
	{all(`{"name": "x"}`), `methodConfig[0].layers[0]`},
	{all(`{"shared": "x"}`), `methodConfig[0].layers[0].shared`},
	{all(`{"shared": ""}`), `methodConfig[0].layers[0].shared`},
	{all(`{"provided": "x"}`), `methodConfig[0].layers[0].provided`},
	{all(`{"name": "x", "retry": {}}, {"name": "x", "loadShed": {}}`), `methodConfig[0].layers[1].name`},
	{`{"sharedLayers": {"": {"loadShed": {}}}}`, `sharedLayers[""]`},
	{`{"sharedLayers": {"a": {}}}`, `sharedLayers["a"]`},
	{`{"sharedLayers": {"a": {"shared": "a"}}}`, `sharedLayers["a"]`},
	{`{"sharedLayers": {"a": {"name": "b", "loadShed": {}}}}`, `sharedLayers["a"].name`},
	{`{"sharedLayers": {"a": {"loadShed": {}}}, "methodConfig": [{"name": [{}], "layers": [{"shared": "a"}, {"shared": "a"}]}]}`, `methodConfig[0].layers[1].shared`},
	{`{"sharedLayers": {"a": {"loadShed": {}}}, "methodConfig": [{"name": [{}], "layers": [{"shared": "a", "name": "b"}]}]}`, `methodConfig[0].layers[0].name`},
	{all(`{"retry": {}}, {"buffer": {"size": 1}}`), `methodConfig[0].layers`}, // Nothing behind the buffer.

	// Budgets.
	{`{"budget": {"ttl": "0.5s"}}`, `budget.ttl`},
	{`{"budget": {"ratio": -1}}`, `budget.ratio`},
	{`{"budget": {"ratio": 1001}}`, `budget.ratio`},
	{`{"budget": {"ratio": "NaN"}}`, `budget.ratio`},
	{`{"budgets": {"b": {"minPerSecond": -1}}}`, `budgets["b"].minPerSecond`},
	{`{"budgets": {"b": {"minPerSecond": 1e7}}}`, `budgets["b"].minPerSecond`},
	{`{"budgets": {"": {}}}`, `budgets[""]`},
	{all(`{"retry": {"budget": "b"}}`), `methodConfig[0].layers[0].retry.budget`},

	// Each kind of layer.
	{all(`{"timeout": {}}`), `methodConfig[0].layers[0].timeout.call`},
	{all(`{"timeout": {"call": "-1s"}}`), `methodConfig[0].layers[0].timeout.call`},
	{all(`{"timeout": {"firstResponse": "-1s"}}`), `methodConfig[0].layers[0].timeout.firstResponse`},
	{all(`{"timeout": {"idle": "1s", "adaptive": {"min": "1s"}}}`), `methodConfig[0].layers[0].timeout.call`},
	{all(`{"timeout": {"call": "1s", "adaptive": {}}}`), `methodConfig[0].layers[0].timeout.adaptive.min`},
	{all(`{"timeout": {"call": "1s", "adaptive": {"min": "1s", "percentile": 1}}}`), `methodConfig[0].layers[0].timeout.adaptive.percentile`},
	{all(`{"timeout": {"call": "1s", "adaptive": {"min": "1s", "minSamples": -1}}}`), `methodConfig[0].layers[0].timeout.adaptive.minSamples`},
	{`{"methodConfig": [{"name": [{}], "timeout": "1s"}]}`, `methodConfig[0].timeout`},
	{`{"methodConfig": [{"name": [{}], "waitForReady": true}]}`, `methodConfig[0].waitForReady`},
	{all(`{"throttle": {"keyFunc": "f"}}`), `methodConfig[0].layers[0].throttle.keyFunc`},
	{all(`{"concurrency": {"limit": 1, "perMetadata": ""}}`), `methodConfig[0].layers[0].concurrency.perMetadata`},
	{all(`{"concurrency": {"limit": 1, "perMetadata": "Tenant Id"}}`), `methodConfig[0].layers[0].concurrency.perMetadata`},
	{all(`{"rateLimit": {"limit": 1, "priorityFunc": "f"}}`), `methodConfig[0].layers[0].rateLimit.priorityFunc`},
	{all(`{"retry": {"maxServerDelay": "-1s"}}`), `methodConfig[0].layers[0].retry.maxServerDelay`},
	{all(`{"hedge": {"maxExtraLoad": 1e-9}}`), `methodConfig[0].layers[0].hedge.maxExtraLoad`},
	{all(`{"hedge": {"maxExtraLoad": 1}}`), `methodConfig[0].layers[0].hedge.maxExtraLoad`},
	{all(`{"hedge": {"delay": "1s", "percentile": 0.9}}`), `methodConfig[0].layers[0].hedge.percentile`},
	{all(`{"hedge": {"minDataPoints": -1}}`), `methodConfig[0].layers[0].hedge.minDataPoints`},
	{all(`{"hedge": {"maxAttempts": 11}}`), `methodConfig[0].layers[0].hedge.maxAttempts`},
	{all(`{"hedge": {"nonFatal": ["GONE"]}}`), `methodConfig[0].layers[0].hedge.nonFatal[0]`},
	{all(`{"hedge": {"budget": "b"}}`), `methodConfig[0].layers[0].hedge.budget`},
	{all(`{"hedge": {"idempotentFunc": "f"}}`), `methodConfig[0].layers[0].hedge.idempotentFunc`},
	{all(`{"rateLimit": {}}`), `methodConfig[0].layers[0].rateLimit.limit`},
	{all(`{"rateLimit": {"limit": -1}}`), `methodConfig[0].layers[0].rateLimit.limit`},
	{all(`{"rateLimit": {"limit": 1, "per": "0.000001s"}}`), `methodConfig[0].layers[0].rateLimit.per`},
	{all(`{"rateLimit": {"limit": 1, "per": "315576000000s"}}`), `methodConfig[0].layers[0].rateLimit.per`},
	{all(`{"rateLimit": {"limit": 1, "burst": -1}}`), `methodConfig[0].layers[0].rateLimit.burst`},
	{all(`{"rateLimit": {"limit": 1, "algorithm": 7}}`), `methodConfig[0].layers[0].rateLimit.algorithm`},
	{all(`{"rateLimit": {"limit": 1, "perMetadata": ""}}`), `methodConfig[0].layers[0].rateLimit.perMetadata`},
	{all(`{"rateLimit": {"limit": 1, "keyFunc": "f"}}`), `methodConfig[0].layers[0].rateLimit.keyFunc`},
	{all(`{"rateLimit": {"limit": 1, "keyFunc": "f", "perMethod": true}}`), `methodConfig[0].layers[0].rateLimit.perMethod`},
	{all(`{"rateLimit": {"limit": 1, "perMethod": true, "maxKeys": -1}}`), `methodConfig[0].layers[0].rateLimit.maxKeys`},
	{all(`{"concurrency": {"limit": 0}}`), `methodConfig[0].layers[0].concurrency.limit`},
	{all(`{"concurrency": {"limit": -1}}`), `methodConfig[0].layers[0].concurrency.limit`},
	{all(`{"concurrency": {"limit": "3000000000"}}`), `methodConfig[0].layers[0].concurrency.limit`},
	{all(`{"concurrency": {"limit": 1, "maxWaiters": -1}}`), `methodConfig[0].layers[0].concurrency.maxWaiters`},
	{all(`{"concurrency": {"limit": 1, "maxWait": "-1s"}}`), `methodConfig[0].layers[0].concurrency.maxWait`},
	{all(`{"concurrency": {"limit": 1, "codelTarget": "-1s"}}`), `methodConfig[0].layers[0].concurrency.codelTarget`},
	{all(`{"concurrency": {"limit": 1, "codelInterval": "-1s"}}`), `methodConfig[0].layers[0].concurrency.codelInterval`},
	{all(`{"concurrency": {"limit": 1, "discipline": 9}}`), `methodConfig[0].layers[0].concurrency.discipline`},
	{all(`{"concurrency": {"limit": 1, "dropCodes": ["BUSY"]}}`), `methodConfig[0].layers[0].concurrency.dropCodes[0]`},
	{all(`{"concurrency": {"limit": 1, "costFunc": "f"}}`), `methodConfig[0].layers[0].concurrency.costFunc`},
	{all(`{"concurrency": {"limit": 1, "priorityFunc": "f"}}`), `methodConfig[0].layers[0].concurrency.priorityFunc`},
	{all(`{"concurrency": {"limit": 1, "priorityMetadata": ""}}`), `methodConfig[0].layers[0].concurrency.priorityMetadata`},
	{all(`{"concurrency": {"limit": 1, "priorityMetadata": ":priority"}}`), `methodConfig[0].layers[0].concurrency.priorityMetadata`},
	{all(`{"concurrency": {"auto": {"min": -1}}}`), `methodConfig[0].layers[0].concurrency.auto.min`},
	{all(`{"concurrency": {"aimd": {"min": -1}}}`), `methodConfig[0].layers[0].concurrency.aimd.min`},
	{all(`{"concurrency": {"aimd": {"backoffRatio": 2}}}`), `methodConfig[0].layers[0].concurrency.aimd.backoffRatio`},
	{all(`{"concurrency": {"aimd": {"timeout": "-1s"}}}`), `methodConfig[0].layers[0].concurrency.aimd.timeout`},
	{all(`{"concurrency": {"gradient2": {"tolerance": 0.5}}}`), `methodConfig[0].layers[0].concurrency.gradient2.tolerance`},
	{all(`{"concurrency": {"gradient2": {"windowSamples": -1}}}`), `methodConfig[0].layers[0].concurrency.gradient2.windowSamples`},
	{all(`{"concurrency": {"vegas": {"smoothing": 7}}}`), `methodConfig[0].layers[0].concurrency.vegas.smoothing`},
	{all(`{"concurrency": {"vegas": {"initial": 7, "max": 6}}}`), `methodConfig[0].layers[0].concurrency.vegas.initial`},
	{all(`{"buffer": {}}, {"concurrency": {"limit": 1}}`), `methodConfig[0].layers[0].buffer.size`},
	{all(`{"buffer": {"size": 1, "maxWait": "-1s"}}, {"concurrency": {"limit": 1}}`), `methodConfig[0].layers[0].buffer.maxWait`},
	{all(`{"failFast": {"after": "-1s"}}`), `methodConfig[0].layers[0].failFast.after`},
	{all(`{"throttle": {"k": 0.5}}`), `methodConfig[0].layers[0].throttle.k`},
	{all(`{"throttle": {"window": "0.5s"}}`), `methodConfig[0].layers[0].throttle.window`},
	{all(`{"throttle": {"maxRefused": 1.5}}`), `methodConfig[0].layers[0].throttle.maxRefused`},
	{all(`{"throttle": {"minRequests": -1}}`), `methodConfig[0].layers[0].throttle.minRequests`},
	{all(`{"throttle": {"rejectCodes": ["OK"]}}`), `methodConfig[0].layers[0].throttle.rejectCodes[0]`},
	{all(`{"breaker": {"failureRatio": 2}}`), `methodConfig[0].layers[0].breaker.failureRatio`},
	{all(`{"breaker": {"slowCallRatio": 0.5}}`), `methodConfig[0].layers[0].breaker.slowCall`},
	{all(`{"hedge": {"delay": "-0.000000001s"}}`), `methodConfig[0].layers[0].hedge.delay`},
	{all(`{"breaker": {"jitter": -1}}`), `methodConfig[0].layers[0].breaker.jitter`},
	{all(`{"breaker": {"jitter": 2}}`), `methodConfig[0].layers[0].breaker.jitter`},
	{all(`{"breaker": {"maxOpenFor": "1s"}}`), `methodConfig[0].layers[0].breaker.maxOpenFor`},
	{all(`{"breaker": {"keyFunc": "f"}}`), `methodConfig[0].layers[0].breaker.keyFunc`},
	{all(`{"breaker": {"keyIdle": "0.5s"}}`), `methodConfig[0].layers[0].breaker.keyIdle`},
	{all(`{"retry": {"maxAttempts": 101}}`), `methodConfig[0].layers[0].retry.maxAttempts`},
	{all(`{"retry": {"bufferBytes": -1}}`), `methodConfig[0].layers[0].retry.bufferBytes`},
	{all(`{"retry": {"methods": ["orders.Orders/Get"]}}`), `methodConfig[0].layers[0].retry.methods[0]`},
	{all(`{"hedge": {"methods": ["/orders.Orders/"], "allMethods": true}}`), `methodConfig[0].layers[0].hedge.methods`},
	{all(`{"retry": {"codes": ["OK"]}}`), `methodConfig[0].layers[0].retry.codes[0]`},
	{all(`{"retry": {"backoff": {"multiplier": 0.5}}}`), `methodConfig[0].layers[0].retry.backoff.multiplier`},
	{all(`{"retry": {"backoff": {"max": "0.001s"}}}`), `methodConfig[0].layers[0].retry.backoff.max`},
	{all(`{"retry": {"backoff": {"jitter": 9}}}`), `methodConfig[0].layers[0].retry.backoff.jitter`},
	{all(`{"retry": {"idempotentFunc": "f"}}`), `methodConfig[0].layers[0].retry.idempotentFunc`},
	{all(`{"retry": {"policy": "p"}}`), `methodConfig[0].layers[0].retry.policy`},
	{all(`{"hedge": {"policy": "p"}}`), `methodConfig[0].layers[0].hedge.policy`},
	{`{"methodConfig": [{"name": [{}]}, {"name": [{"service": "s.S"}], "layers": [{"loadShed": {}}, {"failFast": {}}, {"concurrency": {"limit": -3}}]}]}`,
		`methodConfig[1].layers[2].concurrency.limit`},
}

func TestError(t *testing.T) {
	s := newStack(t, all(`{"name": "l", "concurrency": {"limit": 7}}`))
	layer, before := s.Layer("l"), s.String()
	for _, c := range bad {
		m, err := Parse([]byte(c.js))
		if err == nil {
			_, err = NewStackFromConfig(m)
		}
		e := (*Error)(nil)
		if !errors.As(err, &e) {
			t.Errorf("%s\n  error %v, want an *Error", c.js, err)
			continue
		}
		if e.Field != c.field {
			t.Errorf("%s\n  error %v: field %q, want %q", c.js, err, e.Field, c.field)
		}
		if want := "stackconfig: " + c.field; !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%s\n  error %q, want one that begins with %q", c.js, err, want)
		}
		if in := (*layerError)(nil); errors.As(err, &in) {
			for word := range strings.FieldsSeq(in.rule) {
				if unicode.IsUpper(rune(word[0])) {
					t.Errorf("%s\n  error %v says %s, want no names of Go", c.js, err, word)
				}
			}
		}
		if m == nil {
			continue
		}
		if _, uerr := s.Update(m); uerr == nil || uerr.Error() != err.Error() {
			t.Errorf("%s\n  Update: error %v, want %v", c.js, uerr, err)
		}
		if got := s.String(); got != before || s.Layer("l") != layer {
			t.Fatalf("%s\n  after Update failed the stack is %s, want %s as before", c.js, got, before)
		}
	}
}

// A message names the place once and speaks of the data by its own names.
func TestErrorInLayer(t *testing.T) {
	const layer = "stackconfig: methodConfig[0].layers[0]."
	for js, want := range map[string]string{
		all(`{"retry": {"maxAttempts": 101}}`):                           layer + "retry.maxAttempts: 101, must be from 1 to 100, or 0 for 3",
		all(`{"retry": {"backoff": {"initial": "5s", "max": "1s"}}}`):    layer + "retry.backoff.max: 1s, must be at least initial, 5s",
		all(`{"hedge": {"maxExtraLoad": 1e-9}}`):                         layer + "hedge.maxExtraLoad: 1e-09, must be at least 0.000001 and below 1, or 0 for 0.05",
		all(`{"hedge": {"delay": "1s", "percentile": 0.9}}`):             layer + "hedge.percentile: 0.9, must be 0 if delay is set",
		all(`{"hedge": {"percentile": 1}}`):                              layer + "hedge.percentile: 1, must be above 0 and below 1, or 0 for what maxExtraLoad asks for",
		all(`{"breaker": {"jitter": 2}}`):                                layer + "breaker.jitter: 2, must be above 0 and at most 1, or 0 for none",
		all(`{"breaker": {"jitter": -1}}`):                               layer + "breaker.jitter: -1, must not be negative",
		all(`{"breaker": {"slowCallRatio": 0.5}}`):                       layer + "breaker.slowCall: 0s, must be at least 1µs if slowCallRatio is set",
		all(`{"breaker": {"maxOpenFor": "1s"}}`):                         layer + "breaker.maxOpenFor: 1s, must be at least openFor, 5s",
		all(`{"timeout": {}}`):                                           layer + "timeout.call: 0s, must be positive unless lifetime, firstResponse, message or idle is",
		all(`{"timeout": {"idle": "1s", "adaptive": {"min": "1s"}}}`):    layer + "timeout.call: 0s, must be positive if adaptive is set",
		all(`{"timeout": {"call": "1s", "adaptive": {"min": "2s"}}}`):    layer + "timeout.adaptive.min: 2s, must be positive and not more than call, 1s",
		all(`{"concurrency": {"limit": -1}}`):                            layer + "concurrency.limit: -1, must be from 1 to 2147483647",
		all(`{"concurrency": {"limit": 1, "codelTarget": "-1s"}}`):       layer + "concurrency.codelTarget: -1s, must be positive, or 0 for 5ms",
		all(`{"concurrency": {"aimd": {"min": 5, "max": 4}}}`):           layer + "concurrency.aimd.max: 4, must be from min, 5, to 2147483647, or 0 for 1000",
		all(`{"rateLimit": {"limit": 1, "burst": 1, "algorithm": 2}}`):   layer + "rateLimit.burst: 1, must be 0 if algorithm is window, whose burst is limit",
		all(`{"rateLimit": {"limit": 9, "per": "0.001s", "burst": -1}}`): layer + "rateLimit.burst: -1, must be from 1 to 1000000000, or 0 for a tenth of limit",
		all(`{"rateLimit": {"limit": 100000000, "per": "0.001s"}}`):      layer + "rateLimit.limit: 100000000, must be at most 1000000, one call in 1ns of per",
		`{"budgets": {"b": {"minPerSecond": 1e7}}, "methodConfig": []}`:  `stackconfig: budgets["b"].minPerSecond: 1e+07, must be from 0.000001 to 1000000, or 0 for none`,
		`{"budget": {"ttl": "0.5s"}}`:                                    "stackconfig: budget.ttl: 500ms, must be from 1s to 1m, or 0 for 10s",
	} {
		_, err := NewStackFromConfig(parse(t, js))
		if err == nil || err.Error() != want {
			t.Errorf("%s\n  error %v\n   want %s", js, err, want)
		}
		c := (*interceptor.ConfigError)(nil)
		if !strings.Contains(want, "must not be negative") && !errors.As(err, &c) {
			t.Errorf("%s\n  error %v, want one that has a ConfigError", js, err)
		}
	}
}

func TestErrorOfMessagesWithoutJSON(t *testing.T) {
	rate := func(r *configv1.RateLimit) *configv1.Stack {
		return &configv1.Stack{MethodConfig: []*configv1.MethodConfig{{
			Name:   []*configv1.MethodName{nil},
			Layers: []*configv1.Layer{{Kind: &configv1.Layer_RateLimit{RateLimit: r}}},
		}}}
	}
	for name, m := range map[string]*configv1.Stack{
		"nil":                 nil,
		"entry nil":           {MethodConfig: []*configv1.MethodConfig{nil}},
		"layer nil":           {MethodConfig: []*configv1.MethodConfig{{Name: []*configv1.MethodName{{}}, Layers: []*configv1.Layer{nil}}}},
		"shared layer nil":    {SharedLayers: map[string]*configv1.Layer{"a": nil}},
		"rate limit nil":      rate(nil),
		"nanoseconds beyond":  rate(&configv1.RateLimit{Limit: 1, Per: &durationpb.Duration{Seconds: 1, Nanos: 1e9}}),
		"signs that disagree": rate(&configv1.RateLimit{Limit: 1, Per: &durationpb.Duration{Seconds: 1, Nanos: -1}}),
	} {
		_, err := NewStackFromConfig(m)
		if e := (*Error)(nil); !errors.As(err, &e) {
			t.Errorf("%s: error %v, want an *Error", name, err)
		}
	}
	if _, err := NewStackFromConfig(rate(&configv1.RateLimit{Limit: 1})); err != nil {
		t.Errorf("a good one: %v, want no error", err)
	}
}

func TestOptionErrors(t *testing.T) {
	l := interceptor.CarryWait()
	for name, opts := range map[string][]Option{
		"empty name":  {WithLayer("", l)},
		"nil layer":   {WithLayer("l", nil)},
		"no observer": {WithObserver(nil)},
		"no change":   {WithBreakerChange(nil)},
		"nil func":    {WithKeyFunc("k", nil)},
		"given twice": {WithLayer("l", l), WithLayer("l", l)},
	} {
		_, err := NewStackFromConfig(&configv1.Stack{}, opts...)
		if c := (*interceptor.ConfigError)(nil); !errors.As(err, &c) || c.Layer != "stackconfig" || !strings.HasPrefix(c.Field, "With") {
			t.Errorf("%s: error %v, want a ConfigError that names the option", name, err)
		}
	}
	if _, err := NewStackFromConfig(&configv1.Stack{}, WithLayer("l", l), WithIdempotentFunc("l", func(string) bool { return true })); err != nil {
		t.Errorf("one name for two kinds of things: %v, want no error", err)
	}
}

func TestMethods(t *testing.T) {
	s := newStack(t, `{"methodConfig": [
		{"name": [{}], "layers": [{"name": "any", "breaker": {}}]},
		{"name": [{"service": "a.A"}, {"service": "b.B", "method": "M"}], "layers": [{"name": "ab", "breaker": {}}]},
		{"name": [{"service": "a.A", "method": "M"}], "layers": [{"name": "am", "breaker": {}}]}
	]}`)
	want := "*: [any]\na.A/*, b.B/M: [ab]\na.A/M: [am]"
	if got := s.String(); got != want {
		t.Errorf("String() is\n%s\nwant\n%s", got, want)
	}
	for method, want := range map[string]int{
		"/a.A/M": 2, "/a.A/N": 1, "/a.A/": 1, "/b.B/M": 1, "/b.B/N": 0, "/a.AA/M": 0, "/a/A/M": 0, "": 0, "M": 0, "/": 0,
	} {
		if got := s.built.Load().routes.choose(method); got != want {
			t.Errorf("%q matches entry %d, want %d", method, got, want)
		}
	}
	s = newStack(t, `{"methodConfig": [{"name": [{"service": "a.A"}]}]}`)
	if got := s.built.Load().routes.choose("/b.B/M"); got != -1 {
		t.Errorf("a method that no entry matches matches entry %d", got)
	}
}
