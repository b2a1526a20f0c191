// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/belfry-go/belfry/internal/jsonfault"
	"github.com/belfry-go/belfry/load"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// Ranges and defaults of the fields of belfry.config.v1.P2C.
const (
	minChoices = 2
	maxChoices = 16
	maxMemory  = 8

	minOutOfBand = 100 * time.Millisecond

	// Two choices and no memory are the power of two choices as in Tower.
	defaultChoices = 2
	defaultMemory  = 0

	// ExpectedLatency tells endpoints apart so well that more choices help. Memory
	// helps more than further random choices: without it, a pick can only be as good
	// as the best of its draws. Mitzenmacher, Prabhakar, Shah, "Load balancing with
	// memory", FOCS 2002.
	defaultChoicesExpectedLatency = 8
	defaultMemoryExpectedLatency  = 2

	// Reports show which servers are idle for all clients. There are few of them, so it
	// takes more draws to find them, and more memory to keep them.
	defaultChoicesReports = 12
	defaultMemoryReports  = 8

	defaultEqualAtRest    = 1
	defaultEqualUnderLoad = 0.1
	defaultEqualTime      = 2 * time.Millisecond
	maxEqual              = 10
	defaultExploreEvery   = 200
	maxExploreEvery       = 1_000_000
	defaultExploreAfter   = 10 * time.Second
	maxExploreAfter       = 10 * 24 * time.Hour // fits in 32 bits of milliseconds
)

// config is the parsed form of belfry.config.v1.P2C. Immutable.
type config struct {
	serviceconfig.LoadBalancingConfig

	message     *configv1.P2C // as it was given
	choices     int
	memory      int
	failures    codeSet
	metric      metricConfig
	limit       *limitConfig     // nil if endpoints have none
	zones       *zonesConfig     // nil if zones do not count
	accrual     *accrualConfig   // nil if endpoints are not put aside
	slowStart   *slowStartConfig // nil if endpoints get their share at once
	connections int              // how many an endpoint may have
	timeless    bool             // the metric does not use the time
	counts      bool             // a cost is a number of attempts in flight
	exact       bool             // costs have no errors
	classless   bool             // all calls are of class 0
	twoExact    bool             // chooseOfTwo picks if weights are equal

	equalAtRest    float32
	equalUnderLoad float32
	equalTime      float32 // in nanoseconds; 0 if costs have no errors
	exploreEvery   uint32  // 0 for never
	exploreAfter   time.Duration

	outOfBand time.Duration // the interval of reports out of band; 0 for none
}

// MarshalJSON returns the config as it was given. Some parents, such as
// random_subsetting, marshal the parsed config of their child and parse it
// again.
func (c *config) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.message) }

// parseConfig parses the proto3 JSON form of belfry.config.v1.P2C. Unknown fields are
// ignored, as gRFC A21 asks, and logged. An unknown metric is an error, because any other
// metric would not be what the config asks for.
func parseConfig(js json.RawMessage) (*config, error) {
	m := &configv1.P2C{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(js, m); err != nil {
		ignore := func(string, protoreflect.MessageDescriptor) error { return nil }
		if f := jsonfault.Find(js, m.ProtoReflect().Descriptor(), ignore); f != nil {
			return nil, fmt.Errorf("%s: %s%w", Name, prefix(f.Path), f.Err)
		}
		return nil, fmt.Errorf("%s: cannot parse config %s: %w", Name, js, err)
	}
	if err := checkUnknown(js, m); err != nil {
		return nil, err
	}
	c := &config{
		message:        m,
		choices:        defaultChoices,
		memory:         defaultMemory,
		failures:       defaultFailures,
		equalAtRest:    defaultEqualAtRest,
		equalUnderLoad: defaultEqualUnderLoad,
		exploreEvery:   defaultExploreEvery,
		exploreAfter:   defaultExploreAfter,
	}

	var err error
	if c.metric, err = newMetricConfig(m.GetLoad()); err != nil {
		return nil, err
	}
	switch c.metric.(type) {
	case expectedLatency:
		c.choices, c.memory = defaultChoicesExpectedLatency, defaultMemoryExpectedLatency
		c.equalTime = float32(defaultEqualTime)
		if m.GetLoad().GetExpectedLatency().GetReports() != nil {
			c.choices, c.memory = defaultChoicesReports, defaultMemoryReports
		}
	case peakEWMA:
		c.exact, c.classless = true, true
	case pendingRequests:
		c.exact, c.classless, c.timeless, c.counts = true, true, true, true
	case constant:
		c.exact, c.classless, c.timeless = true, true, true
	}
	if d := m.GetLoad().GetExpectedLatency().GetReports().GetOutOfBand(); d != nil {
		if c.outOfBand = d.AsDuration(); c.outOfBand < minOutOfBand {
			return nil, configError("load.expectedLatency.reports.outOfBand", c.outOfBand, fmt.Sprintf("at least %v", minOutOfBand))
		}
	}
	if c.limit, err = newLimitConfig(m.GetEndpointLimit()); err != nil {
		return nil, err
	}
	if c.accrual, err = newAccrualConfig(m.GetFailureAccrual()); err != nil {
		return nil, err
	}
	if c.slowStart, err = newSlowStartConfig(m.GetSlowStart()); err != nil {
		return nil, err
	}
	c.connections = 1
	if m.MaxConnectionsPerSubchannel != nil {
		v := m.GetMaxConnectionsPerSubchannel()
		if v < 1 || v > maxConnections {
			return nil, configError("maxConnectionsPerSubchannel", v, fmt.Sprintf("between 1 and %d", maxConnections))
		}
		c.connections = int(v)
	}
	if m.ChoiceCount != nil {
		if v := m.GetChoiceCount(); v < minChoices || v > maxChoices {
			return nil, configError("choiceCount", v, fmt.Sprintf("between %d and %d", minChoices, maxChoices))
		}
		c.choices = int(m.GetChoiceCount())
	}
	if m.Memory != nil {
		if v := m.GetMemory(); v > maxMemory {
			return nil, configError("memory", v, fmt.Sprintf("between 0 and %d", maxMemory))
		}
		c.memory = int(m.GetMemory())
	}
	if c.zones, err = newZonesConfig(m.GetZones(), c.choices); err != nil {
		return nil, err
	}
	c.twoExact = c.choices == 2 && c.memory == 0 && c.exact && c.zones == nil
	for _, f := range []struct {
		name  string
		value *float64
		to    *float32
	}{{"equalAtRest", m.EqualAtRest, &c.equalAtRest}, {"equalUnderLoad", m.EqualUnderLoad, &c.equalUnderLoad}} {
		if f.value == nil {
			continue
		}
		if !(*f.value >= 0 && *f.value <= maxEqual) {
			return nil, configError(f.name, *f.value, fmt.Sprintf("between 0 and %d", maxEqual))
		}
		*f.to = float32(*f.value)
	}
	if m.EqualTime != nil {
		d := m.GetEqualTime().AsDuration()
		if d < 0 {
			return nil, configError("equalTime", d, "at least 0s")
		}
		if c.equalTime > 0 { // with expectedLatency: other costs have no errors
			c.equalTime = float32(d)
		}
	}
	if m.ExploreEvery != nil {
		if v := m.GetExploreEvery(); v > maxExploreEvery {
			return nil, configError("exploreEvery", v, fmt.Sprintf("between 0 and %d", maxExploreEvery))
		}
		c.exploreEvery = m.GetExploreEvery()
	}
	if m.ExploreAfter != nil {
		if c.exploreAfter = m.GetExploreAfter().AsDuration(); c.exploreAfter <= 0 {
			return nil, configError("exploreAfter", c.exploreAfter, "above 0s")
		}
		c.exploreAfter = min(c.exploreAfter, maxExploreAfter)
	}
	if names := m.GetFailureCodes(); len(names) > 0 {
		if c.failures, err = parseCodes(names); err != nil {
			return nil, err
		}
	}
	return c, nil
}

func prefix(path string) string {
	if path == "" {
		return ""
	}
	return path + ": "
}

// checkUnknown returns an error if load names an unknown metric. It logs other unknown fields,
// each path once in the process.
func checkUnknown(js json.RawMessage, m *configv1.P2C) error {
	f := jsonfault.Find(js, m.ProtoReflect().Descriptor(), func(path string, in protoreflect.MessageDescriptor) error {
		metrics := in.Oneofs().ByName("metric")
		if metrics != nil && m.GetLoad().GetMetric() == nil {
			return fmt.Errorf("unknown metric, must be one of %s", jsonfault.Names(metrics.Fields()))
		}
		if ignored.first(path) {
			logger.Warningf("ignored the unknown field %s of a config, which may have %s", path, jsonfault.Names(in.Fields()))
		}
		return nil
	})
	if f != nil {
		return fmt.Errorf("%s: %s%w", Name, prefix(f.Path), f.Err)
	}
	return nil
}

// ignored holds the paths of the unknown fields that were logged.
var ignored firsts

// firsts reports what is seen for the first time. It remembers 1,000 strings. Then it reports
// all others as seen before.
type firsts struct {
	mu   sync.Mutex // guards seen
	seen map[string]bool
}

func (f *firsts) first(what string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.seen[what] || len(f.seen) >= 1000 {
		return false
	}
	if f.seen == nil {
		f.seen = make(map[string]bool)
	}
	f.seen[what] = true
	return true
}

func configError(field string, value any, rule string) error {
	return fmt.Errorf("%s: %s: %v, must be %s", Name, field, value, rule)
}

// metricConfig is the configuration of one kind of metric.
type metricConfig interface {
	// build returns a new metric. The parameters have been checked.
	build() (load.Metric, error)
	// adopt gives the parameters to a metric that is in use, and reports whether
	// it is of the same kind. If so its meters keep what they know.
	adopt(load.Metric) bool
}

type (
	expectedLatency struct{ load.ExpectedLatencyConfig }
	peakEWMA        struct{ load.PeakEWMAConfig }
	pendingRequests struct{}
	constant        struct{ load float64 }
	custom          struct{ name, config string }
)

func (c expectedLatency) build() (load.Metric, error) {
	return load.NewExpectedLatency(c.ExpectedLatencyConfig)
}

func (c expectedLatency) adopt(m load.Metric) bool {
	e, ok := m.(*load.ExpectedLatency)
	return ok && e.Reconfigure(c.ExpectedLatencyConfig) == nil
}

func (c peakEWMA) build() (load.Metric, error) { return load.NewPeakEWMA(c.PeakEWMAConfig) }

func (c peakEWMA) adopt(m load.Metric) bool {
	e, ok := m.(*load.PeakEWMA)
	return ok && e.Reconfigure(c.PeakEWMAConfig) == nil
}

func (pendingRequests) build() (load.Metric, error) { return load.NewPendingRequests(), nil }

func (pendingRequests) adopt(m load.Metric) bool {
	_, ok := m.(*load.PendingRequests)
	return ok
}

func (c constant) build() (load.Metric, error) { return load.NewConstant(c.load) }

func (c constant) adopt(m load.Metric) bool {
	old, ok := m.(*load.Constant)
	fresh, err := load.NewConstant(c.load)
	return ok && err == nil && *old == *fresh
}

// customMetric is a registered metric, and the config that it was made from.
type customMetric struct {
	load.Metric
	from custom
}

func (c custom) build() (load.Metric, error) {
	m, err := load.New(c.name, json.RawMessage(c.config))
	if err != nil {
		return nil, err
	}
	return &customMetric{m, c}, nil
}

// adopt keeps a metric only if its config is the same: nothing is known of what another
// config changes.
func (c custom) adopt(m load.Metric) bool {
	old, ok := m.(*customMetric)
	return ok && old.from == c
}

func newCustom(m *configv1.Custom) (custom, error) {
	// json.Marshal sorts the keys of a map, so that equal configs have equal texts.
	config, err := json.Marshal(m.GetConfig().AsMap())
	if m.GetConfig() == nil {
		config = []byte("{}")
	}
	return custom{m.GetName(), string(config)}, err
}

// newMetricConfig returns the config of the metric. It checks the parameters by building a
// metric.
func newMetricConfig(m *configv1.Load) (metricConfig, error) {
	var c metricConfig
	var field string
	switch metric := m.GetMetric().(type) {
	case *configv1.Load_PeakEwma:
		field, c = "peakEwma", newPeakEWMA(metric.PeakEwma)
	case *configv1.Load_PendingRequests:
		field, c = "pendingRequests", pendingRequests{}
	case *configv1.Load_Constant:
		v := 1.0
		if metric.Constant.Load != nil {
			v = metric.Constant.GetLoad()
		}
		field, c = "constant", constant{v}
	case *configv1.Load_Custom:
		field = "custom"
		var err error
		if c, err = newCustom(metric.Custom); err != nil {
			return nil, fmt.Errorf("%s: load.custom.config: %w", Name, err)
		}
	default:
		field, c = "expectedLatency", newExpectedLatency(m.GetExpectedLatency())
	}
	if _, err := c.build(); err != nil {
		if e := (*load.ConfigError)(nil); errors.As(err, &e) {
			return nil, configError("load."+field+"."+e.Field, e.Value, e.Rule)
		}
		return nil, fmt.Errorf("%s: load.%s: %w", Name, field, err)
	}
	return c, nil
}

func newPeakEWMA(m *configv1.PeakEwma) peakEWMA {
	c := load.DefaultPeakEWMAConfig()
	if m.GetDecay() != nil {
		c.Decay = m.GetDecay().AsDuration()
	}
	if m.GetDefaultRtt() != nil {
		c.DefaultRTT = m.GetDefaultRtt().AsDuration()
	}
	set(&c.FailurePenalty, m.GetFailurePenalty(), m != nil && m.FailurePenalty != nil)
	return peakEWMA{c}
}

func newExpectedLatency(m *configv1.ExpectedLatency) expectedLatency {
	c := load.DefaultExpectedLatencyConfig()
	if m == nil {
		return expectedLatency{c}
	}
	set(&c.PriorSamples, m.GetPriorSamples(), m.PriorSamples != nil)
	set(&c.QueueExponent, m.GetQueueExponent(), m.QueueExponent != nil)
	set(&c.KeepSamples, m.GetKeepSamples(), m.KeepSamples != nil)
	set(&c.ForgetRounds, m.GetForgetRounds(), m.ForgetRounds != nil)
	if m.GetForgetAfter() != nil {
		c.ForgetAfter = m.GetForgetAfter().AsDuration()
	}
	set(&c.FailurePenalty, m.GetFailurePenalty(), m.FailurePenalty != nil)
	set(&c.AgeLimit, m.GetAgeLimit(), m.AgeLimit != nil)
	set(&c.SpreadPrior, m.GetSpreadPrior(), m.SpreadPrior != nil)
	set(&c.MinSpread, m.GetMinSpread(), m.MinSpread != nil)
	set(&c.SampleLimit, m.GetSampleLimit(), m.SampleLimit != nil)
	set(&c.StreamAgeLimit, m.GetStreamAgeLimit(), m.StreamAgeLimit != nil)
	set(&c.SlowMethod, m.GetSlowMethod(), m.SlowMethod != nil)
	if m.GetFirstFailure() != nil {
		c.FirstFailure = m.GetFirstFailure().AsDuration()
	}
	if m.MaxMethods != nil {
		c.MaxMethods = int(m.GetMaxMethods())
	}
	if r := m.GetReports(); r != nil {
		c.Reports = load.DefaultReportsConfig()
		if r.InFlight != nil {
			c.Reports.InFlight = r.GetInFlight()
		}
		set(&c.Reports.QueueExponent, r.GetQueueExponent(), r.QueueExponent != nil)
		set(&c.Reports.KeepSamples, r.GetKeepSamples(), r.KeepSamples != nil)
		if r.GetExpiry() != nil {
			c.Reports.Expiry = r.GetExpiry().AsDuration()
		}
		c.Reports.Blackout = r.GetBlackout().AsDuration()
	}
	return expectedLatency{c}
}

func set(field *float64, v float64, present bool) {
	if present {
		*field = v
	}
}

// codeSet is a set of status codes, one bit for each.
type codeSet uint32

func (s codeSet) has(c codes.Code) bool { return c < 32 && s&(1<<c) != 0 }

func setOf(cs ...codes.Code) codeSet {
	var s codeSet
	for _, c := range cs {
		s |= 1 << c
	}
	return s
}

// defaultFailures are the codes that say that the server, or the path to it, could not do
// the work. Other codes are answers. They are linkerd's failures without PERMISSION_DENIED,
// which is an answer, and with RESOURCE_EXHAUSTED and UNIMPLEMENTED: an endpoint that sheds
// load or does not know the method answers fast, and must not get more calls for that.
var defaultFailures = setOf(codes.Unknown, codes.DeadlineExceeded, codes.ResourceExhausted,
	codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss)

func parseCodes(names []string) (codeSet, error) {
	var s codeSet
	for i, name := range names {
		field := fmt.Sprintf("failureCodes[%d]", i)
		var c codes.Code
		quoted, err := json.Marshal(name)
		if err == nil {
			err = c.UnmarshalJSON(quoted)
		}
		switch {
		case err != nil || c == codes.OK:
			return 0, configError(field, name, `the name of a status code other than OK, such as "UNAVAILABLE"`)
		case s.has(c):
			return 0, configError(field, name, "named only once")
		}
		s |= 1 << c
	}
	return s, nil
}
