// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"reflect"
	"slices"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// A field that a layer's Config gets must get into the schema, under the same name,
// by which errors are put in their place.
func TestTheSchemaHasEveryFieldOfEveryLayer(t *testing.T) {
	for _, c := range []struct {
		config    any
		message   proto.Message
		otherwise []string // What the schema says in another way.
	}{
		{timeout.Config{}, &configv1.Timeout{}, nil},
		{timeout.Adaptive{}, &configv1.AdaptiveTimeout{}, nil},
		{ratelimit.Config{}, &configv1.RateLimit{}, []string{"KeyBy", "KeyName"}},
		{concurrency.Config{}, &configv1.Concurrency{}, nil},
		{concurrency.AIMDConfig{}, &configv1.Aimd{}, nil},
		{concurrency.Gradient2Config{}, &configv1.Gradient2{}, nil},
		{concurrency.VegasConfig{}, &configv1.Vegas{}, nil},
		{buffer.Config{}, &configv1.Buffer{}, nil},
		{loadshed.Config{}, &configv1.LoadShed{}, nil},
		{failfast.Config{}, &configv1.FailFast{}, nil},
		{throttle.Config{}, &configv1.Throttle{}, nil},
		{breaker.Config{}, &configv1.Breaker{}, nil},
		{budget.Config{}, &configv1.Budget{}, nil},
		{retry.Config{}, &configv1.Retry{}, nil},
		{retry.Backoff{}, &configv1.Backoff{}, nil},
		{hedge.Config{}, &configv1.Hedge{}, nil},
	} {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(c.config)) {
			if fieldOf(c.message.ProtoReflect().Descriptor(), f.Name) == nil && !slices.Contains(c.otherwise, f.Name) {
				t.Errorf("%T.%s is not a field of %s", c.config, f.Name, c.message.ProtoReflect().Descriptor().FullName())
			}
		}
	}
}
