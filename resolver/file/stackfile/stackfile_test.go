// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackfile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/internal/testserver"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file/internal/follow"
)

func TestMain(m *testing.M) {
	follow.ReadEvery = time.Hour // Changes are reported.
	leaktest.Main(m)
}

// write replaces a file as it should be done.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path+".new", []byte(text), 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// open opens the file at path, and returns what it reports.
func open(t *testing.T, path string, opts ...Option) (*File, <-chan Reload) {
	t.Helper()
	reloads := make(chan Reload, 100)
	f, err := Open(path, append(opts, WithOnReload(func(r Reload) { reloads <- r }))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.Close)
	return f, reloads
}

// next waits for the next report.
func next(t *testing.T, reloads <-chan Reload) Reload {
	t.Helper()
	select {
	case r := <-reloads:
		return r
	case <-time.After(time.Minute):
		t.Fatal("no reload is reported")
	}
	panic("unreachable")
}

func wantError(t *testing.T, reloads <-chan Reload, want string) {
	t.Helper()
	if r := next(t, reloads); r.Err == nil || !strings.Contains(r.Err.Error(), want) || r.Changes.Began != nil {
		t.Fatalf("reported %+v, want an error that contains %q", r, want)
	}
}

const limited = `
stack:
  methodConfig:
  - name: [{}]
    layers:
    - timeout: {call: 10s}
    - {name: limit, concurrency: {limit: %d}}
`

// wrongTexts are documents that are refused, and what the errors say.
var wrongTexts = map[string]string{
	"":                         "must have the fields",
	"# nothing":                "must have the fields",
	"[]":                       "must have the fields",
	"a: b: c":                  "yaml",
	"stack: {}\nstack: {}":     "already set",
	"methodConfig: []":         "methodConfig: unknown field, must be one of loadBalancingConfig, stack",
	"Stack: {}":                "Stack: unknown field",
	"stack: {methodConfg: []}": "stack.methodConfg: unknown field",
	"stack: {methodConfig: [{name: [{}], layers: [{concurrency: {limit: -2}}]}]}": "stack.methodConfig[0].layers[0].concurrency.limit: -2, must be",
	"stack: {methodConfig: [{name: [{}], layers: [{timeout: {call: 10}}]}]}":      "stack.methodConfig[0].layers[0].timeout.call: 10, must be a duration",
	"stack: {methodConfig: [{name: [{}], layers: [{}]}]}":                         "stack.methodConfig[0].layers[0]: no kind",
	"stack: []":                                                 "stack: [], must be an object",
	"loadBalancingConfig: {}":                                   "loadBalancingConfig: must be a list",
	"loadBalancingConfig:":                                      "loadBalancingConfig: must be a list",
	"loadBalancingConfig: []":                                   "no policy that this program has",
	"loadBalancingConfig: [{a: {}}, {b: {}}]":                   "a, b: no policy that this program has",
	"loadBalancingConfig: [belfry.p2c]":                         "must be a list of policies",
	"loadBalancingConfig: [{belfry.p2c: {}, x: {}}]":            "entry 0 has 2 fields",
	"loadBalancingConfig: [{belfry.p2c: }]":                     "belfry.p2c: null, must be an object",
	"loadBalancingConfig: [{belfry.p2c: {choiceCount: 1}}]":     "entry 0: belfry.p2c: choiceCount: 1, must be between 2 and 16",
	"loadBalancingConfig: [{belfry.priority: {minHealthy: 2}}]": "minHealthy: 2",
}

func TestOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "client.yaml")
	if _, err := Open(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a file that is missing: %v", err)
	}
	for text, want := range wrongTexts {
		write(t, path, text)
		f, err := Open(path)
		if err == nil {
			f.Close()
		}
		if err == nil || !strings.HasPrefix(err.Error(), "stackfile: "+path+": ") || !strings.Contains(err.Error(), want) {
			t.Errorf("of %q: %v, want an error that contains %q", text, err, want)
		}
		if e := (*stackconfig.Error)(nil); strings.HasPrefix(want, "stack.") && !(errors.As(err, &e) && strings.HasPrefix(want, e.Field)) {
			t.Errorf("of %q: the field is not in %v", text, err)
		}
	}
	for text, want := range map[string]string{
		"{}":           `{"loadBalancingConfig":[{"belfry.p2c":{}}]}`,
		`{"stack":{}}`: `{"loadBalancingConfig":[{"belfry.p2c":{}}]}`,
		"loadBalancingConfig: [{unknown: {}}, {belfry.p2c: {memory: 3}}, {unknown: 1}]": `{"loadBalancingConfig":[{"unknown":{}},{"belfry.p2c":{"memory":3}},{"unknown":1}]}`,
	} {
		write(t, path, text)
		if f, err := Open(path); err != nil || f.serviceConfig != want {
			t.Errorf("of %q: %v, service config %s, want %s", text, err, f.serviceConfig, want)
		} else {
			f.Close()
			f.Close()
		}
	}
	for want, wrong := range map[string]func() (*File, error){
		"path":         func() (*File, error) { return Open("") },
		"WithOnReload": func() (*File, error) { return Open(path, WithOnReload(nil)) },
		"opts[0]":      func() (*File, error) { return Open(path, nil) },
		"WithObserver": func() (*File, error) { return Open(path, WithStackOptions(stackconfig.WithObserver(nil))) },
	} {
		if _, err := wrong(); !errors.As(err, new(*interceptor.ConfigError)) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want a ConfigError that contains %q", err, want)
		}
	}
	f, _ := open(t, path)
	if _, err := f.Source(nil); err == nil {
		t.Error("Source of nil: no error")
	}
}

// A file that is replaced, broken, removed and good again, while calls run through its
// stack and its policy.
func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "client.yaml")
	write(t, path, fmt.Sprintf(limited, 10))
	f, reloads := open(t, path)

	cluster := testserver.NewCluster(t, 2, func(int) []testserver.Option { return []testserver.Option{testserver.InMemory()} })
	list, err := discover.List(cluster.Endpoints()...)
	if err != nil {
		t.Fatal(err)
	}
	src, err := f.Source(list)
	if err != nil {
		t.Fatal(err)
	}
	opts := append(cluster.DialOptions(), f.Stack().DialOptions()...)
	conn, err := grpc.NewClient("belfry:///orders", append(append(opts, p2c.DialOptions()...), discover.WithSource(src))...)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := testingv1.NewTestServiceClient(conn)
	ctx, cancel := context.WithCancel(t.Context())
	var calls sync.WaitGroup
	defer calls.Wait()
	defer cancel()
	for range 3 {
		calls.Go(func() {
			for ctx.Err() == nil {
				if _, err := client.Unary(t.Context(), &testingv1.UnaryRequest{}); err != nil {
					t.Errorf("call: %v", err)
					return
				}
			}
		})
	}
	// policy waits until the policy is, or is not, belfry.p2c. A minute is for a
	// machine that stands still.
	policy := func(want bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
			if got := len(p2c.SnapshotsOf(conn)) > 0; got == want {
				return
			} else if time.Now().After(end) {
				t.Fatalf("the policy is belfry.p2c: %t, want %t", got, want)
			}
		}
	}
	policy(true)
	limit := func(want int64) {
		t.Helper()
		if got := f.Stack().Layer("limit").(*concurrency.Layer).Config().Limit; got != want {
			t.Errorf("limit %d, want %d", got, want)
		}
	}
	limit(10)
	state := f.Stack().Layer("limit")

	write(t, path, fmt.Sprintf(limited, 20)+"loadBalancingConfig: [{round_robin: {}}]")
	if r := next(t, reloads); r.Err != nil || r.Changes.Began != nil || r.Changes.Ended != nil {
		t.Errorf("reported %+v, want no state that starts or ends", r)
	}
	limit(20)
	if f.Stack().Layer("limit") != state {
		t.Error("the limit lost its state")
	}
	policy(false)

	// Neither half of a broken document is used.
	write(t, path, fmt.Sprintf(limited, 30)+"loadBalancingConfig: [{belfry.p2c: {choiceCount: 1}}]")
	wantError(t, reloads, "loadBalancingConfig: entry 0: belfry.p2c: choiceCount: 1")
	limit(20)
	write(t, path, fmt.Sprintf(limited, -30)+"loadBalancingConfig: [{belfry.p2c: {}}]")
	wantError(t, reloads, "stack.methodConfig[0].layers[1].concurrency.limit: -30")
	write(t, path, "")
	wantError(t, reloads, "must have the fields")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantError(t, reloads, "no such file")
	limit(20)
	if len(p2c.SnapshotsOf(conn)) > 0 {
		t.Error("the policy of a broken document is in force")
	}

	write(t, path, "stack: {methodConfig: [{name: [{}], layers: [{retry: {}}]}]}")
	if r := next(t, reloads); r.Err != nil || fmt.Sprint(r.Changes) != "{[methodConfig[0].layers[0]] [methodConfig[0].layers[0] methodConfig[0].layers[1]]}" {
		t.Errorf("reported %+v", r)
	}
	if got := f.Stack().String(); got != "*: [retry]" {
		t.Errorf("stack %s", got)
	}
	policy(true)
	cancel()
	calls.Wait()
	if len(reloads) > 0 {
		t.Errorf("reported more than once: %+v", <-reloads)
	}
}

// A mounted ConfigMap: the file is a link to ..data/client.yaml, and ..data one to a
// directory that is another for each version.
func TestConfigMap(t *testing.T) {
	dir := t.TempDir()
	version := func(n int) {
		t.Helper()
		name := fmt.Sprint("..version-", n)
		if err := errors.Join(
			os.Mkdir(filepath.Join(dir, name), 0o700),
			os.WriteFile(filepath.Join(dir, name, "client.yaml"), fmt.Appendf(nil, limited, n), 0o600),
			os.Symlink(name, filepath.Join(dir, "..data_tmp")),
			os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data"))); err != nil {
			t.Fatal(err)
		}
	}
	version(1)
	path := filepath.Join(dir, "client.yaml")
	if err := os.Symlink(filepath.Join("..data", "client.yaml"), path); err != nil {
		t.Fatal(err)
	}
	f, reloads := open(t, path)
	for n := 2; n < 4; n++ {
		version(n)
		if r := next(t, reloads); r.Err != nil {
			t.Fatal(r.Err)
		}
		if got := f.Stack().Layer("limit").(*concurrency.Layer).Config().Limit; got != int64(n) {
			t.Errorf("limit %d, want %d", got, n)
		}
		if err := os.RemoveAll(filepath.Join(dir, fmt.Sprint("..version-", n-1))); err != nil {
			t.Fatal(err)
		}
	}
}
