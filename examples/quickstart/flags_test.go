// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestDefaultsAreTowersExample(t *testing.T) {
	o, err := parseFlags(nil, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	w := o.workload
	var maxima []int64
	for _, m := range w.maxima {
		maxima = append(maxima, m.Milliseconds())
	}
	if want := []int64{1, 5, 10, 10, 10, 100, 100, 100, 500, 1000}; !slices.Equal(maxima, want) {
		t.Errorf("maxima are %v ms, want %v", maxima, want)
	}
	if w.inFlight != 500 || w.calls != 100_000 || w.workers != 0 || w.addTimer || o.count != 1 {
		t.Errorf("got %d in flight, %d calls, %d workers, addTimer %v, count %d; want 500, 100000, 0, false, 1",
			w.inFlight, w.calls, w.workers, w.addTimer, o.count)
	}
	var names []string
	for _, p := range o.policies {
		names = append(names, p.name)
	}
	if want := []string{"round_robin", "least_request_experimental", "pendingRequests", "peakEwma", "default"}; !slices.Equal(names, want) {
		t.Errorf("policies are %v, want %v", names, want)
	}
}

func TestDefaultReportIsTheUsersOwn(t *testing.T) {
	uid := os.Getuid()
	if uid < 0 {
		t.Skip("users have no numbers here")
	}
	if got, want := filepath.Base(defaultReport()), fmt.Sprintf("belfry-quickstart-%d.html", uid); got != want {
		t.Errorf("the report is %s, want %s", got, want)
	}
}

// Service configs of known policies are valid.
func TestKnownPoliciesAreValid(t *testing.T) {
	for _, p := range known {
		if err := checkConfig(p); err != nil {
			t.Error(err)
		}
	}
}

func TestFlagsSetTheWorkload(t *testing.T) {
	o, err := parseFlags([]string{"-max", "2ms, 1.5s", "-workers", "4", "-add-timer", "-in-flight", "7", "-calls", "9",
		"-policies", "default,round_robin", "-service-config", "mine=" + lbConfig(`"round_robin": {}`), "-count", "3", "-seed", "42", "-html", "none"}, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	w := o.workload
	if !slices.Equal(w.maxima, []time.Duration{2 * time.Millisecond, 1500 * time.Millisecond}) ||
		w.workers != 4 || !w.addTimer || w.inFlight != 7 || w.calls != 9 || w.seed != 42 || o.count != 3 || o.html != noReport {
		t.Errorf("got %+v, count %d, html %q", w, o.count, o.html)
	}
	if len(o.policies) != 3 || o.policies[0].name != "default" || o.policies[1].name != "round_robin" || o.policies[2].name != "mine" {
		t.Errorf("policies are %v, want default, round_robin, mine", o.policies)
	}
}

// Bad flags are errors that name flag value and rule.
func TestBadFlags(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing", "report.html")
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{"-calls", "0"}, []string{"-calls", "0", "must be from 1"}},
		{[]string{"-calls", "many"}, []string{"-calls", "many"}},
		{[]string{"-in-flight", "-1"}, []string{"-in-flight", "-1", "must be from 1"}},
		{[]string{"-workers", "-1"}, []string{"-workers", "-1", "must be from 0"}},
		{[]string{"-count", "0"}, []string{"-count", "0", "must be from 1"}},
		{[]string{"-max", "10"}, []string{"-max", `"10"`, "durations"}},
		{[]string{"-max", ""}, []string{"-max", `""`, "durations"}},
		{[]string{"-max", "1ms,-1ms"}, []string{"-max", "-1ms", "must be from 0"}},
		{[]string{"-max", strings.Repeat("1ms,", 1000) + "1ms"}, []string{"-max", "1001", "at most 1000"}},
		{[]string{"-policies", "random"}, []string{"-policies", `"random"`, "round_robin"}},
		{[]string{"-policies", ""}, []string{"-policies", `""`, "must name a policy"}},
		{[]string{"-policies", "default,default"}, []string{`"default"`, "twice"}},
		{[]string{"-service-config", "round_robin=" + lbConfig(`"round_robin": {}`)}, []string{`"round_robin"`, "twice"}},
		{[]string{"-service-config", "{}"}, []string{"-service-config", "{}", "name=JSON"}},
		{[]string{"-service-config", "x={"}, []string{"-service-config x", "invalid"}},
		{[]string{"-service-config", "x=" + lbConfig(`"belfry.p2c": {"choiceCount": 1}`)}, []string{"-service-config x", "choiceCount", "between 2 and 16"}},
		{[]string{"-html", ""}, []string{"-html", `""`, "must be a path"}},
		{[]string{"-html", missing}, []string{"-html", "missing", "directory that exists"}},
		{[]string{"-html", t.TempDir()}, []string{"-html", "must not be a directory"}},
		{[]string{"-nonsense"}, []string{"nonsense"}},
		{[]string{"fast"}, []string{`"fast"`, "unexpected argument"}},
	} {
		var stdout, stderr bytes.Buffer
		if code := quickstart(t.Context(), test.args, &stdout, &stderr, nil); code != exitUsage {
			t.Errorf("%q: exit code is %d, want %d", test.args, code, exitUsage)
		}
		for _, want := range test.want {
			if !strings.Contains(stderr.String(), want) {
				t.Errorf("%q: stderr is %q, want it to contain %q", test.args, &stderr, want)
			}
		}
		if stdout.Len() > 0 {
			t.Errorf("%q: stdout is %q, want nothing", test.args, &stdout)
		}
	}
}

// Help names every flag and policy.
func TestHelp(t *testing.T) {
	var out bytes.Buffer
	if _, err := parseFlags([]string{"-h"}, &out); !errors.Is(err, flag.ErrHelp) {
		t.Fatalf("got error %v, want flag.ErrHelp", err)
	}
	wants := knownNames()
	for _, f := range []string{"max", "workers", "add-timer", "in-flight", "calls", "policies", "service-config", "count", "seed", "html"} {
		wants = append(wants, "  -"+f)
	}
	for _, want := range wants {
		if !strings.Contains(out.String(), want) {
			t.Errorf("help lacks %q:\n%s", want, &out)
		}
	}
	if code := quickstart(t.Context(), []string{"-h"}, &out, t.Output(), nil); code != exitOK {
		t.Errorf("-h exits with %d, want %d", code, exitOK)
	}
}
