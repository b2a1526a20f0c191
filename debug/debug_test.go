// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package debug

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/connectivity"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/internal/test/calltest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

const evil = `<script>alert("x")</script>`

// keyed is a layer with a figure for each of n keys.
type keyed struct {
	interceptor.GateOnly
	interceptor.CallOnly
	n int
}

func (k *keyed) NewLayer() (interceptor.Layer, error) { return k, nil }
func (k *keyed) WrapCall(next interceptor.Next, _ interceptor.Again) interceptor.Next {
	return next
}
func (k *keyed) WrapGate(inner interceptor.Gate) interceptor.Gate { return inner }
func (k *keyed) String() string                                   { return evil }
func (k *keyed) Readings() iter.Seq[interceptor.Reading] {
	return func(yield func(interceptor.Reading) bool) {
		for i := range k.n {
			if !yield(interceptor.Reading{Layer: evil, Key: fmt.Sprintf("/s/m%d", i), ByMethod: true, What: "x", Value: math.NaN()}) {
				return
			}
		}
	}
}

func get(t *testing.T, page *Page, query string) (*httptest.ResponseRecorder, string) {
	t.Helper()
	w := httptest.NewRecorder()
	page.ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/debug/belfry"+query, nil))
	return w, w.Body.String()
}

func TestPage(t *testing.T) {
	t.Run("shows_stacks_and_refusals_as_JSON", func(t *testing.T) {
		page := New()
		s := calltest.Stack(t, interceptor.Named("orders"), interceptor.Observe(page), concurrency.Config{Limit: 3})
		page.Refused(interceptor.Observed{Stack: "orders", Method: "/s/m"}, interceptor.Refuse("concurrency", interceptor.ReasonQueueFull, "100 waiting"))
		_, body := get(t, page, "?json")
		var got state
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatal(err)
		}
		if len(got.Stacks) != 1 || got.Stacks[0].Name != "orders" || len(got.Stacks[0].Figures) != 1 || got.Stacks[0].Figures[0].Value != 3 {
			t.Errorf("stacks %+v, want orders with a limit of 3", got.Stacks)
		}
		if len(got.Refusals) != 1 || got.Refusals[0].Reason != "QUEUE_FULL" || got.Refusals[0].Message != "100 waiting" || len(got.Refused) != 1 || got.Refused[0].Count != 1 {
			t.Errorf("refusals %+v, counts %+v, want one of QUEUE_FULL", got.Refusals, got.Refused)
		}
		_ = s.String()
	})
	t.Run("only_shows", func(t *testing.T) {
		w := httptest.NewRecorder()
		New().ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/", nil))
		if w.Code != http.StatusMethodNotAllowed {
			t.Errorf("POST has status %d", w.Code)
		}
	})
	t.Run("has_no_text_that_is_markup", func(t *testing.T) {
		page := New()
		s := calltest.Stack(t, interceptor.Named(evil), interceptor.Observe(page), &keyed{n: 1})
		page.Refused(interceptor.Observed{Stack: evil, Method: evil}, interceptor.Refuse(evil, interceptor.Reason(evil), evil).ForKey(evil))
		w, body := get(t, page, "")
		if strings.Contains(body, "alert(") || strings.Contains(body, "NONCE") || !strings.Contains(w.Header().Get("Content-Security-Policy"), "default-src 'none'") {
			t.Error("the page has text of the program in it, or no policy")
		}
		w, body = get(t, page, "?json")
		if strings.Contains(body, "<script") || w.Header().Get("Content-Type") != "application/json" || w.Header().Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("JSON that a browser may take for a page: %v", w.Header())
		}
		_ = s.String()
	})
}

func TestBounds(t *testing.T) {
	t.Run("of_endpoints", func(t *testing.T) {
		s := p2c.Snapshot{Target: strings.Repeat("x", 10_000), Endpoints: make([]p2c.EndpointSnapshot, 10_000)}
		for i := range s.Endpoints {
			s.Endpoints[i] = p2c.EndpointSnapshot{Addresses: []string{fmt.Sprintf("10.0.0.1:%d", i)}, State: connectivity.Ready, Load: math.Inf(1)}
		}
		s.Endpoints[9_876].State, s.Endpoints[9_876].Err = connectivity.TransientFailure, errors.New(strings.Repeat("e", 10_000))
		p := policyOf(&s, time.Now())
		b, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Endpoints) != MaxEndpoints || p.More != 10_000-MaxEndpoints || p.Endpoints[0].Address != "10.0.0.1:9876" || len(b) > 100_000 {
			t.Errorf("%d endpoints, %d more, the first %q, %d bytes; want the one in trouble first", len(p.Endpoints), p.More, p.Endpoints[0].Address, len(b))
		}
	})
	t.Run("of_methods", func(t *testing.T) {
		page := New()
		s := calltest.Stack(t, interceptor.Observe(page), &keyed{n: 50_000})
		for i := range 50_000 {
			c := interceptor.Observed{Stack: "s", Method: fmt.Sprintf("/s/m%d", i)}
			page.Refused(c, interceptor.Refuse(fmt.Sprintf("layer %d", i), interceptor.ReasonShed, strings.Repeat("m", 1000)))
		}
		_, body := get(t, page, "?json")
		var got state
		if err := json.Unmarshal([]byte(body), &got); err != nil {
			t.Fatal(err)
		}
		if n, more := len(got.Stacks[0].Figures), got.Stacks[0].More; n != MaxFigures || more != 50_000-MaxFigures {
			t.Errorf("%d figures and %d more", n, more)
		}
		if len(got.Refusals) != MaxRefusals || got.Refusals[0].Method != "/s/m49999" || len(got.Refused) > MaxRefusals || len(body) > 300_000 {
			t.Errorf("%d refusals, the last of %q, %d counts, %d bytes", len(got.Refusals), got.Refusals[0].Method, len(got.Refused), len(body))
		}
		kinds := 0
		page.refusals.counts.Range(func(any, any) bool { kinds++; return true })
		if kinds != MaxCounts+1 {
			t.Errorf("%d counts are kept, want %d and one of all others", kinds, MaxCounts)
		}
		_ = s.String()
	})
}

func TestEvents(t *testing.T) {
	page := New()
	srv := httptest.NewServer(page)
	defer srv.Close()
	open := func(ctx context.Context) *http.Response {
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"?events", nil)
		resp, err := srv.Client().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	var bodies []io.Closer
	for range MaxViewers {
		resp := open(t.Context())
		bodies = append(bodies, resp.Body)
		lines := bufio.NewReader(resp.Body)
		line, err := lines.ReadString('\n')
		if err != nil || !strings.HasPrefix(line, `data: {"time":`) {
			t.Fatalf("event %q, %v", line, err)
		}
	}
	resp := open(t.Context())
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("one viewer too many has status %d", resp.StatusCode)
	}
	page.Close() // Otherwise srv.Close would wait.
	page.Close()
	for _, b := range bodies {
		if _, err := io.Copy(io.Discard, b.(io.Reader)); err != nil {
			t.Errorf("a stream ends with %v", err)
		}
		b.Close()
	}
}
