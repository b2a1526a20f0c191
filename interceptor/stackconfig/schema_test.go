// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/budget"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/loadshed"
	"github.com/belfry-go/belfry/interceptor/maxage"
	"github.com/belfry-go/belfry/interceptor/ratelimit"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/limit"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// schema are the Configs and the messages that are read into them.
var schema = []struct {
	config  any
	message proto.Message
	options string // Fields of the message that are for options.
}{
	{timeout.Config{}, &configv1.Timeout{}, ""},
	{timeout.Adaptive{}, &configv1.AdaptiveTimeout{}, ""},
	{ratelimit.Config{}, &configv1.RateLimit{}, "priority_metadata priority_func"},
	{concurrency.Config{}, &configv1.Concurrency{}, "priority_metadata priority_func cost_func"},
	{limit.AutoConfig{}, &configv1.Auto{}, ""},
	{limit.AIMDConfig{}, &configv1.Aimd{}, ""},
	{limit.Gradient2Config{}, &configv1.Gradient2{}, ""},
	{limit.VegasConfig{}, &configv1.Vegas{}, ""},
	{buffer.Config{}, &configv1.Buffer{}, "priority_metadata priority_func"},
	{loadshed.Config{}, &configv1.LoadShed{}, ""},
	{failfast.Config{}, &configv1.FailFast{}, ""},
	{throttle.Config{}, &configv1.Throttle{}, ""},
	{breaker.Config{}, &configv1.Breaker{}, ""},
	{budget.Config{}, &configv1.Budget{}, ""},
	{retry.Config{}, &configv1.Retry{}, "budget idempotent_func policy"},
	{retry.Backoff{}, &configv1.Backoff{}, ""},
	{maxage.Config{}, &configv1.MaxAge{}, ""},
	{hedge.Config{}, &configv1.Hedge{}, "budget idempotent_func policy"},
}

// Each field of a Config is read from a field of the schema, and each field of the
// schema is read.
func TestSchema(t *testing.T) {
	messages := map[protoreflect.FullName]bool{}
	for _, c := range schema {
		m := c.message.ProtoReflect()
		messages[m.Descriptor().FullName()] = true
		t.Run(string(m.Descriptor().Name()), func(t *testing.T) {
			options := strings.Fields(c.options)
			config := reflect.New(reflect.TypeOf(c.config)).Elem()
			read := map[string]bool{} // Fields of the Config that the schema has.
			fields := m.Descriptor().Fields()
			for i := range fields.Len() {
				fd := fields.Get(i)
				if slices.Contains(options, string(fd.Name())) {
					continue
				}
				config.SetZero()
				m := m.New()
				m.Set(fd, sample(m, fd))
				s := &source{opts: &testOptions}
				s.read(m, config, "")
				if s.err != nil {
					t.Errorf("%s: %v", fd.Name(), s.err)
				}
				var set []string
				for i := range config.NumField() {
					if !config.Field(i).IsZero() {
						set = append(set, config.Type().Field(i).Name)
					}
				}
				if len(set) != 1 {
					t.Errorf("%s is read into the fields %q of %T, want one", fd.Name(), set, c.config)
					continue
				}
				read[set[0]] = true
			}
			for i := range config.NumField() {
				if name := config.Type().Field(i).Name; !read[name] && !slices.Contains(options, strings.ToLower(name)) {
					t.Errorf("%T.%s is read from no field", c.config, name)
				}
			}
		})
	}
	oneof := (*configv1.Layer)(nil).ProtoReflect().Descriptor().Oneofs().ByName("kind")
	for i := range oneof.Fields().Len() {
		fd := oneof.Fields().Get(i)
		if fd.Message() != nil && (kinds[fd.JSONName()] == nil || !messages[fd.Message().FullName()]) {
			t.Errorf("the kind %s is not made, or not tested", fd.JSONName())
		}
	}
}

var testOptions = options{supplied: map[supply]any{
	{"WithKeyFunc", "x"}: interceptor.KeyFunc(func(context.Context, *interceptor.Admission) string { return "" }),
}}

// sample is a value of a field that is not the zero of its Config's.
func sample(m protoreflect.Message, fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch {
	case fd.IsList():
		l := m.NewField(fd).List()
		l.Append(protoreflect.ValueOfString("UNAVAILABLE"))
		return protoreflect.ValueOfList(l)
	case fd.Message() != nil:
		v := m.NewField(fd)
		in := v.Message()
		first := fd.Message().Fields().Get(0)
		in.Set(first, sample(in, first))
		return v
	case fd.Enum() != nil:
		return protoreflect.ValueOfEnum(2)
	case fd.Kind() == protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64(0.5)
	case fd.Kind() == protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case fd.Kind() == protoreflect.StringKind:
		return protoreflect.ValueOfString("x")
	}
	return protoreflect.ValueOfInt64(7)
}

// The values of an enum are those of the Go type, in its order.
func TestSchemaEnums(t *testing.T) {
	for _, c := range []struct {
		enum protoreflect.EnumDescriptor
		of   func(i int) fmt.Stringer
	}{
		{configv1.RateLimit_Algorithm(0).Descriptor(), func(i int) fmt.Stringer { return ratelimit.Algorithm(i) }},
		{configv1.Concurrency_Discipline(0).Descriptor(), func(i int) fmt.Stringer { return concurrency.Discipline(i) }},
		{configv1.Backoff_Jitter(0).Descriptor(), func(i int) fmt.Stringer { return retry.Jitter(i) }},
	} {
		for i := range c.enum.Values().Len() - 1 {
			v := c.enum.Values().ByNumber(protoreflect.EnumNumber(i + 1))
			_, name, _ := strings.Cut(string(v.Name()), "_")
			if got := c.of(i).String(); !strings.EqualFold(got, name) {
				t.Errorf("%s is read as %s", v.Name(), got)
			}
		}
	}
}
