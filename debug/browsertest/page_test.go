// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package browsertest

import (
	"context"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/chromedp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/debug"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
)

// chromium returns the path of a browser.
func chromium(t *testing.T) string {
	t.Helper()
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "headless-shell"} {
		if path, err := exec.LookPath(name); err == nil {
			return path
		}
	}
	t.Skip("no Chromium found: install one (apt-get install chromium) to run this test")
	return ""
}

// evil is the name of the stack. If the page took it for markup, it would set the title.
const evil = `orders<img src=x onerror="document.title='broken'">`

// With BELFRY_SCREENSHOT=file.png the test writes what it saw.
func TestPageInABrowser(t *testing.T) {
	browser := chromium(t)

	name, file := evil, os.Getenv("BELFRY_SCREENSHOT")
	if file != "" {
		name = "orders"
	}
	page := debug.New()
	srv := httptest.NewServer(page)
	defer srv.Close()
	defer page.Close()

	stack, err := interceptor.NewStack(interceptor.Named(name), interceptor.Observe(page),
		retry.Config{}, buffer.Config{Size: 1}, concurrency.Config{Limit: 4}, breaker.Config{ConsecutiveFailures: 1000})
	if err != nil {
		t.Fatal(err)
	}
	var servers []*testserver.Server
	var eps []resolver.Endpoint
	for range 4 {
		s := testserver.New(t, testserver.ServiceTime(testserver.Fixed(2*time.Millisecond)))
		servers = append(servers, s)
		eps = append(eps, discover.MustEndpoint(s.Addr()))
	}
	src, err := discover.List(eps...)
	if err != nil {
		t.Fatal(err)
	}
	opts := append(stack.DialOptions(), p2c.DialOptions()...)
	conn, err := grpc.NewClient("belfry:///orders", append(opts, discover.WithSource(src),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"belfry.p2c":{"failureAccrual":{"baseTime":"300s","maxTime":"300s"}}}]}`))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()

	// Eight callers for four permits and one place to wait: some are refused.
	ctx, stop := context.WithCancel(t.Context())
	var callers sync.WaitGroup
	defer callers.Wait()
	defer stop()
	stub := testingv1.NewTestServiceClient(conn)
	for range 8 {
		callers.Go(func() {
			for ctx.Err() == nil {
				stub.Unary(ctx, &testingv1.UnaryRequest{})
				select {
				case <-time.After(5 * time.Millisecond): // A pace, so that the browser gets CPU too.
				case <-ctx.Done():
				}
			}
		})
	}

	alloc, cancel := chromedp.NewExecAllocator(t.Context(), append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath(browser), chromedp.NoSandbox, chromedp.WindowSize(1280, 760), chromedp.WSURLReadTimeout(2*time.Minute))...)
	defer cancel()
	tab, cancel := chromedp.NewContext(alloc)
	defer cancel()
	tab, cancel = context.WithTimeout(tab, 3*time.Minute)
	defer cancel()

	until := func(what, js string) {
		t.Helper()
		if err := chromedp.Run(tab, chromedp.Poll(js, nil, chromedp.WithPollingTimeout(0), chromedp.WithPollingInterval(100*time.Millisecond))); err != nil {
			var text string
			chromedp.Run(tab, chromedp.Text("body", &text))
			t.Fatalf("waiting for %s: %v; the page shows\n%s", what, err, text)
		}
	}
	if err := chromedp.Run(tab, chromedp.Navigate(srv.URL)); err != nil {
		t.Fatal(err)
	}
	until("four endpoints that are READY", `document.querySelectorAll("td.READY").length === 4`)
	until("a refusal", `document.body.textContent.includes("QUEUE_FULL")`)
	var first string
	if err := chromedp.Run(tab, chromedp.Text("h2", &first)); err != nil {
		t.Fatal(err)
	}
	until("the picks to change", `!document.querySelector("h2").innerText.includes(`+"`"+strings.TrimSpace(first)+"`"+`)`)
	until("a chart with several points", `[...document.querySelectorAll("polyline")].some(l => l.getAttribute("points").split(" ").length > 2)`)

	if err := servers[0].Fail(codes.Unavailable, 1); err != nil {
		t.Fatal(err)
	}
	until("an ejection", `[...document.querySelectorAll("tr")].some(r => r.querySelector("td.ASIDE") && r.textContent.includes(`+"`"+servers[0].Addr()+"`"+`) && r.textContent.includes("in a row failed"))`)

	var title, text string
	if err := chromedp.Run(tab, chromedp.Title(&title), chromedp.Text("body", &text)); err != nil {
		t.Fatal(err)
	}
	if title != "belfry" || !strings.Contains(text, name) {
		t.Errorf("title %q; the name of the stack is not shown as it is", title)
	}
	if file != "" {
		var png []byte
		if err := chromedp.Run(tab, chromedp.Sleep(10*time.Second), chromedp.CaptureScreenshot(&png)); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, png, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
