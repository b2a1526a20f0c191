// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// A bars is a chart of horizontal bars, some for each label, on a logarithmic scale.
type bars struct {
	title  string
	labels []string // from top to bottom
	series []series
}

// A series is the bars of one colour; NaN is no bar.
type series struct {
	name   string
	values []float64
	colour color.Color
}

// palette is readable on white, and by those who see no red and green.
var palette = []color.Color{
	color.RGBA{9, 105, 218, 255}, color.RGBA{84, 174, 255, 255}, color.RGBA{182, 227, 255, 255},
	color.RGBA{179, 89, 0, 255}, color.RGBA{251, 143, 68, 255},
	color.RGBA{140, 149, 159, 255}, color.RGBA{87, 96, 106, 255}, color.RGBA{208, 215, 222, 255},
	color.RGBA{26, 127, 55, 255}, color.RGBA{130, 80, 223, 255}, color.RGBA{191, 57, 137, 255},
}

// chartOf returns the chart of a section: the first metric of its rows.
func chartOf(s *section) bars {
	switch s.key {
	case "cluster":
		return scenariosChart(s)
	case "pick":
		return sizesChart(s)
	}
	b := bars{title: s.title + ": " + s.groups[0].metrics[0].name}
	role := map[bool]*series{true: {name: "belfry", colour: palette[0]}, false: {name: "others", colour: palette[5]}}
	for _, g := range s.groups {
		for _, r := range g.rows {
			label := r.name
			if len(s.groups) > 1 {
				label = g.name + ": " + label
			}
			b.labels = append(b.labels, label)
			mine := r.role == base || r.role == ours
			role[mine].values = append(role[mine].values, r.median(0))
			role[!mine].values = append(role[!mine].values, math.NaN())
		}
	}
	b.series = []series{*role[true], *role[false]}
	return b
}

// sizesChart has the policies as labels, and a bar for each number of endpoints.
func sizesChart(s *section) bars {
	b := bars{title: s.title + ": " + s.groups[0].metrics[0].name}
	for _, r := range s.groups[0].rows {
		b.labels = append(b.labels, r.name)
	}
	for i, g := range s.groups {
		values := series{name: g.name, colour: palette[len(s.groups)-1-i]}
		for _, r := range g.rows {
			values.values = append(values.values, r.median(0))
		}
		b.series = append(b.series, values)
	}
	return b
}

// scenariosChart has the scenarios as labels, and the p99 of a policy as a bar.
func scenariosChart(s *section) bars {
	p99 := s.groups[0].metric("p99, ms")
	b := bars{title: s.title + ": p99, ms"}
	for i, r := range s.groups[0].rows {
		values := series{name: r.name, colour: palette[i%len(palette)]}
		for _, g := range s.groups {
			v := math.NaN()
			if same := g.row(r.name); same != nil {
				v = same.median(p99)
			}
			values.values = append(values.values, v)
		}
		b.series = append(b.series, values)
	}
	for _, g := range s.groups {
		b.labels = append(b.labels, g.name)
	}
	return b
}

const (
	barWidth = 4 * vg.Millimeter
	thinBar  = 2 * vg.Millimeter
)

// save draws the chart into an SVG file.
func (b bars) save(path string) error {
	least, most := math.Inf(1), math.Inf(-1)
	for _, s := range b.series {
		for _, v := range s.values {
			if v > 0 && !math.IsInf(v, 0) {
				least, most = min(least, v), max(most, v)
			}
		}
	}
	if least > most {
		least, most = 1, 1
	}
	low := math.Floor(math.Log10(least) - 0.1)
	high := math.Log10(most) + 0.15

	p := plot.New()
	p.Title.Text = b.title + " (logarithmic scale)"
	p.BackgroundColor = color.White
	p.X.Min, p.X.Max = 0, high-low
	p.X.Tick.Marker = decades(low, high)
	p.Legend.Top = true
	p.Legend.ThumbnailWidth = 3 * vg.Millimeter
	for _, f := range []*font.Font{&p.Title.TextStyle.Font, &p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font} {
		f.Variant = "Sans"
	}

	n := len(b.labels)
	width := barWidth
	side := len(b.series) // bars beside each other; two series without common labels share a place
	if b.exclusive() {
		side = 1
	} else {
		width = thinBar
	}
	for i, s := range b.series {
		heights := make(plotter.Values, n)
		for k, v := range s.values {
			if v > 0 && !math.IsInf(v, 0) {
				heights[n-1-k] = math.Log10(v) - low // the first label at the top
			}
		}
		chart, err := plotter.NewBarChart(heights, width)
		if err != nil {
			return fmt.Errorf("chart %s: %w", path, err)
		}
		chart.Horizontal, chart.Color, chart.LineStyle.Width = true, s.colour, 0
		if side > 1 {
			chart.Offset = width * vg.Length(float64(side-1)/2-float64(i))
		}
		p.Add(chart)
		p.Legend.Add(s.name+strings.Repeat(" ", 2+len(s.name)/3), chart) // as for the labels
	}
	labels := make([]string, n)
	for k, l := range b.labels {
		// Readers often have a wider font than the one that the text is placed by. Spaces at
		// its end keep it off the bars.
		labels[n-1-k] = l + strings.Repeat(" ", 2+len(l)/3)
	}
	p.NominalY(labels...)
	pitch, legend := width*vg.Length(side)+barWidth/2, vg.Length(len(b.series))*5*vg.Millimeter
	p.Y.Max += float64(legend / pitch) // room for the legend

	c := vgsvg.New(26*vg.Centimeter, vg.Length(n)*pitch+legend+3*vg.Centimeter)
	p.Draw(draw.New(c))
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	if _, err := c.WriteTo(f); err != nil {
		f.Close()
		return err
	}
	return f.Close()
}

// exclusive reports whether no label has bars of two series.
func (b bars) exclusive() bool {
	for k := range b.labels {
		bars := 0
		for _, s := range b.series {
			if !math.IsNaN(s.values[k]) {
				bars++
			}
		}
		if bars > 1 {
			return false
		}
	}
	return true
}

// decades are the ticks of a logarithmic axis that begins at 10^low and is drawn from 0.
func decades(low, high float64) plot.ConstantTicks {
	var ticks plot.ConstantTicks
	for e := low; e <= high; e++ {
		for d := 1; d < 10; d++ {
			at := e + math.Log10(float64(d))
			if at > high {
				break
			}
			label := ""
			if d == 1 {
				label = fmt.Sprintf("%g", math.Pow(10, e))
			}
			ticks = append(ticks, plot.Tick{Value: at - low, Label: label})
		}
	}
	return ticks
}

// saveCharts draws the charts of all sections into a directory.
func saveCharts(dir string, sections []*section) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, s := range sections {
		if s.chart == "" || len(s.groups) == 0 {
			continue
		}
		if err := chartOf(s).save(filepath.Join(dir, s.chart)); err != nil {
			return err
		}
	}
	return nil
}
