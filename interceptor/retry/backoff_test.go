// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package retry

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/belfry-go/belfry/internal/check"
)

// backoffs calls f with many random valid back-offs and some extreme ones.
func backoffs(t *testing.T, f func(rng *rand.Rand, b Backoff)) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	try := func(b Backoff) {
		b, err := filled(b)
		if err != nil {
			t.Fatalf("%+v: %v", b, err)
		}
		for b.Jitter = FullJitter; b.Jitter <= NoJitter; b.Jitter++ {
			f(rng, b)
		}
	}
	try(Backoff{})
	try(Backoff{Initial: 1, Max: 1})
	try(Backoff{Initial: 1, Max: math.MaxInt64, Multiplier: math.MaxFloat64})
	try(Backoff{Initial: math.MaxInt64, Max: math.MaxInt64, Multiplier: 1})
	try(Backoff{Initial: math.MaxInt64 - 1, Max: math.MaxInt64, Multiplier: 1.0000001})
	for range 1000 {
		initial := time.Duration(1 + rng.Int64N(1<<(1+rng.IntN(62))))
		try(Backoff{
			Initial:    initial,
			Max:        initial + time.Duration(rng.Int64N(math.MaxInt64-int64(initial))),
			Multiplier: 1 + rng.ExpFloat64()*rng.Float64(),
		})
	}
}

func TestTowerBackoffBaseFirst(t *testing.T) {
	backoffs(t, func(_ *rand.Rand, b Backoff) {
		// A float64 has 53 bits, so very long delays are rounded.
		if got := b.base(0); got > b.Max || math.Abs(float64(got-b.Initial)) > float64(b.Initial)*1e-15 {
			t.Errorf("%+v: the first base is %d, want Initial, %d", b, got, b.Initial)
		}
		if b.Initial < 1<<53 && b.base(0) != b.Initial {
			t.Errorf("%+v: the first base is %d, want exactly Initial, %d", b, b.base(0), b.Initial)
		}
	})
}

func TestTowerBackoffBase(t *testing.T) {
	backoffs(t, func(rng *rand.Rand, b Backoff) {
		ns := []int{0, 1, 2, 3, 10, 100, rng.IntN(1 << 20), 1 << 30, math.MaxInt}
		slices.Sort(ns)
		last := time.Duration(0)
		for _, n := range ns {
			got := b.base(n)
			if got < last {
				t.Errorf("%+v: base(%d) = %d, less than one before it, %d", b, n, got, last)
			}
			if float64(got) < float64(b.Initial)*(1-1e-15) || got > b.Max {
				t.Errorf("%+v: base(%d) = %d, want between %d and %d", b, n, got, b.Initial, b.Max)
			}
			last = got
		}
	})
}

func TestTowerBackoffJitter(t *testing.T) {
	backoffs(t, func(_ *rand.Rand, b Backoff) {
		var d delays
		last := b.Initial
		for n := range 20 {
			base := b.base(n)
			got := d.next(&b)
			lo, hi := base, base
			switch b.Jitter {
			case FullJitter:
				lo = 0
			case EqualJitter:
				lo = base / 2
			case DecorrelatedJitter:
				lo, hi = b.Initial, b.Max
				if last < b.Max/3 {
					hi = 3 * last
				}
			}
			if got < lo || got > hi {
				t.Fatalf("%+v: delay %d is %d, want between %d and %d", b, n, got, lo, hi)
			}
			last = max(got, b.Initial)
		}
	})
}

func TestBackoffWithoutJitter(t *testing.T) {
	b, err := filled(Backoff{Initial: 100 * time.Millisecond, Max: time.Second, Jitter: NoJitter})
	if err != nil {
		t.Fatal(err)
	}
	var d delays
	var got []string
	for range 6 {
		got = append(got, d.next(&b).String())
	}
	if want := "100ms 200ms 400ms 800ms 1s 1s"; strings.Join(got, " ") != want {
		t.Errorf("delays %v, want %s", got, want)
	}
	d.reset()
	if got := d.next(&b); got != b.Initial {
		t.Errorf("the delay after a reset is %v, want %v", got, b.Initial)
	}
}

// Two calls draw the same three delays of 1e9 and more possible ones by chance
// about once in 1e27 runs.
func TestJitterDiffersBetweenCalls(t *testing.T) {
	for j := FullJitter; j < NoJitter; j++ {
		b, err := filled(Backoff{Initial: time.Second, Max: time.Hour, Jitter: j})
		if err != nil {
			t.Fatal(err)
		}
		draw := func() (s []time.Duration) {
			var d delays
			for range 3 {
				s = append(s, d.next(&b))
			}
			return s
		}
		if x, y := draw(), draw(); slices.Equal(x, y) {
			t.Errorf("%v: two calls both wait %v", j, x)
		}
	}
}

// The mean of 20,000 draws is within 7 standard errors, but for a chance below
// 1e-11.
func TestJitterIsUniform(t *testing.T) {
	const n = 20_000
	for j, want := range map[Jitter][2]float64{FullJitter: {0, 1}, EqualJitter: {0.5, 1}, DecorrelatedJitter: {1, 3}} {
		b, err := filled(Backoff{Initial: time.Second, Max: time.Hour, Jitter: j})
		if err != nil {
			t.Fatal(err)
		}
		sum := 0.0
		for range n {
			var d delays
			sum += d.next(&b).Seconds()
		}
		mean := (want[0] + want[1]) / 2
		sigma := (want[1] - want[0]) / math.Sqrt(12*n)
		if got := sum / n; math.Abs(got-mean) > 7*sigma {
			t.Errorf("%v: the mean of the first delay is %v s, want %v", j, got, mean)
		}
	}
}

func TestTowerBackoffInvalid(t *testing.T) {
	for field, bs := range map[string][]Backoff{
		"Initial":    {{Initial: -1}},
		"Max":        {{Initial: 2, Max: 1}, {Max: time.Millisecond}, {Max: -1}},
		"Multiplier": {{Multiplier: math.Inf(1)}, {Multiplier: math.Inf(-1)}, {Multiplier: math.NaN()}, {Multiplier: 0.5}, {Multiplier: -2}},
		"Jitter":     {{Jitter: NoJitter + 1}},
	} {
		for _, b := range bs {
			_, err := New(Config{Backoff: b})
			if want := fmt.Sprintf("retry: Backoff.%s is ", field); err == nil || !strings.HasPrefix(err.Error(), want) {
				t.Errorf("New with %+v: %v, want an error that begins %q", b, err, want)
			}
		}
	}
}

func TestJitterString(t *testing.T) {
	if got := fmt.Sprint(FullJitter, EqualJitter, DecorrelatedJitter, NoJitter, Jitter(9)); got != "full equal decorrelated none Jitter(9)" {
		t.Errorf("the jitters print as %q", got)
	}
}

func filled(b Backoff) (Backoff, error) {
	errs := check.Of("retry")
	return b.withDefaults(errs), errs.Err()
}
