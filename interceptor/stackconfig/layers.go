// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

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
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/jsonfault"
)

// kinds are the kinds of layers, by the JSON names of their fields in Layer. A field of a
// kind's message sets the field of the same name in the Config of its package (see
// [fieldOf]). The others are for the options that are listed here.
var kinds = map[string]kind{
	"timeout":     kindOf(timeout.New, timeout.WithName),
	"rateLimit":   kindOf(ratelimit.New, ratelimit.WithName, priority(ratelimit.WithPriority)),
	"concurrency": kindOf(concurrency.New, concurrency.WithName, priority(concurrency.WithPriority), supplied("costFunc", "WithCostFunc", concurrency.WithCost)),
	"buffer":      kindOf(buffer.New, buffer.WithName, priority(buffer.WithPriority)),
	"maxAge":      kindOf(maxage.New, maxage.WithName),
	"loadShed":    kindOf(loadshed.New, loadshed.WithName),
	"failFast":    kindOf(failfast.New, failfast.WithName),
	"throttle":    kindOf(throttle.New, throttle.WithName),
	"breaker":     kindOf(breaker.New, breaker.WithName, breakerChange),
	"retry": kindOf(retry.New, retry.WithName, spends(true, retry.WithBudget),
		supplied("idempotentFunc", "WithIdempotentFunc", retry.WithIdempotent), supplied("policy", "WithRetryPolicy", retry.WithPolicy)),
	"hedge": kindOf(hedge.New, hedge.WithName, spends(false, hedge.WithBudget),
		supplied("idempotentFunc", "WithIdempotentFunc", hedge.WithIdempotent), supplied("policy", "WithHedgePolicy", hedge.WithPolicy)),
}

// lift admits the calls that wait in a layer that is in no list any more, by raising its
// limit beyond reach.
var lift = map[string]func(interceptor.Layer) error{
	"concurrency": func(l interceptor.Layer) error {
		c := l.(*concurrency.Layer).Config()
		c.Limit, c.Auto, c.AIMD, c.Gradient2, c.Vegas = math.MaxInt32, nil, nil, nil, nil
		return l.(*concurrency.Layer).Update(c)
	},
	"rateLimit": func(l interceptor.Layer) error {
		c := l.(*ratelimit.Layer).Config()
		c.Limit, c.Per, c.Burst = max(c.Limit, 10_000), time.Millisecond, 0
		return l.(*ratelimit.Layer).Update(c)
	},
}

// fixed are the fields that Update cannot change. A layer takes over the state of
// another only if they are the same.
var fixed = map[protoreflect.Name]bool{
	"algorithm": true, "per_method": true, "per_metadata": true, "key_func": true, "cost_func": true,
	"priority_metadata": true, "priority_func": true, "budget": true, "idempotent_func": true, "policy": true,
}

// A kind turns a message into what makes a layer.
type kind func(s *source, m protoreflect.Message) definition

// A definition is a layer's config, ready to make the layer or to change one.
type definition struct {
	fixed  proto.Message // The message with only the fixed fields.
	make   func() (interceptor.Layer, error)
	update func(interceptor.Layer) error
}

// updatable is a layer whose package has a config type C.
type updatable[C any] interface {
	interceptor.Layer
	Update(C) error
}

// an extra returns an option for a layer if its message asks for one.
type extra[O any] func(s *source, m protoreflect.Message) (o O, ok bool)

func kindOf[C any, L updatable[C], O any](make func(C, ...O) (L, error), withName func(string) O, extras ...extra[O]) kind {
	return func(s *source, m protoreflect.Message) definition {
		var c C
		s.read(m, reflect.ValueOf(&c).Elem(), "")
		var opts []O
		if s.name != "" {
			opts = append(opts, withName(s.name))
		}
		for _, extra := range extras {
			if o, ok := extra(s, m); ok {
				opts = append(opts, o)
			}
		}
		d := definition{
			make:   func() (interceptor.Layer, error) { return make(c, opts...) },
			update: func(l interceptor.Layer) error { return l.(L).Update(c) },
		}
		same := m.New()
		m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
			// The first value of an enum means unset.
			if fixed[fd.Name()] && !(fd.Enum() != nil && v.Enum() == 1) && v.Interface() != false {
				same.Set(fd, v)
			}
			return true
		})
		d.fixed = same.Interface()
		return d
	}
}

// supplied is the extra of a field that names what the program supplies.
func supplied[F, O any](field, option string, with func(F) O) extra[O] {
	return func(s *source, m protoreflect.Message) (o O, ok bool) {
		if name := get(m, field).String(); name != "" {
			return with(look[F](s, field, name, option)), true
		}
		return o, false
	}
}

func priority[O any](with func(interceptor.PriorityFunc) O) extra[O] {
	return func(s *source, m protoreflect.Message) (o O, ok bool) {
		fd := m.WhichOneof(m.Descriptor().Oneofs().ByName("priority"))
		if fd == nil {
			return o, false
		}
		if name := m.Get(fd).String(); fd.Name() == "priority_func" {
			return with(look[interceptor.PriorityFunc](s, "priorityFunc", name, "WithPriorityFunc")), true
		} else {
			return with(interceptor.MetadataPriority(s.metadataKey("priorityMetadata", name))), true
		}
	}
}

// spends is the extra of a field that names a budget. byDefault says whether an unset
// field means the budget for all.
func spends[O any](byDefault bool, with func(*budget.Budget) O) extra[O] {
	return func(s *source, m protoreflect.Message) (o O, ok bool) {
		name := get(m, "budget").String()
		if name == "" && !byDefault {
			return o, false
		}
		b := s.budgets[name]
		if b == nil {
			s.fail("budget", "%q, must be the name of a budget in budgets", name)
			return o, false
		}
		return with(b.value), true
	}
}

func breakerChange(s *source, _ protoreflect.Message) (breaker.Option, bool) {
	f, name := s.opts.breakerChange, s.name
	if f == nil {
		return nil, false
	}
	if name == "" {
		name = "breaker"
	}
	return breaker.WithOnStateChange(func(c breaker.Change) { f(name, c) }), true
}

// source is one message on the way to a definition. The first error is kept, and
// later values do not matter.
type source struct {
	opts    *options
	budgets map[string]*spending
	name    string // Of the layer; empty for its package's default.
	path    string // Of the message.
	err     error
}

func (s *source) fail(field, format string, args ...any) {
	if s.err == nil {
		s.err = wrong(jsonfault.Join(s.path, field), format, args...)
	}
}

// get returns the value of a field, which need not be set, by its JSON name.
func get(m protoreflect.Message, field string) protoreflect.Value {
	return m.Get(m.Descriptor().Fields().ByJSONName(field))
}

// look looks up what the program supplies under a name.
func look[F any](s *source, field, name, option string) F {
	f, ok := s.opts.supplied[supply{option, name}].(F)
	if !ok {
		s.fail(field, "%q, must be a name that the program gave to %s", name, option)
	}
	return f
}

func (s *source) metadataKey(field, key string) string {
	if key == "" || (interceptor.KeyBy{Metadata: key}).Check("") != nil {
		s.fail(field, `%q, must be the key of a metadata entry: letters, digits, '-', '_' and '.'`, key)
	}
	return key
}

// read sets the fields of a Config, or of a part of one, from a message. What is not set
// in the message stays zero, which is the default.
func (s *source) read(m protoreflect.Message, config reflect.Value, path string) {
	for i := range config.NumField() {
		v := config.Field(i)
		if by, ok := v.Addr().Interface().(*interceptor.KeyBy); ok {
			*by = s.keyBy(m)
			continue
		}
		fd := fieldOf(m.Descriptor(), config.Type().Field(i).Name)
		if fd != nil && m.Has(fd) && !isReference(fd) {
			s.set(v, fd, m.Get(fd), jsonfault.Join(path, fd.JSONName()))
		}
	}
}

// isReference reports whether the field is the name of something.
func isReference(fd protoreflect.FieldDescriptor) bool {
	return fd.Kind() == protoreflect.StringKind && !fd.IsList()
}

// set sets a field of a Config.
func (s *source) set(to reflect.Value, fd protoreflect.FieldDescriptor, from protoreflect.Value, field string) {
	switch {
	case fd.IsList() && to.Type() == reflect.TypeFor[[]string]():
		for i := range from.List().Len() {
			to.Set(reflect.Append(to, reflect.ValueOf(from.List().Get(i).String())))
		}
	case fd.IsList():
		to.Set(reflect.ValueOf(s.codes(field, from.List())))
	case fd.Message() != nil && fd.Message().FullName() == "google.protobuf.Duration":
		d := s.duration(field, from.Message().Interface().(*durationpb.Duration))
		if fd.HasOptionalKeyword() { // As with a double below.
			if d == 0 {
				d = check.None
			} else if d < 0 {
				s.fail(field, "%v, must not be negative", d)
			}
		}
		to.SetInt(int64(d))
	case fd.Message() != nil:
		if to.Kind() == reflect.Pointer {
			to.Set(reflect.New(to.Type().Elem()))
			to = to.Elem()
		}
		s.read(from.Message(), to, field)
	case fd.Enum() != nil:
		// 0 means unset; the values of the package start at 0.
		if fd.Enum().Values().ByNumber(from.Enum()) == nil {
			s.fail(field, "%d, must be one of %s", from.Enum(), jsonfault.EnumNames(fd.Enum()))
		}
		to.Set(reflect.ValueOf(int64(from.Enum()) - 1).Convert(to.Type()))
	case fd.Kind() == protoreflect.DoubleKind:
		f := from.Float()
		if fd.HasOptionalKeyword() { // In a Config 0 is the default, and None is none.
			if f == 0 {
				f = check.None
			} else if f < 0 {
				s.fail(field, "%v, must not be negative", f)
			}
		}
		to.SetFloat(f)
	case fd.Kind() == protoreflect.BoolKind:
		to.SetBool(from.Bool())
	default:
		if fd.ContainingOneof() != nil && from.Int() == 0 { // In a Config 0 would be as if it were not set.
			s.fail(field, "0, must be positive, or left out")
		}
		if to.OverflowInt(from.Int()) {
			s.fail(field, "%d, must be a number of 32 bits on this machine", from.Int())
		}
		to.SetInt(from.Int())
	}
}

// keyBy returns the KeyBy of the oneof "key" of a message.
func (s *source) keyBy(m protoreflect.Message) (by interceptor.KeyBy) {
	fd := m.WhichOneof(m.Descriptor().Oneofs().ByName("key"))
	if fd == nil {
		return by
	}
	switch v := m.Get(fd); fd.Name() {
	case "per_method":
		by.Method = v.Bool()
	case "per_metadata":
		by.Metadata = s.metadataKey("perMetadata", v.String())
	case "key_func":
		by.Func = look[interceptor.KeyFunc](s, "keyFunc", v.String(), "WithKeyFunc")
	}
	return by
}

func (s *source) duration(field string, d *durationpb.Duration) time.Duration {
	if err := d.CheckValid(); err != nil {
		s.fail(field, "%v, must be a valid duration: %w", d, err)
		return 0
	}
	v := d.AsDuration()
	if !proto.Equal(durationpb.New(v), d) {
		s.fail(field, "%ds, must be less than 292 years", d.GetSeconds())
	}
	return v
}

// codes parses names of codes.
func (s *source) codes(field string, names protoreflect.List) []codes.Code {
	cs := make([]codes.Code, names.Len())
	for i := range cs {
		name := names.Get(i).String()
		quoted, err := json.Marshal(name)
		if err == nil {
			err = cs[i].UnmarshalJSON(quoted)
		}
		if err != nil || cs[i] == codes.OK {
			s.fail(fmt.Sprintf("%s[%d]", field, i), `%q, must be the name of a status code other than OK, such as "UNAVAILABLE"`, name)
		}
	}
	return cs
}
