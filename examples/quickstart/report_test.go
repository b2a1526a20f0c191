// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// checkPage checks that a report is well-formed, has both charts with finite
// coordinates in the picture, and refers to nothing outside itself. It returns
// the number of elements by name.
func checkPage(t *testing.T, page []byte) map[string]int {
	t.Helper()
	elements := make(map[string]int)
	d := xml.NewDecoder(bytes.NewReader(page))
	var open []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("report is not well-formed: %v", err)
		}
		switch e := token.(type) {
		case xml.StartElement:
			open = append(open, e.Name.Local)
			elements[e.Name.Local]++
			for _, a := range e.Attr {
				checkAttribute(t, e.Name.Local, a)
			}
		case xml.EndElement:
			open = open[:len(open)-1]
		case xml.CharData:
			if s := string(e); len(open) > 0 && open[len(open)-1] == "style" && (strings.Contains(s, "url(") || strings.Contains(s, "@import")) {
				t.Error("style refers to something outside the report")
			}
		}
	}
	for element, want := range map[string]int{"html": 1, "svg": 2, "script": 0, "link": 0, "img": 0, "iframe": 0} {
		if elements[element] != want {
			t.Errorf("report has %d elements %s, want %d", elements[element], element, want)
		}
	}
	if !bytes.HasPrefix(page, []byte("<!DOCTYPE html>\n")) {
		t.Errorf("report begins with %.20q, want the doctype", page)
	}
	return elements
}

func checkAttribute(t *testing.T, element string, a xml.Attr) {
	t.Helper()
	switch name := a.Name.Local; name {
	case "href", "src", "srcset", "data", "action":
		t.Errorf("<%s> has %s=%q, want no reference", element, name, a.Value)
	case "xmlns", "content", "aria-label":
	case "x", "y", "x1", "x2", "y1", "y2", "width", "height":
		var v float64
		if _, err := fmt.Sscan(a.Value, &v); err != nil || !(v >= 0 && v <= chartWidth) {
			t.Errorf("<%s> has %s=%q, want a number from 0 to %v", element, name, a.Value, chartWidth)
		}
	case "d":
		for _, point := range strings.FieldsFunc(a.Value, func(r rune) bool { return strings.ContainsRune("ML ", r) }) {
			var v float64
			if _, err := fmt.Sscan(point, &v); err != nil || !(v >= 0 && v <= chartWidth) {
				t.Fatalf("curve has %q, want a number from 0 to %v", point, chartWidth)
			}
		}
	default:
		if strings.Contains(a.Value, "://") {
			t.Errorf("<%s> has %s=%q, want no address", element, name, a.Value)
		}
	}
}

func render(t *testing.T, o *options, runs []*run) []byte {
	t.Helper()
	var page bytes.Buffer
	if err := writeReport(&page, o, runs, time.Unix(0, 0)); err != nil {
		t.Fatal(err)
	}
	return page.Bytes()
}

// Report has a curve and bars for each policy.
func TestReportHasEachPolicy(t *testing.T) {
	o := &options{workload: workload{maxima: []time.Duration{time.Millisecond, time.Second}, calls: 1000, inFlight: 10}, count: 1}
	var runs []*run
	for i := range 12 { // more than there are colours
		p := policy{fmt.Sprintf("policy %d", i), "{}", "It is one."}
		o.policies = append(o.policies, p)
		runs = append(runs, runOf(p.name, 0, upTo(1000, time.Duration(i+1)*time.Microsecond)))
	}
	page := render(t, o, runs)
	elements := checkPage(t, page)
	if elements["path"] != 12 || elements["rect"] != 24 {
		t.Errorf("got %d curves and %d bars, want 12 and 24", elements["path"], elements["rect"])
	}
	for _, p := range o.policies {
		for _, want := range []string{"<td>" + p.name + "</td>", `<th scope="col">` + p.name + "</th>", "<dt>" + p.name + "</dt>\n<dd>It is one.</dd>"} {
			if n := bytes.Count(page, []byte(want)); n != 1 {
				t.Errorf("report has %q %d times, want its figures, its column of shares, and what it is, once", want, n)
			}
		}
	}
}

// Report escapes names and configs.
func TestReportEscapes(t *testing.T) {
	p := policy{`<b>&"x"`, `{"a": "</code><script>"}`, "<i>"}
	o := &options{workload: workload{maxima: []time.Duration{time.Millisecond, 0}, calls: 3}, count: 1, policies: []policy{p}}
	r := runOf(p.name, 0, upTo(3, time.Millisecond))
	r.policy, r.errors, r.example = p, 1, errors.New("<i>")
	page := render(t, o, []*run{r})
	elements := checkPage(t, page)
	if elements["b"]+elements["i"]+elements["script"] != 0 {
		t.Errorf("names became elements:\n%s", page)
	}
}

func TestReportOfExtremesIsValid(t *testing.T) {
	for name, latencies := range map[string][]time.Duration{
		"none answered": nil,
		"a single one":  {time.Millisecond},
		"all zero":      make([]time.Duration, 10),
		"all alike":     {time.Second, time.Second, time.Second},
		"far apart":     {1, time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			p := policy{"p", "{}", ""}
			r := runOf("p", 0, latencies)
			r.errors = 1
			many := workload{maxima: make([]time.Duration, 200), calls: 10}
			r.served = make([]int, 200)
			r.served[199] = len(latencies)
			checkPage(t, render(t, &options{workload: many, count: 1, policies: []policy{p}}, []*run{r}))
		})
	}
}

// Progress bar shows the run and clears its line.
func TestProgressBar(t *testing.T) {
	s := start{policy: policy{name: "least_request_experimental"}, done: new(atomic.Int64)}
	s.done.Store(50)
	line := bar(s, 200)
	if !strings.HasPrefix(line, "least_request_experimental ") || !strings.Contains(line, " 25 % of 200 calls") ||
		strings.Count(line, "█") != 7 || strings.Count(line, "░") != 23 {
		t.Errorf("got %q, want the name, a quarter of 30 blocks and 25 %%", line)
	}
	if n := len([]rune(bar(s, 100_000))); n >= 80 {
		t.Errorf("line has %d characters, want less than 80", n)
	}
	var out bytes.Buffer
	p := newProgress(&out, workload{calls: 200})
	p.begin(s)
	p.stop()
	if got := out.String(); !strings.HasPrefix(got, "\r\x1b[K"+line) || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("wrote %q, want the line drawn and cleared", got)
	}
}
