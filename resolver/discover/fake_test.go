// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// fakeConn is the channel as the resolver sees it.
type fakeConn struct {
	resolver.ClientConn // nil: what is not overridden must not be called

	mu       sync.Mutex
	states   []resolver.State
	errs     []string
	log      []string                   // both, in the order of the calls
	onUpdate func(resolver.State) error // the result of UpdateState; nil: accept
}

func (c *fakeConn) UpdateState(s resolver.State) error {
	c.mu.Lock()
	c.states = append(c.states, s)
	c.log = append(c.log, show(s))
	f := c.onUpdate
	c.mu.Unlock()
	if f != nil {
		return f(s)
	}
	return nil
}

func (c *fakeConn) ReportError(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errs = append(c.errs, err.Error())
	c.log = append(c.log, "error: "+err.Error())
}

func (c *fakeConn) ParseServiceConfig(json string) *serviceconfig.ParseResult {
	if !strings.HasPrefix(json, "{") {
		return &serviceconfig.ParseResult{Err: fmt.Errorf("not an object: %s", json)}
	}
	return &serviceconfig.ParseResult{Config: fakeConfig{json: json}}
}

type fakeConfig struct {
	serviceconfig.Config
	json string
}

// sets returns the published sets as strings.
func (c *fakeConn) sets() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var sets []string
	for _, s := range c.states {
		sets = append(sets, show(s))
	}
	return sets
}

// calls returns the sets and errors in the order of their publication.
func (c *fakeConn) calls() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.log)
}

// configs returns the published service configs, "none" for none.
func (c *fakeConn) configs() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var configs []string
	for _, s := range c.states {
		if s.ServiceConfig == nil {
			configs = append(configs, "none")
			continue
		}
		configs = append(configs, s.ServiceConfig.Config.(fakeConfig).json)
	}
	return configs
}

func (c *fakeConn) errors() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.errs)
}

func (c *fakeConn) last() resolver.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.states[len(c.states)-1]
}

// show writes a state as "key=addr*weight key=addr*weight", "-" if it is empty.
func show(s resolver.State) string {
	if len(s.Endpoints) == 0 {
		return "-"
	}
	var parts []string
	for _, ep := range s.Endpoints {
		var addrs []string
		for _, a := range ep.Addresses {
			addrs = append(addrs, a.Addr)
		}
		p := discover.KeyOf(ep) + "=" + strings.Join(addrs, "+")
		if w := discover.WeightOf(ep); w != 1 {
			p += fmt.Sprintf("*%d", w)
		}
		parts = append(parts, p)
	}
	return strings.Join(parts, " ")
}

func wantSets(t *testing.T, cc *fakeConn, want ...string) {
	t.Helper()
	if got := cc.sets(); !slices.Equal(got, want) {
		t.Fatalf("published sets = %q, want %q", got, want)
	}
}

// wantErrors checks that the reported errors contain the given strings.
func wantErrors(t *testing.T, cc *fakeConn, want ...string) {
	t.Helper()
	got := cc.errors()
	if len(got) != len(want) {
		t.Fatalf("reported errors = %q, want %d containing %q", got, len(want), want)
	}
	for i, w := range want {
		if !strings.Contains(got[i], w) {
			t.Fatalf("reported error %d = %q, want one containing %q", i, got[i], w)
		}
	}
}

// script is a source whose sequences a test writes as it goes: each step goes
// to every watch that is running.
type script struct {
	mu      sync.Mutex
	watches []*scriptWatch // running
	starts  []time.Time    // of all
	atStart []step         // what a new watch yields first
	inTurn  bool           // do waits until what it has done has had its effect
}

type step struct {
	change discover.Change
	err    error
	end    bool
}

type scriptWatch struct {
	ctx   context.Context
	steps chan step
	done  chan struct{}
}

func (s *script) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) {
		w := &scriptWatch{ctx: ctx, steps: make(chan step), done: make(chan struct{})}
		defer close(w.done)
		s.mu.Lock()
		s.watches = append(s.watches, w)
		s.starts = append(s.starts, time.Now())
		first := s.atStart
		s.mu.Unlock()
		defer func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.watches = slices.DeleteFunc(s.watches, func(x *scriptWatch) bool { return x == w })
		}()
		for _, st := range first {
			if st.end || !yield(st.change, st.err) {
				return
			}
		}
		for {
			select {
			case <-ctx.Done():
				return
			case st := <-w.steps:
				if st.end || !yield(st.change, st.err) {
					return
				}
			}
		}
	}
}

func (s *script) running() []*scriptWatch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.watches)
}

func (s *script) started() []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.starts)
}

func (s *script) do(steps ...step) {
	for _, w := range s.running() {
		for _, st := range steps {
			select {
			case w.steps <- st:
			case <-w.done:
			}
			if s.inTurn {
				synctest.Wait()
			}
		}
	}
}

func (s *script) send(changes ...discover.Change) {
	for _, c := range changes {
		s.do(step{change: c})
	}
}

// fail makes the running watches end with an error.
func (s *script) fail(msg string) {
	s.do(step{err: errors.New(msg)}, step{end: true})
}

func (s *script) end() { s.do(step{end: true}) }

// sourceFunc is a source that is one function.
type sourceFunc func(ctx context.Context, yield func(discover.Change, error) bool)

func (f sourceFunc) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) { f(ctx, yield) }
}

func ep(addr string, opts ...discover.EndpointOption) resolver.Endpoint {
	return discover.MustEndpoint(addr, opts...)
}

func ins(key, addr string, opts ...discover.EndpointOption) discover.Change {
	return discover.Insert(key, ep(addr, opts...))
}

func target(s string) resolver.Target {
	u, err := url.Parse(s)
	if err != nil {
		panic(err)
	}
	return resolver.Target{URL: *u}
}

// build makes the resolver of one channel on src and closes it when the test
// ends. Call it inside the bubble. The channel has a dialer of its own, so that
// addresses can be short.
func build(t *testing.T, cc resolver.ClientConn, src discover.Source, opts ...discover.Option) resolver.Resolver {
	t.Helper()
	dialer := func(context.Context, string) (net.Conn, error) { return nil, errors.New("not to be called") }
	return buildWith(t, cc, src, resolver.BuildOptions{Dialer: dialer}, opts...)
}

func buildWith(t *testing.T, cc resolver.ClientConn, src discover.Source, bo resolver.BuildOptions, opts ...discover.Option) resolver.Resolver {
	t.Helper()
	b, err := discover.NewBuilder("belfry", func(resolver.Target) (discover.Source, error) { return src, nil }, opts...)
	if err != nil {
		t.Fatalf("NewBuilder: %v", err)
	}
	r, err := b.Build(target("belfry:///orders"), cc, bo)
	if err != nil {
		t.Fatalf("Build: %v", err)
	}
	t.Cleanup(r.Close)
	return r
}

// exact is a backoff without jitter: 1 s, 2 s, 4 s, 8 s, 8 s.
func exact() discover.Option {
	return discover.WithBackoff(backoff.Config{BaseDelay: time.Second, Multiplier: 2, MaxDelay: 8 * time.Second})
}
