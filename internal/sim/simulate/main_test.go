// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"encoding/xml"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/belfry-go/belfry/internal/sim"
	"github.com/belfry-go/belfry/internal/test/leaktest"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// Table has a row per scenario and a column per policy.
func TestTableHasEachCell(t *testing.T) {
	args := []string{"-scenarios", "^homogeneous", "-policies", "oracle,default,random", "-calls", "100", "-warmup", "100ms", "-runs", "2", "-parallel", "2"}
	var out strings.Builder
	if err := run(args, &out, io.Discard); err != nil {
		t.Fatal(err)
	}
	number := `\d+\.\d / \d+\.\d`
	ratio := number + ` \(\d+\.\d\d\)`
	want := regexp.MustCompile(`^\| p99 .* \| oracle \| default \| random \|
\| --- \| --- \| --- \| --- \|
\| homogeneous 70 % \| ` + number + ` \| ` + ratio + ` \| ` + ratio + ` \|
\| homogeneous 90 % \| ` + number + ` \| ` + ratio + ` \| ` + ratio + ` \|
$`)
	if got := out.String(); !want.MatchString(got) {
		t.Errorf("table is\n%s, want it to match\n%s", got, want)
	}
}

// Chart has a bar for each scenario and policy but the first.
func TestChartHasEachBar(t *testing.T) {
	path := filepath.Join(t.TempDir(), "chart.svg")
	args := []string{"-scenarios", "^homogeneous", "-policies", "oracle,default,random", "-calls", "100", "-warmup", "100ms", "-svg", path}
	if err := run(args, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	svg, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := xml.Unmarshal(svg, new(struct{})); err != nil {
		t.Errorf("the chart is not XML: %v", err)
	}
	// Two rectangles are of the legend, and one is the ground.
	if got := strings.Count(string(svg), "<rect"); got != 2*2+2+1 {
		t.Errorf("the chart has %d rectangles, want 7:\n%s", got, svg)
	}
	if err := run([]string{"-policies", "default", "-svg", path}, io.Discard, io.Discard); err == nil {
		t.Error("a chart of one policy is no error")
	}
}

func TestFailedCallsAreInTheTable(t *testing.T) {
	c := cell{results: []*sim.Result{{Calls: 200, Failed: 1}, {Calls: 200, Failed: 3}, {Calls: 200, Failed: 5}}}
	if got, want := c.format(&c, 0), "0.0 / 0.0 1.50 % failed"; got != want {
		t.Errorf("cell is %q, want %q", got, want)
	}
}

// Bad flags are errors that name the flag.
func TestBadFlags(t *testing.T) {
	for _, c := range []struct{ flag, value string }{
		{"calls", "0"}, {"runs", "-1"}, {"warmup", "-1s"}, {"parallel", "0"},
		{"scenarios", "("}, {"scenarios", "no such"}, {"policies", "oracle,nosuch"}, {"seed", "x"},
	} {
		err := run([]string{"-" + c.flag, c.value}, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "-"+c.flag) {
			t.Errorf("-%s %s: error is %v, want one that names the flag", c.flag, c.value, err)
		}
	}
}
