// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// The chart is SVG that brings its own colours, also for readers who prefer dark
// pages.
const (
	chartWidth = 760.0
	labelWidth = 250.0
	valueWidth = 60.0
	barHeight  = 11.0
	groupGap   = 12.0
	chartHead  = 54.0
	chartFoot  = 34.0
)

const chartStyle = `<style>
text { font: 12px system-ui, sans-serif; fill: #1c2128; } .soft { fill: #59636e; } .grid { stroke: #d8dee4; }
.b0 { fill: #8c959f; } .b1 { fill: #b35900; } .b2 { fill: #8250df; } .b3 { fill: #0969da; } .b4 { fill: #1a7f37; } .b5 { fill: #bf3989; }
.ground { fill: #ffffff; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .soft { fill: #9198a1; } .grid { stroke: #30363d; } .ground { fill: #0d1117; }
.b0 { fill: #9ea7b3; } .b1 { fill: #f0883e; } .b2 { fill: #bc8cff; } .b3 { fill: #58a6ff; } .b4 { fill: #3fb950; } .b5 { fill: #f778ba; }
}
</style>`

// chart returns a chart of the p99 of each policy but the first, in ratio to the
// first, on a logarithmic scale that begins at 1.
func (p *plan) chart(table [][]cell) string {
	bars := len(p.policies) - 1
	most := 2.0
	ratios := make([][]float64, len(table))
	for i := range table {
		for j := 1; j <= bars; j++ {
			r := median(table[i][j].ratios(&table[i][0]))
			ratios[i] = append(ratios[i], r)
			most = max(most, r)
		}
	}
	group := float64(bars)*barHeight + groupGap
	height := chartHead + group*float64(len(table)) + chartFoot
	x := func(ratio float64) float64 {
		return labelWidth + (chartWidth-labelWidth-valueWidth)*math.Log(max(ratio, 1))/math.Log(most)
	}

	var b strings.Builder
	add := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	add(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" role="img" aria-label="p99 in ratio to %s">`, chartWidth, height, html.EscapeString(p.policies[0].Name))
	add("%s", chartStyle)
	add(`<rect class="ground" width="%g" height="%g"/>`, chartWidth, height)
	at := 8.0
	for j := 1; j <= bars; j++ {
		name := p.policies[j].Name
		add(`<rect class="b%d" x="%.1f" y="9" width="10" height="10"/><text x="%.1f" y="18">%s</text>`, (j-1)%6, at, at+15, html.EscapeString(name))
		at += 36 + 7*float64(len(name))
	}
	add(`<text class="soft" x="8" y="38">99th percentile of the latency in ratio to that of the %s; 1 is perfect, shorter is better</text>`, html.EscapeString(p.policies[0].Name))
	for _, tick := range []float64{1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000} {
		if tick > most {
			break
		}
		add(`<line class="grid" x1="%.1f" y1="%g" x2="%.1f" y2="%g"/>`, x(tick), chartHead-6, x(tick), height-chartFoot)
		add(`<text class="soft" x="%.1f" y="%g" text-anchor="middle">%g</text>`, x(tick), height-chartFoot+16, tick)
	}
	for i, s := range p.scenarios {
		top := chartHead + group*float64(i)
		add(`<text x="%g" y="%.1f" text-anchor="end">%s</text>`, labelWidth-10, top+float64(bars)*barHeight/2+4, html.EscapeString(s.Name))
		for j, r := range ratios[i] {
			y := top + barHeight*float64(j)
			// A bar of ratio 1 would have no width.
			add(`<rect class="b%d" x="%.1f" y="%.1f" width="%.1f" height="%g"/>`, j%6, labelWidth, y, max(x(r)-labelWidth, 1.5), barHeight-2)
			add(`<text class="soft" style="font-size:10px" x="%.1f" y="%.1f">%.2f</text>`, max(x(r), labelWidth+1.5)+4, y+barHeight-3, r)
		}
	}
	add("</svg>")
	return b.String()
}

// ratios returns the p99 of each run in ratio to that of the same run of first.
func (c *cell) ratios(first *cell) []float64 {
	var all []float64
	for i, r := range c.results {
		all = append(all, r.Percentile(0.99).Seconds()/first.results[i].Percentile(0.99).Seconds())
	}
	return all
}
