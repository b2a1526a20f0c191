// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/serviceconfig"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/load"
)

func TestMain(m *testing.M) {
	// The policy under its own name is from now on one that also notes, for tests, which
	// policies were built for a target, and what they told their meters.
	balancer.Register(observedBuilder{})
	grpclog.SetLoggerV2(&logs)
	leaktest.Main(m)
}

// logs notes what the policy logs, prints errors, and drops the rest.
var logs = logNotes{LoggerV2: grpclog.NewLoggerV2(io.Discard, io.Discard, os.Stderr)}

type logNotes struct {
	grpclog.LoggerV2
	mu    sync.Mutex // guards notes
	notes []string
}

func (l *logNotes) Infoln(args ...any) {
	if text := fmt.Sprint(args...); strings.HasPrefix(text, "[belfry-p2c]") {
		l.Warningln(text)
	}
}

func (l *logNotes) Warningln(args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.notes = append(l.notes, fmt.Sprint(args...))
}

// with returns the notes that have all the texts.
func (l *logNotes) with(texts ...string) (notes []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, n := range l.notes {
		if !slices.ContainsFunc(texts, func(t string) bool { return !strings.Contains(n, t) }) {
			notes = append(notes, n)
		}
	}
	return notes
}

var seedFlag = flag.Uint64("seed", 0, "seed of the randomised tests; 0 draws one")

// newRand returns a generator whose seed is logged, for a failure to be repeated
// with -seed.
func newRand(t *testing.T) *rand.Rand {
	t.Helper()
	seed := *seedFlag
	if seed == 0 {
		seed = rand.Uint64()
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// testContext returns a context that ends long after a test should have, even on a
// busy machine.
func testContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// built maps the endpoint of a target to the policies built for it, in order:
// target name → *builds.
var built sync.Map

type builds struct {
	mu       sync.Mutex // guards policies
	policies []*policy
}

// policiesOf returns the policies that were built for a target.
func policiesOf(target string) []*policy {
	b, ok := built.Load(target)
	if !ok {
		return nil
	}
	builds := b.(*builds)
	builds.mu.Lock()
	defer builds.mu.Unlock()
	return slices.Clone(builds.policies)
}

// observedBuilder is builder, and notes what it builds. A config whose field
// "recorder" names an observer gets a metric that reports to it.
type observedBuilder struct{ builder }

func (observedBuilder) Build(cc balancer.ClientConn, opts balancer.BuildOptions) balancer.Balancer {
	b := builder{}.Build(cc, opts).(*policy)
	entry, _ := built.LoadOrStore(opts.Target.Endpoint(), &builds{})
	builds := entry.(*builds)
	builds.mu.Lock()
	defer builds.mu.Unlock()
	builds.policies = append(builds.policies, b)
	return b
}

func (observedBuilder) ParseConfig(js json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c, err := parseConfig(js)
	if err != nil {
		return nil, err
	}
	var extra struct{ Recorder string }
	if json.Unmarshal(js, &extra) == nil && extra.Recorder != "" {
		if o, ok := observers.Load(extra.Recorder); ok {
			c.metric = observedConfig{c.metric, o.(*observer)}
			c.counts = false // or the load would not be read
		}
	}
	return c, nil
}

// observers are the observers by name.
var observers sync.Map

// An observer sees what the meters of one channel are told.
type observer struct {
	onLoad func() // if set, called when a load is read; set it before the pick

	mu        sync.Mutex // guards the fields below
	started   int
	responds  int
	finished  []finished
	outOfBand *load.Report  // the last
	changed   chan struct{} // closed at the next change
}

type finished struct {
	outcome   load.Outcome
	responded bool
	took      load.Instant
}

// newObserver returns an observer and the config field that names it.
func newObserver(t *testing.T) (o *observer, field string) {
	t.Helper()
	o = &observer{changed: make(chan struct{})}
	observers.Store(t.Name(), o)
	t.Cleanup(func() { observers.Delete(t.Name()) })
	return o, `"recorder":` + string(must(json.Marshal(t.Name())))
}

func (o *observer) note(f func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	f()
	close(o.changed)
	o.changed = make(chan struct{})
}

// wait returns when cond holds, which is called with mu held. It fails the test
// when the test's context ends first.
func (o *observer) wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	ctx := testContext(t)
	for {
		o.mu.Lock()
		ok, changed := cond(), o.changed
		started, responds, ended := o.started, o.responds, slices.Clone(o.finished)
		o.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			t.Fatalf("waiting until %s: %d attempts started, %d responded, %d ended: %v", what, started, responds, len(ended), ended)
		}
	}
}

// rest waits until as many attempts have ended as have started, at least n.
func (o *observer) rest(t *testing.T, n int) {
	t.Helper()
	o.wait(t, "nothing is in flight", func() bool { return o.started >= n && len(o.finished) == o.started })
}

// ended returns the outcomes so far.
func (o *observer) ended() []load.Outcome {
	o.mu.Lock()
	defer o.mu.Unlock()
	var outcomes []load.Outcome
	for _, f := range o.finished {
		outcomes = append(outcomes, f.outcome)
	}
	return outcomes
}

// observedConfig makes metrics that report to an observer.
type observedConfig struct {
	metricConfig
	observer *observer
}

func (c observedConfig) build() (load.Metric, error) {
	m, err := c.metricConfig.build()
	return &observedMetric{m, c.observer}, err
}

func (c observedConfig) adopt(m load.Metric) bool {
	o, ok := m.(*observedMetric)
	return ok && c.metricConfig.adopt(o.Metric)
}

type observedMetric struct {
	load.Metric
	observer *observer
}

func (m *observedMetric) NewMeter(e load.Endpoint) load.Meter {
	return &observedMeter{m.Metric.NewMeter(e), m.observer}
}

type observedMeter struct {
	load.Meter
	observer *observer
}

func (m *observedMeter) Load(q load.Query) load.Estimate {
	if m.observer.onLoad != nil {
		m.observer.onLoad()
	}
	return m.Meter.Load(q)
}

func (m *observedMeter) Start(a *load.Attempt) load.Ticket {
	m.observer.note(func() { m.observer.started++ })
	t := m.Meter.Start(a)
	t.Started = a.Now
	return t
}

func (m *observedMeter) Respond(r load.Response) {
	m.observer.note(func() { m.observer.responds++ })
	m.Meter.Respond(r)
}

func (m *observedMeter) Report(r load.OutOfBand) {
	m.Meter.Report(r)
	report := *r.Report
	m.observer.note(func() { m.observer.outOfBand = &report })
}

func (m *observedMeter) Finish(s *load.Sample) bool {
	changed := m.Meter.Finish(s)
	m.observer.note(func() {
		m.observer.finished = append(m.observer.finished, finished{s.Outcome, s.Responded, s.Now - s.Ticket.Started})
	})
	return changed
}
