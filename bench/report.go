// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"
	"time"
)

// A page is all that RESULTS.md says.
type page struct {
	command  string
	plan     plan
	when     time.Time
	elapsed  time.Duration
	machine  machine
	missing  []string // what could not be compared, as full sentences
	sections []*section
}

// write writes the page as Markdown.
func (p *page) write(out io.Writer) error {
	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	add("# Results\n")
	add("belfry beside its peers, measured by the program in this directory. Do not edit: it writes this page.\n")
	p.head(add)
	p.summary(add)
	for _, s := range p.sections {
		add("## %s\n", s.title)
		add("%s\n", strings.TrimSpace(s.about))
		if s.chart != "" {
			add("![%s](charts/%s)\n", s.title, s.chart)
		}
		for _, g := range s.groups {
			g.write(add)
		}
	}
	p.versions(add)
	_, err := io.WriteString(out, strings.TrimRight(b.String(), "\n")+"\n")
	return err
}

type printer func(format string, args ...any)

func (p *page) head(add printer) {
	add("```sh")
	add("%s   # took %v, %s", p.command, p.elapsed.Round(time.Second), p.when.UTC().Format("2006-01-02 15:04 UTC"))
	add("```\n")
	m := p.machine
	add("| | |\n| --- | --- |")
	add("| machine | %s, %d processors, %s, kernel %s |", m.cpu, m.cores, m.system, m.kernel)
	add("| load before the run | %s |", m.load)
	add("| Go | %s, its collector as it is |", m.goes)
	for _, mod := range m.modules[:min(len(m.modules), len(compared))] {
		add("| %s | %s |", mod.path, mod.version)
	}
	add("| repeats | %d, of the cluster %d; seeds from %d on |\n", p.plan.repeats, p.plan.clusterRepeats, p.plan.seed)
	add("Figures are medians of the repeats, and all rows of a table are measured in turn in each of them. Ratios are medians of the ratios within a repeat, so they hold on machines where the figures do not. The column “ratio” sets the first figure of the row, or in the cluster the p99, in ratio to that of the row in bold.\n")
	if p.plan.quick {
		add("**This is a quick run**: it shows that the program works. Its figures are noise where rows are close.\n")
	}
	for _, m := range p.missing {
		add("- %s", m)
	}
	if len(p.missing) > 0 {
		add("")
	}
}

func (p *page) summary(add printer) {
	if all := claims(p.sections); len(all) > 0 {
		add("## What belfry claims\n")
		for _, c := range all {
			switch {
			case c.tried == 0:
				add("- Not looked at: %s", c.text)
			case len(c.missed) == 0:
				add("- **Holds** in all of %d: %s", c.tried, c.text)
			default:
				add("- **Holds in %d of %d**: %s", c.tried-c.failed, c.tried, c.text)
				for _, m := range c.missed {
					add("  - %s", m)
				}
			}
		}
		add("")
	}
	add("## Where a peer wins\n")
	add("Where a peer is better than belfry's row in bold by more than 5 %%, in ratio to it, and why. The program compares all rows and chooses the reason by the figures and by what the peer's code does.\n")
	all := wins(p.sections)
	if len(all) == 0 {
		add("Nowhere.\n")
		return
	}
	add("| section | rows | who | ratio | why |\n| --- | --- | --- | --- | --- |")
	// The metrics of a row that have one reason share a line.
	for i := 0; i < len(all); {
		w, why := all[i], all[i].why()
		var figures []string
		for ; i < len(all) && all[i].peer == w.peer && all[i].why() == why; i++ {
			figures = append(figures, fmt.Sprintf("%s %s", all[i].group.metrics[all[i].metric].name, formatRatio(all[i].peer.ratio(all[i].metric, all[i].base))))
		}
		add("| %s | %s | %s | %s | %s |", w.section.title, w.group.name, w.peer.name, strings.Join(figures, "; "), why)
	}
	add("")
}

func (p *page) versions(add printer) {
	add("## Versions\n")
	add("All modules that the program is built with.\n")
	add("<details>\n\n| module | version |\n| --- | --- |")
	for _, m := range p.machine.modules {
		add("| %s | %s |", m.path, m.version)
	}
	add("\n</details>")
}

// write writes the group as a table.
func (g *group) write(add printer) {
	add("### %s\n", upperFirst(g.name))
	if g.about != "" {
		add("%s\n", g.about)
	}
	head, rule := "| |", "| --- |"
	for _, m := range g.metrics {
		head += " " + m.name + " |"
		rule += " ---: |"
	}
	b := g.base()
	if b != nil {
		head, rule = head+" ratio |", rule+" ---: |"
	}
	add("%s\n%s", head, rule)
	var notes []string
	for _, r := range g.rows {
		name := r.name
		if r == b {
			name = "**" + name + "**"
		}
		line := "| " + name + " |"
		if !r.measured() {
			line += strings.Repeat(" – |", len(g.metrics))
			if b != nil {
				line += " – |"
			}
			if r.note != "" {
				notes = append(notes, fmt.Sprintf("%s: %s.", r.name, r.note))
			}
			add("%s", line)
			continue
		}
		if r.busy >= boundBusy {
			line = "| " + name + " (CPU-bound) |"
		}
		for i, m := range g.metrics {
			line += " " + formatValue(r.median(i), m.digits) + " |"
		}
		if b != nil {
			line += " " + formatRatio(r.ratio(g.ratioMetric(), b)) + " |"
		}
		add("%s", line)
	}
	add("")
	for _, n := range notes {
		add("- %s", n)
	}
	if len(notes) > 0 {
		add("")
	}
}

// ratioMetric is the metric of the column “ratio”: the p99 where that is what is compared.
func (g *group) ratioMetric() int {
	if i := g.metric("p99, ms"); i >= 0 && g.metrics[i].judged {
		return i
	}
	return 0
}

// formatValue returns v with so many significant digits, without an exponent.
func formatValue(v float64, digits int) string {
	switch {
	case math.IsNaN(v):
		return "–"
	case math.Abs(v) < 0.005:
		return "0"
	}
	decimals := max(digits-1-int(math.Floor(math.Log10(math.Abs(v)))), 0)
	s := strconv.FormatFloat(v, 'f', min(decimals, 2), 64)
	if whole, fraction, ok := strings.Cut(s, "."); ok && strings.Trim(fraction, "0") == "" {
		s = whole
	}
	whole, fraction, _ := strings.Cut(s, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if fraction != "" {
		return whole + "." + fraction
	}
	return whole
}

func upperFirst(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}
