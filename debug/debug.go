// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package debug

import (
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"
	"weak"

	"github.com/belfry-go/belfry/interceptor"
)

// Bounds of what a [Page] shows and keeps.
const (
	MaxEndpoints = 200  // of a policy
	MaxFigures   = 200  // of the layers of a stack
	MaxPolicies  = 100  // of the process
	MaxStacks    = 100  // observed
	MaxRefusals  = 100  // the last ones
	MaxCounts    = 1000 // combinations of stack, layer and reason; further ones are one
	MaxViewers   = 16   // event streams at a time; a further one gets 503
	maxText      = 300  // bytes of an error or a name
)

// every is how often an event stream has an event, and lasting how long it lasts. A browser
// then asks for another.
const (
	every   = time.Second
	lasting = 10 * time.Minute
)

// A Page is an http.Handler that shows what channels and stacks are doing, and the observer of
// the stacks. Its methods may be called concurrently. Make it with [New].
type Page struct {
	interceptor.NopObserver
	stacks   sync.Map // of weak.Pointer[interceptor.Stack] to nothing
	refusals refusals
	viewers  chan struct{}
	closed   chan struct{}
	close    sync.Once
}

// New returns a page that observes no stack yet.
func New() *Page { return &Page{viewers: make(chan struct{}, MaxViewers), closed: make(chan struct{})} }

// Close ends the event streams, and there are no new ones. A server that shuts down waits for
// them otherwise: http.Server.RegisterOnShutdown(page.Close). Close may be called again.
func (p *Page) Close() { p.close.Do(func() { close(p.closed) }) }

// Observes shows a stack as long as it is in use.
func (p *Page) Observes(s *interceptor.Stack) { p.stacks.Store(weak.Make(s), nil) }

// Refused notes a refusal.
func (p *Page) Refused(c interceptor.Observed, r *interceptor.Refusal) { p.refusals.add(c, r) }

//go:embed page.html
var html string

// ServeHTTP serves the page.
func (p *Page) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("X-Frame-Options", "DENY")
	h.Set("Cache-Control", "no-store")
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.Set("Allow", "GET, HEAD")
		http.Error(w, "this page only shows", http.StatusMethodNotAllowed)
		return
	}
	switch query := r.URL.Query(); {
	case query.Has("json"):
		h.Set("Content-Type", "application/json")
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		_ = e.Encode(p.state())
	case query.Has("events"):
		p.stream(w, r)
	default:
		nonce := rand.Text()
		h.Set("Content-Type", "text/html; charset=utf-8")
		h.Set("Content-Security-Policy", fmt.Sprintf("default-src 'none'; connect-src 'self'; img-src data:; script-src 'nonce-%s'; style-src 'nonce-%s'", nonce, nonce))
		fmt.Fprint(w, strings.ReplaceAll(html, "NONCE", nonce))
	}
}

// stream sends the state once a second.
func (p *Page) stream(w http.ResponseWriter, r *http.Request) {
	select {
	case p.viewers <- struct{}{}:
		defer func() { <-p.viewers }()
	default:
		http.Error(w, fmt.Sprintf("%d others look at this page", MaxViewers), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/event-stream")
	if r.Method == http.MethodHead {
		return
	}
	out := http.NewResponseController(w)
	tick := time.NewTicker(every)
	defer tick.Stop()
	end := time.NewTimer(lasting)
	defer end.Stop()
	for {
		select {
		case <-p.closed:
			return
		default:
		}
		b, err := json.Marshal(p.state())
		if err != nil {
			return
		}
		_ = out.SetWriteDeadline(time.Now().Add(10 * every)) // A viewer that does not read.
		if _, err := fmt.Fprintf(w, "data: %s\n\n", b); err != nil {
			return
		}
		if out.Flush() != nil {
			return
		}
		select {
		case <-tick.C:
		case <-r.Context().Done():
			return
		case <-p.closed:
			return
		case <-end.C:
			return
		}
	}
}
