// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"html/template"
	"math"
	"strings"
	"time"

	"github.com/belfry-go/belfry/internal/loadgen"
)

// The charts are SVG that takes its colours from the style of the page: series
// i has the class s0 to s7, and what is not data has classes of its own.
const (
	seriesColours = 8

	chartWidth  = 860.0
	chartHeight = 380.0
	chartLeft   = 76.0
	chartRight  = 32.0
	chartTop    = 16.0
	chartBottom = 48.0
)

// An svg is a chart under construction.
type svg struct{ strings.Builder }

func newSVG(title string) *svg {
	b := &svg{}
	b.addf(`<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %g %g" role="img" aria-label="%s">`,
		chartWidth, chartHeight, template.HTMLEscapeString(title))
	return b
}

func (b *svg) addf(format string, args ...any) { fmt.Fprintf(b, format+"\n", args...) }

func (b *svg) text(x, y float64, anchor, s string) {
	b.addf(`<text x="%.1f" y="%.1f" text-anchor="%s">%s</text>`, x, y, anchor, template.HTMLEscapeString(s))
}

func (b *svg) line(x1, y1, x2, y2 float64, class string) {
	b.addf(`<line class="%s" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, class, x1, y1, x2, y2)
}

// finish returns the chart. All text in it has been escaped.
func (b *svg) finish() template.HTML {
	b.addf("</svg>")
	return template.HTML(b.String())
}

// A series is what one policy contributes to a chart.
type series struct {
	name      string
	latencies []time.Duration // of all its runs, ascending
	share     []float64       // by endpoint
}

// percentileChart draws the latency at each percentile, a curve per policy. Both
// axes are logarithmic, the horizontal one in what is above the percentile, so
// that 99 to 99.9 % has as much room as 90 to 99 %.
func percentileChart(all []series) template.HTML {
	lo, hi := math.Inf(1), 0.0
	longest := 0
	for _, s := range all {
		if n := len(s.latencies); n > 0 {
			lo = min(lo, millis(loadgen.Percentile(s.latencies, 0.01)))
			hi = max(hi, millis(s.latencies[n-1]))
			longest = max(longest, n)
		}
	}
	b := newSVG("Latency by percentile and policy")
	if longest == 0 {
		b.text(chartWidth/2, chartHeight/2, "middle", "no call was answered")
		return b.finish()
	}
	// From a whole decade, no lower than a microsecond, to a little above the
	// slowest call.
	bottom := math.Floor(math.Log10(max(lo, 0.001)))
	top := max(math.Log10(max(hi, 0.001))+0.1, bottom+1)
	// As far to the right as one call is a share.
	nines := min(max(math.Log10(float64(longest)), 1), 6)
	x := func(q float64) float64 {
		return chartLeft + (chartWidth-chartLeft-chartRight)*min(-math.Log10(max(1-q, 1e-9)), nines)/nines
	}
	y := func(ms float64) float64 {
		at := (math.Log10(max(ms, 0.001)) - bottom) / (top - bottom)
		return chartHeight - chartBottom - (chartHeight-chartTop-chartBottom)*min(max(at, 0), 1)
	}

	for d := bottom; d <= top; d++ {
		v := math.Pow(10, d)
		b.line(chartLeft, y(v), chartWidth-chartRight, y(v), "grid")
		b.text(chartLeft-8, y(v)+4, "end", fmt.Sprintf("%g ms", v))
	}
	for _, tick := range []struct {
		q    float64
		name string
	}{{0, "min"}, {0.5, "p50"}, {0.9, "p90"}, {0.99, "p99"}, {0.999, "p99.9"}, {0.9999, "p99.99"}, {0.99999, "p99.999"}} {
		if -math.Log10(1-tick.q) > nines+1e-9 {
			break
		}
		b.line(x(tick.q), chartTop, x(tick.q), chartHeight-chartBottom, "grid")
		b.text(x(tick.q), chartHeight-chartBottom+18, "middle", tick.name)
	}
	b.text((chartLeft+chartWidth-chartRight)/2, chartHeight-8, "middle", "percentile of the calls")

	const points = 240
	for i, s := range all {
		n := len(s.latencies)
		if n == 0 {
			continue
		}
		own := min(math.Log10(float64(n)), nines) // where one call is all there is above
		fmt.Fprintf(b, `<path class="curve s%d" d="`, i%seriesColours)
		for k := range points + 1 {
			q := 1 - math.Pow(10, -own*float64(k)/points)
			command := "L"
			if k == 0 {
				command = "M"
			}
			fmt.Fprintf(b, "%s%.1f %.1f ", command, x(q), y(millis(loadgen.Percentile(s.latencies, q))))
		}
		b.addf(`"><title>%s: p50 %s ms, p99 %s ms, p99.9 %s ms</title></path>`, template.HTMLEscapeString(s.name),
			formatMillis(loadgen.Percentile(s.latencies, p50)), formatMillis(loadgen.Percentile(s.latencies, p99)), formatMillis(loadgen.Percentile(s.latencies, p999)))
	}
	return b.finish()
}

// shareChart draws the share of the calls that each endpoint got, a group of
// bars per endpoint with one for each policy.
func shareChart(w workload, all []series) template.HTML {
	top := 0.0
	for _, s := range all {
		for _, share := range s.share {
			top = max(top, share)
		}
	}
	b := newSVG("Share of the calls by endpoint and policy")
	if top == 0 {
		b.text(chartWidth/2, chartHeight/2, "middle", "no call arrived")
		return b.finish()
	}
	// Steps of a size that leaves four to ten of them.
	step := 0.2
	for _, s := range []float64{0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001, 0.0001} {
		if top/step < 4 {
			step = s
		}
	}
	top = math.Ceil(top/step) * step
	y := func(share float64) float64 {
		return chartHeight - chartBottom - (chartHeight-chartTop-chartBottom)*share/top
	}
	for k := 0.0; k*step <= top*(1+1e-9); k++ {
		b.line(chartLeft, y(k*step), chartWidth-chartRight, y(k*step), "grid")
		b.text(chartLeft-8, y(k*step)+4, "end", fmt.Sprintf("%.3g %%", 100*k*step))
	}
	group := (chartWidth - chartLeft - chartRight) / float64(len(w.maxima))
	width := group * 0.8 / float64(len(all))
	// Beyond some twenty endpoints there is no room to name each.
	every := (len(w.maxima) + 19) / 20
	for e, m := range w.maxima {
		left := chartLeft + group*float64(e) + group*0.1
		if e%every == 0 {
			b.text(left+group*0.4, chartHeight-chartBottom+18, "middle", formatMaximum(m))
		}
		for i, s := range all {
			share := s.share[e]
			b.addf(`<rect class="bar s%d" x="%.2f" y="%.1f" width="%.2f" height="%.1f"><title>%s, endpoint %d (up to %s): %s %%</title></rect>`,
				i%seriesColours, left+width*float64(i), y(share), max(width-1, width*0.8), y(0)-y(share),
				template.HTMLEscapeString(s.name), e+1, formatMaximum(m), formatShare(share))
		}
	}
	b.text((chartLeft+chartWidth-chartRight)/2, chartHeight-8, "middle", "endpoints, by their maximum latency")
	return b.finish()
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
