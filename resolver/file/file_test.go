// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file/internal/follow"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/grpc/resolver"
)

func TestMain(m *testing.M) {
	// Tests that mean the reading without a report make it shorter.
	follow.ReadEvery = time.Hour
	leaktest.Main(m)
}

// A told is a set, or an error, of a source.
type told struct {
	set string
	err error
}

// watch watches a file until the test ends.
func watch(t *testing.T, path string) <-chan told {
	t.Helper()
	src, err := New(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	all, done := make(chan told, 100), make(chan struct{})
	go func() {
		defer close(done)
		set := map[string]resolver.Endpoint{}
		for element, err := range src.Watch(ctx) {
			if err != nil {
				all <- told{err: err}
				continue
			}
			for c := range element.All() {
				switch c.Op {
				case discover.OpInsert:
					set[c.Key] = c.Endpoint
				case discover.OpRemove:
					delete(set, c.Key)
				case discover.OpSynced:
					all <- told{set: show(set)}
				}
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return all
}

func show(set map[string]resolver.Endpoint) string {
	var parts []string
	for k, ep := range set {
		var addrs []string
		for _, a := range ep.Addresses {
			addrs = append(addrs, strings.TrimSuffix(a.Addr+"/"+a.ServerName, "/"))
		}
		part := fmt.Sprintf("%s=%s*%d@%s", k, strings.Join(addrs, "+"), discover.WeightOf(ep), discover.ZoneOf(ep))
		if g := discover.GroupOf(ep); g != 0 {
			part += fmt.Sprint("^", g)
		}
		if discover.IsDraining(ep) {
			part += "!"
		}
		parts = append(parts, part)
	}
	slices.Sort(parts)
	return strings.Join(parts, " ")
}

// next waits for what the source tells next.
func next(t *testing.T, all <-chan told) told {
	t.Helper()
	select {
	case got := <-all:
		return got
	case <-time.After(30 * time.Second):
		t.Fatal("the source tells nothing")
	}
	panic("unreachable")
}

func wantSet(t *testing.T, all <-chan told, want string) {
	t.Helper()
	if got := next(t, all); got.err != nil || got.set != want {
		t.Fatalf("told set %q, error %v, want %q", got.set, got.err, want)
	}
}

func wantError(t *testing.T, all <-chan told, want string) {
	t.Helper()
	if got := next(t, all); got.err == nil || !strings.Contains(got.err.Error(), want) {
		t.Fatalf("told set %q, error %v, want an error that contains %q", got.set, got.err, want)
	}
}

// write replaces a file as it should be done.
func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func TestParse(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"YAML", `
- 10.0.0.1:8080
- address: 10.0.0.2:8080
  weight: 2
  zone: a
  group: 1
  draining: true
- key: pod-3
  addresses: ["10.0.0.3:8080", "[fd00::3]:8080"]
  serverName: orders.internal
`, "10.0.0.1:8080=10.0.0.1:8080*1@ 10.0.0.2:8080=10.0.0.2:8080*2@a^1! pod-3=10.0.0.3:8080/orders.internal+[fd00::3]:8080/orders.internal*1@"},
		{"JSON", `["10.0.0.1:8080", {"address": "10.0.0.2:8080", "weight": 2}]`, "10.0.0.1:8080=10.0.0.1:8080*1@ 10.0.0.2:8080=10.0.0.2:8080*2@"},
		{"none", `[]`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			endpoints, err := parse("f", []byte(tt.text))
			set := map[string]resolver.Endpoint{}
			for _, ep := range endpoints {
				k := discover.KeyOf(ep)
				if k == "" {
					k = ep.Addresses[0].Addr
				}
				set[k] = ep
			}
			if got := show(set); err != nil || got != tt.want {
				t.Errorf("endpoints %s, error %v, want %s", got, err, tt.want)
			}
		})
	}
	for text, want := range map[string]string{
		"a: b: c":                            "yaml",
		"# nothing":                          "must be a list of endpoints",
		"endpoints: []":                      "must be a list of endpoints",
		"- 1":                                "entry 0: 1: must be an address, or have the field address",
		"- null":                             "entry 0: null: must be an address",
		"- a:1\n- {address: b:1, wieght: 2}": `entry 1: json: unknown field "wieght"`,
		"- {address: a:1, weight: 0}":        "entry 0: discover: endpoint \"a:1\": weight 0: must be at least 1",
		"- {address: a:1, weight: -1}":       "entry 0: json: cannot unmarshal number -1",
		"- {address: a:1, zone: ''}":         "zone is empty",
		"- {zone: a}":                        "must have either the field address or the field addresses",
		"- {address: a:1, addresses: [b:1]}": "must have either the field address or the field addresses",
		"- ''":                               "address is empty",
		"- {address: a:1, address: b:1}":     "already set",
	} {
		if _, err := parse("f", []byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error of %q = %v, want one that contains %q", text, err, want)
		}
	}
}

// The schema for editors has the fields of an entry, and accepts what parse accepts.
func TestSchema(t *testing.T) {
	text, err := os.ReadFile("endpoints.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("endpoints", parsed); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile("endpoints")
	if err != nil {
		t.Fatal(err)
	}
	properties := schema.Items.(*jsonschema.Schema).OneOf[1].Properties
	for i := range reflect.TypeFor[entry]().NumField() {
		if name := reflect.TypeFor[entry]().Field(i).Tag.Get("json"); properties[name] == nil {
			t.Errorf("the schema has no field %s", name)
		}
	}
	if got, want := len(properties), reflect.TypeFor[entry]().NumField(); got != want {
		t.Errorf("the schema has %d fields, want %d", got, want)
	}
	for text, good := range map[string]bool{
		"[]": true, "- a:1": true, "- {address: a:1, weight: 2, zone: z, key: k, group: 1, draining: true, serverName: s}": true,
		"- {addresses: [a:1, b:1]}": true, "{}": false, "- {}": false, "- 1": false, "- null": false, "- ''": false,
		"- {address: a:1, addresses: [b:1]}": false, "- {address: a:1, wieght: 2}": false, "- {address: a:1, weight: 0}": false,
		"- {address: a:1, zone: ''}": false, "- {address: a:1, group: -1}": false, "- {zone: z}": false, "- {address: a:1, weight: 1.5}": false,
		"- {address: a:1, key: ''}": false, "- {address: a:1, serverName: ''}": false, "- {addresses: []}": false,
	} {
		js, err := follow.JSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(js))
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(doc); (err == nil) != good {
			t.Errorf("the schema says of %q: %v, want good: %t", text, err, good)
		}
		if _, err := parse("f", []byte(text)); (err == nil) != good {
			t.Errorf("parse says of %q: %v, want good: %t", text, err, good)
		}
	}
}

func TestFollowsTheFile(t *testing.T) {
	t.Run("through changes, and keeps the last set while it is broken", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "endpoints.yaml")
		all := watch(t, path)
		wantError(t, all, "no such file")
		write(t, path, "- a:1")
		wantSet(t, all, "a:1=a:1*1@")
		write(t, path, "- a:1\n- b")
		wantSet(t, all, "a:1=a:1*1@ b=b*1@") // what an address may be is the channel's business
		write(t, path, "- {a:1}")
		wantError(t, all, "entry 0: json: unknown field")
		write(t, path, "")
		wantError(t, all, "is empty: write [] if there are no endpoints")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		wantError(t, all, "no such file")
		write(t, path, "- {key: k, address: a:1}\n- {key: k, address: b:1}")
		wantError(t, all, `key "k" is taken by another endpoint`)
		write(t, path, "- a:1\n- c:1")
		wantSet(t, all, "a:1=a:1*1@ c:1=c:1*1@")
		write(t, path, "[]")
		wantSet(t, all, "")
	})

	t.Run("through the links of a ConfigMap", func(t *testing.T) {
		dir := t.TempDir()
		// The file is a link to ..data/endpoints.yaml, and ..data to a directory
		// that is another for each version.
		version := func(n int, text string) {
			t.Helper()
			name := fmt.Sprint("..version-", n)
			err := errors.Join(
				os.Mkdir(filepath.Join(dir, name), 0o700),
				os.WriteFile(filepath.Join(dir, name, "endpoints.yaml"), []byte(text), 0o600),
				os.Symlink(name, filepath.Join(dir, "..data_tmp")),
				os.Rename(filepath.Join(dir, "..data_tmp"), filepath.Join(dir, "..data")))
			if err != nil {
				t.Fatal(err)
			}
		}
		version(1, "- a:1")
		path := filepath.Join(dir, "endpoints.yaml")
		if err := os.Symlink(filepath.Join("..data", "endpoints.yaml"), path); err != nil {
			t.Fatal(err)
		}
		all := watch(t, path)
		wantSet(t, all, "a:1=a:1*1@")
		version(2, "- a:2")
		wantSet(t, all, "a:2=a:2*1@")
		if err := os.RemoveAll(filepath.Join(dir, "..version-1")); err != nil {
			t.Fatal(err)
		}
		version(3, "- a:3")
		wantSet(t, all, "a:3=a:3*1@")
	})

	t.Run("where no change is reported", func(t *testing.T) {
		follow.ReadEvery = time.Millisecond
		defer func() { follow.ReadEvery = time.Hour }()
		elsewhere := filepath.Join(t.TempDir(), "list")
		dir := filepath.Join(t.TempDir(), "not-there-yet")
		all := watch(t, filepath.Join(dir, "endpoints.yaml"))
		wantError(t, all, "no such file")
		write(t, elsewhere, "- a:1")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Symlink(elsewhere, filepath.Join(dir, "endpoints.yaml"))); err != nil {
			t.Fatal(err)
		}
		wantSet(t, all, "a:1=a:1*1@")
		write(t, elsewhere, "- a:2")
		wantSet(t, all, "a:2=a:2*1@")
	})
}

// An error is reported once, however often the file is read.
func TestBrokenFileIsReportedOnce(t *testing.T) {
	follow.ReadEvery = time.Millisecond
	defer func() { follow.ReadEvery = time.Hour }()
	path := filepath.Join(t.TempDir(), "endpoints.yaml")
	all := watch(t, path)
	wantError(t, all, "no such file")
	time.Sleep(20 * time.Millisecond) // It is read some times.
	write(t, path, "{")
	wantError(t, all, "yaml")
	time.Sleep(20 * time.Millisecond)
	write(t, path, "- a:1")
	wantSet(t, all, "a:1=a:1*1@")
}

// While calls run, 1,000 random changes: the file is replaced, written in place, broken,
// or removed in between. Then it is broken, gone, half written, or without its directory
// for as long as the flag -outage says. No call fails, each error is reported once, and at
// rest the channel has what the file has.
func TestFileUnderLoad(t *testing.T) {
	// Nobody reports that a directory is back.
	follow.ReadEvery = 100 * time.Millisecond
	defer func() { follow.ReadEvery = time.Hour }()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	dir := filepath.Join(t.TempDir(), "mounted")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "endpoints.yaml")
	addrs := enginetest.Serve(t, 10)
	weights := make([]int, len(addrs)) // 0: not there
	weights[0] = 1
	var text strings.Builder
	change := func() enginetest.Set {
		// The first stays, so that calls need not fail.
		i := 1 + rng.IntN(len(addrs)-1)
		weights[i] = (weights[i] + 1 + rng.IntN(2)) % 3
		set := enginetest.Set{}
		text.Reset()
		for _, i := range rng.Perm(len(addrs)) {
			if w := weights[i]; w > 0 {
				fmt.Fprintf(&text, "- {address: %q, weight: %d, zone: z}\n", addrs[i], w)
				set[addrs[i]] = fmt.Sprintf("%s*%d@z", addrs[i], w)
			}
		}
		return set
	}
	replaced := func() enginetest.Set {
		set := change()
		write(t, path, text.String())
		return set
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	set := replaced()
	src, err := New(path)
	must(err)
	channel := enginetest.Dial(t, src)
	channel.WaitSet(t, set)
	channel.Load(4)
	for n := range 1000 {
		set = change()
		switch rng.IntN(8) {
		case 0:
			must(os.WriteFile(path, []byte(text.String()), 0o600))
		case 1:
			write(t, path, "- {")
		case 2:
			must(os.RemoveAll(path))
		default:
			write(t, path, text.String())
		}
		if n%100 == 99 {
			write(t, path, text.String())
			channel.WaitSet(t, set)
		}
	}

	in := func(name, told string, begin func()) enginetest.Disturbance {
		return enginetest.Disturbance{Name: name, Told: told, Begin: begin, End: func() {}}
	}
	away := dir + "-away"
	channel.Survive(t, replaced,
		in("broken", "yaml", func() { write(t, path, "- {") }),
		in("empty", "is empty: write []", func() { write(t, path, "") }),
		in("gone", "no such file", func() { must(os.Remove(path)) }),
		in("half written", "file:", func() {
			must(os.WriteFile(path, []byte(text.String()[:text.Len()/2]+"\n- null\n"), 0o600))
		}),
		enginetest.Disturbance{
			Name: "without its directory", Told: "no such file",
			Begin: func() { must(os.Rename(dir, away)) },
			End:   func() { must(os.Rename(away, dir)) },
		},
		enginetest.Disturbance{
			Name: "in a directory made again", Told: "no such file",
			Begin: func() { must(os.RemoveAll(dir)) },
			End:   func() { must(os.Mkdir(dir, 0o700)) },
		},
	)
}

func TestNewNeedsAPath(t *testing.T) {
	if _, err := New(""); err == nil {
		t.Error("no error of an empty path")
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("- 10.0.0.1:8080\n- {address: b:1, weight: 2, zone: a, key: k, serverName: s}\n"))
	f.Add([]byte(`[{"addresses": ["a:1", "b:1"]}, null, 1, "c"]`))
	f.Fuzz(func(t *testing.T, text []byte) {
		endpoints, err := parse("f", text)
		if err == nil {
			if _, err := discover.List(endpoints...); err != nil && !strings.Contains(err.Error(), "keys must be unique") {
				t.Errorf("endpoints that cannot be listed: %v", err)
			}
		}
	})
}
