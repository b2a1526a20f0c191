// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The Kolmogorov-Smirnov distance of n samples from their true distribution
// exceeds sqrt(ln(2/alpha)/(2n)) with probability at most alpha (Dvoretzky,
// Kiefer and Wolfowitz, with Massart's constant). alpha is 1e-9 for each of the
// models, so the false-failure rate of this test is at most 4e-9.
func TestModelDistributions(t *testing.T) {
	const n = 200_000
	limit := math.Sqrt(math.Log(2/1e-9) / (2 * n))
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	ms := float64(time.Millisecond)
	tests := []struct {
		model Model
		cdf   func(ns float64) float64
	}{
		{Uniform(5*time.Millisecond, 20*time.Millisecond), func(x float64) float64 { return (x - 5*ms) / (15 * ms) }},
		{Uniform(0, time.Second), func(x float64) float64 { return x / (1000 * ms) }},
		{Exponential(10 * time.Millisecond), func(x float64) float64 { return -math.Expm1(-x / (10 * ms)) }},
		{Lognormal(10*time.Millisecond, 0.6), func(x float64) float64 {
			return 0.5 * math.Erfc(-(math.Log(x/(10*ms))+0.18)/0.6/math.Sqrt2)
		}},
	}
	for _, tt := range tests {
		t.Run(tt.model.String(), func(t *testing.T) {
			samples := make([]float64, n)
			for i := range samples {
				r := randOf(seed, uint64(i), forServiceTime)
				samples[i] = float64(tt.model.Draw(&r))
			}
			slices.Sort(samples)
			var distance float64
			for i, x := range samples {
				f := tt.cdf(x)
				distance = max(distance, f-float64(i)/n, float64(i+1)/n-f)
			}
			if distance > limit {
				t.Errorf("distance from the distribution: got %v, want at most %v", distance, limit)
			}
		})
	}
}

// The mean of n exponential samples is within 6.2 standard errors of the true
// one but for a chance below 1e-9; the lognormal's standard deviation at sigma
// 0.6 is 0.66 means, and its sum of 200,000 is normal for this purpose.
func TestModelMeans(t *testing.T) {
	const n = 200_000
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	for _, tt := range []struct {
		model Model
		sd    float64 // in means
	}{{Exponential(time.Second), 1}, {Lognormal(time.Second, 0.6), 0.66}} {
		var sum float64
		for i := range n {
			r := randOf(seed, uint64(i), forServiceTime)
			sum += tt.model.Draw(&r).Seconds()
		}
		if got, tolerance := sum/n, 6.2*tt.sd/math.Sqrt(n); math.Abs(got-1) > tolerance {
			t.Errorf("mean of %v: got %v s, want 1 within %v", tt.model, got, tolerance)
		}
	}
}

// Draws depend on the seed the number and the purpose.
func TestDrawsAreDetermined(t *testing.T) {
	draw := func(seed, n, purpose uint64) time.Duration {
		r := randOf(seed, n, purpose)
		return Exponential(time.Second).Draw(&r)
	}
	same, again := draw(7, 3, forServiceTime), draw(7, 3, forServiceTime)
	if same != again {
		t.Errorf("drawn twice: got %v and %v, want the same", same, again)
	}
	for _, other := range []time.Duration{draw(8, 3, forServiceTime), draw(7, 4, forServiceTime), draw(7, 3, forFault)} {
		if other == same {
			t.Errorf("drawn for another seed, number or purpose: got %v again", other)
		}
	}
}

// Models stay within the range of time.
func TestModelRanges(t *testing.T) {
	m := Lognormal(math.MaxInt64, 10)
	for i := range 1000 {
		r := randOf(1, uint64(i), forServiceTime)
		if d := m.Draw(&r); d < 0 {
			t.Fatalf("drawn: got %v, want none negative", d)
		}
	}
}

// Bad options name field value and rule.
func TestOptionsBad(t *testing.T) {
	tests := []struct {
		option Option
		want   string
	}{
		{ServiceTime(nil), "model is nil, must be set"},
		{ServiceTime(Fixed(-time.Second)), "d is -1s, must not be negative"},
		{ServiceTime(Uniform(-1, 5)), "lo is -1ns, must not be negative"},
		{ServiceTime(Uniform(5, 4)), "hi is 4ns, must not be below lo, which is 5ns"},
		{ServiceTime(Exponential(0)), "mean is 0s, must be positive"},
		{ServiceTime(Lognormal(0, 1)), "mean is 0s, must be positive"},
		{ServiceTime(Lognormal(1, -1)), "sigma is -1, must be in [0, 10]"},
		{ServiceTime(Lognormal(1, math.NaN())), "sigma is NaN, must be in [0, 10]"},
		{Workers(-1), "n is -1, must not be negative"},
		{Name(""), `name is "", must not be empty`},
		{Listen("nowhere"), `address is "nowhere", must be host:port`},
		{Listen("256.0.0.1:0"), "256.0.0.1"},
		{ReportLoad(nil), "report is nil, must be set"},
		{Register(nil), "register is nil, must be set"},
	}
	for _, tt := range tests {
		s, err := Start(tt.option)
		if err == nil {
			s.Close()
			t.Errorf("Start with a bad option: got no error, want one with %q", tt.want)
		} else if !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Start with a bad option: got error %q, want one with %q", err, tt.want)
		}
	}
}
