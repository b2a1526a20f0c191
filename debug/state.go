// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package debug

import (
	"cmp"
	"fmt"
	"iter"
	"math"
	"slices"
	"strings"
	"time"
	"weak"

	"google.golang.org/grpc/connectivity"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/resolver/discover"
)

// The state is what the page shows, as JSON. Times are milliseconds.
type state struct {
	Time         time.Time `json:"time"`
	Sources      []source  `json:"failingSources"`
	Policies     []policy  `json:"policies"`
	MorePolicies int       `json:"morePolicies,omitempty"`
	Stacks       []stack   `json:"stacks"`
	MoreStacks   int       `json:"moreStacks,omitempty"`
	Refused      []count   `json:"refused"`
	Refusals     []refusal `json:"refusals"`
}

// A source is one that fails.
type source struct {
	Target string    `json:"target"`
	Error  string    `json:"error"`
	Since  time.Time `json:"since"`
}

type policy struct {
	Target    string         `json:"target"`
	Channel   string         `json:"channel,omitempty"`
	Locality  string         `json:"locality,omitempty"`
	State     string         `json:"state"`
	Picks     uint64         `json:"picks"`
	Waiting   int            `json:"waiting"`
	Panic     bool           `json:"panic"`
	Home      string         `json:"home,omitempty"`
	States    map[string]int `json:"states"`
	Endpoints []endpoint     `json:"endpoints"`
	More      int            `json:"more,omitempty"`
}

type endpoint struct {
	Address      string  `json:"address"`
	State        string  `json:"state"` // the connectivity state, or ASIDE or DRAINING
	Error        string  `json:"error,omitempty"`
	Weight       uint32  `json:"weight"`
	Zone         string  `json:"zone,omitempty"`
	InFlight     int     `json:"inFlight"`
	Streams      int     `json:"streams"`
	Limit        int64   `json:"limit,omitempty"`
	Load         float64 `json:"load"`
	Latency      float64 `json:"latency"`
	Share        float64 `json:"share"`
	ShareAllowed float64 `json:"shareAllowed"`
	Picks        uint64  `json:"picks"`
	Failures     uint64  `json:"failures"`
	LastFailure  string  `json:"lastFailure,omitempty"`
	AsideFor     float64 `json:"asideFor,omitempty"`
	AsideWhy     string  `json:"asideWhy,omitempty"`
	PassedOver   string  `json:"passedOver,omitempty"`
}

type stack struct {
	Name     string   `json:"name"`
	Layers   string   `json:"layers"`
	InFlight int      `json:"inFlight"`
	Figures  []figure `json:"figures"`
	More     int      `json:"more,omitempty"`
}

// A figure is a limit, or another reading of a layer.
type figure struct {
	Layer   string  `json:"layer"`
	Key     string  `json:"key,omitempty"`
	What    string  `json:"what"`
	Value   float64 `json:"value"`
	InUse   int64   `json:"inUse,omitempty"`
	Waiting int     `json:"waiting,omitempty"`
	Text    string  `json:"text,omitempty"`
}

func (p *Page) state() state {
	now := time.Now()
	s := state{Time: now, Sources: []source{}, Policies: []policy{}, Stacks: []stack{}}
	for _, src := range discover.Sources() {
		if src.Err != nil && len(s.Sources) < MaxPolicies {
			s.Sources = append(s.Sources, source{short(src.Target), short(src.Err.Error()), src.Since})
		}
	}
	for _, snapshot := range p2c.Snapshots() {
		if len(s.Policies) == MaxPolicies {
			s.MorePolicies++
			continue
		}
		s.Policies = append(s.Policies, policyOf(&snapshot, now))
	}
	var stacks []*interceptor.Stack
	p.stacks.Range(func(k, _ any) bool {
		if st := k.(weak.Pointer[interceptor.Stack]).Value(); st != nil {
			stacks = append(stacks, st)
		} else {
			p.stacks.Delete(k)
		}
		return true
	})
	slices.SortFunc(stacks, func(a, b *interceptor.Stack) int {
		return cmp.Or(cmp.Compare(a.Name(), b.Name()), cmp.Compare(a.String(), b.String()))
	})
	for _, st := range stacks {
		if len(s.Stacks) == MaxStacks {
			s.MoreStacks++
			continue
		}
		s.Stacks = append(s.Stacks, stackOf(st))
	}
	s.Refused, s.Refusals = p.refusals.read()
	return s
}

// policyOf keeps the endpoints that an operator looks for.
func policyOf(s *p2c.Snapshot, now time.Time) policy {
	p := policy{
		Target: short(s.Target), Channel: short(s.Channel), Locality: short(s.Locality), State: s.State.String(), Picks: s.Picks, Waiting: s.Waiting,
		Panic: s.Panic, Home: short(s.Home), States: map[string]int{},
	}
	eps := s.Endpoints
	for i := range eps {
		p.States[eps[i].Condition()]++
	}
	if len(eps) > MaxEndpoints {
		slices.SortStableFunc(eps, func(a, b p2c.EndpointSnapshot) int {
			return cmp.Or(cmp.Compare(trouble(&b), trouble(&a)), cmp.Compare(b.Latency, a.Latency))
		})
		p.More = len(eps) - MaxEndpoints
		eps = eps[:MaxEndpoints]
	}
	p.Endpoints = make([]endpoint, len(eps))
	for i := range eps {
		e := &eps[i]
		out := endpoint{
			Address: short(strings.Join(e.Addresses[:min(len(e.Addresses), 8)], ", ")), State: e.Condition(), Weight: e.Weight, Zone: short(e.Zone),
			InFlight: e.InFlight, Streams: e.Streams, Limit: e.Limit, Load: finite(e.Load), Latency: ms(e.Latency),
			Share: finite(e.Share), ShareAllowed: finite(e.ShareAllowed), Picks: e.Picks, Failures: e.Failures,
			AsideWhy: short(e.AsideWhy), PassedOver: string(e.PassedOver),
		}
		if e.Err != nil {
			out.Error = short(e.Err.Error())
		}
		if e.LastFailure != nil {
			out.LastFailure = short(e.LastFailure.Error())
		}
		if !e.AsideUntil.IsZero() {
			out.AsideFor = max(ms(e.AsideUntil.Sub(now)), 0)
		}
		p.Endpoints[i] = out
	}
	return p
}

// trouble orders endpoints: those that get no calls first.
func trouble(e *p2c.EndpointSnapshot) int {
	switch {
	case e.Condition() != connectivity.Ready.String():
		return 2
	case e.Failures > 0:
		return 1
	}
	return 0
}

func stackOf(s *interceptor.Stack) stack {
	out := stack{Name: short(s.Name()), Layers: short(s.String()), InFlight: s.InFlight(), Figures: []figure{}}
	var quiet []figure // Shown if there is room.
	for f := range figuresOf(s) {
		switch {
		case f.Value > 0 && f.What != string(interceptor.ReadingDelay) && f.What != "limit" || f.Waiting > 0:
			if len(out.Figures) < MaxFigures {
				out.Figures = append(out.Figures, f)
				continue
			}
		case len(quiet) < MaxFigures:
			quiet = append(quiet, f)
			continue
		}
		out.More++
	}
	room := min(MaxFigures-len(out.Figures), len(quiet))
	out.More += len(quiet) - room
	out.Figures = append(out.Figures, quiet[:room]...)
	slices.SortStableFunc(out.Figures, func(a, b figure) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.What, b.What))
	})
	return out
}

func figuresOf(s *interceptor.Stack) iter.Seq[figure] {
	return func(yield func(figure) bool) {
		for l := range interceptor.Limits(s) {
			f := figure{Layer: short(l.Layer), Key: short(l.Key), What: "limit", Value: float64(l.Limit), InUse: l.InUse, Waiting: l.Waiting}
			if l.Lowered != "" {
				f.Text = "lowered by " + l.Lowered
			}
			if l.Baseline > 0 {
				f.Text = fmt.Sprintf("latency %v, at best %v; %s", l.Latency.Round(time.Microsecond), l.Baseline.Round(time.Microsecond), f.Text)
			}
			if !yield(f) {
				return
			}
		}
		for r := range interceptor.Readings(s) {
			if !yield(figure{Layer: short(r.Layer), Key: short(r.Key), What: short(string(r.What)), Value: finite(r.Value), Text: short(r.Text)}) {
				return
			}
		}
	}
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// finite is v as JSON can have it.
func finite(v float64) float64 {
	if math.IsNaN(v) || math.IsInf(v, 0) {
		return -1
	}
	return v
}

// short returns at most maxText bytes of s.
func short(s string) string {
	if len(s) > maxText {
		return strings.ToValidUTF8(s[:maxText], "") + "…"
	}
	return s
}
