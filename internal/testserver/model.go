// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"fmt"
	"math"
	"time"
)

// A Model gives the service time of a call: how long its work takes at speed 1,
// time in the queue not included. The models of this package are immutable; a
// model written elsewhere must be safe for concurrent use.
type Model interface {
	// Draw returns the service time of one call. It takes all its randomness
	// from r; a negative result counts as zero.
	Draw(r *Rand) time.Duration
	// Validate returns an error that names the parameter, its value and the
	// rule it breaks, or nil.
	Validate() error
	// String returns the model as it is written in Go: "Fixed(10ms)".
	String() string
}

// Fixed is the model whose every call takes d, which must not be negative.
func Fixed(d time.Duration) Model { return fixed(d) }

type fixed time.Duration

func (m fixed) Draw(*Rand) time.Duration { return time.Duration(m) }
func (m fixed) String() string           { return fmt.Sprintf("Fixed(%v)", time.Duration(m)) }

func (m fixed) Validate() error {
	if m < 0 {
		return fmt.Errorf("testserver: Fixed: d is %v, must not be negative", time.Duration(m))
	}
	return nil
}

// Uniform is the model whose service times are spread evenly over [lo, hi];
// 0 <= lo <= hi.
func Uniform(lo, hi time.Duration) Model { return uniform{lo, hi} }

type uniform struct{ lo, hi time.Duration }

func (m uniform) Draw(r *Rand) time.Duration {
	return m.lo + duration(r.Float64()*float64(m.hi-m.lo))
}

func (m uniform) String() string { return fmt.Sprintf("Uniform(%v, %v)", m.lo, m.hi) }

func (m uniform) Validate() error {
	if m.lo < 0 {
		return fmt.Errorf("testserver: Uniform: lo is %v, must not be negative", m.lo)
	}
	if m.hi < m.lo {
		return fmt.Errorf("testserver: Uniform: hi is %v, must not be below lo, which is %v", m.hi, m.lo)
	}
	return nil
}

// Exponential is the model with exponentially distributed service times of the
// given mean, which must be positive.
func Exponential(mean time.Duration) Model { return exponential(mean) }

type exponential time.Duration

func (m exponential) Draw(r *Rand) time.Duration { return duration(r.ExpFloat64() * float64(m)) }
func (m exponential) String() string             { return fmt.Sprintf("Exponential(%v)", time.Duration(m)) }

func (m exponential) Validate() error {
	if m <= 0 {
		return fmt.Errorf("testserver: Exponential: mean is %v, must be positive", time.Duration(m))
	}
	return nil
}

// Lognormal is the model with lognormally distributed service times,
//
//	mean * exp(sigma*z - sigma*sigma/2)
//
// with z from the standard normal distribution. So mean, which must be
// positive, is the mean of the service time itself, and sigma, in [0, 10], the
// standard deviation of its logarithm. Sigma 0.6 is a service with an ordinary
// tail: a p99 of 3.4 means.
func Lognormal(mean time.Duration, sigma float64) Model { return lognormal{mean, sigma} }

type lognormal struct {
	mean  time.Duration
	sigma float64
}

func (m lognormal) Draw(r *Rand) time.Duration {
	return duration(float64(m.mean) * math.Exp(m.sigma*r.NormFloat64()-m.sigma*m.sigma/2))
}

func (m lognormal) String() string { return fmt.Sprintf("Lognormal(%v, %v)", m.mean, m.sigma) }

func (m lognormal) Validate() error {
	if m.mean <= 0 {
		return fmt.Errorf("testserver: Lognormal: mean is %v, must be positive", m.mean)
	}
	if !(m.sigma >= 0 && m.sigma <= 10) {
		return fmt.Errorf("testserver: Lognormal: sigma is %v, must be in [0, 10]", m.sigma)
	}
	return nil
}

// duration converts ns to a Duration that is neither negative nor overflowed.
func duration(ns float64) time.Duration {
	switch {
	case !(ns > 0):
		return 0
	case ns >= math.MaxInt64:
		return math.MaxInt64
	}
	return time.Duration(ns)
}

// Rand is the randomness of one call. It is a function of the server's seed and
// the number of the call, so that a seeded server draws the same service times
// in the same order however its calls interleave, and calls share no state but
// a counter. It is not safe for concurrent use.
//
// The generator is SplitMix64 (Steele, Lea and Flood, "Fast splittable
// pseudorandom number generators", OOPSLA 2014).
type Rand struct{ state uint64 }

// The increment and the finalizer of SplitMix64.
const gamma = 0x9e3779b97f4a7c15

func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// randOf returns the randomness of call n. A purpose keeps apart what is drawn
// for the same call, so that a fault changes no service time.
func randOf(seed, n uint64, purpose uint64) Rand {
	return Rand{mix(mix(mix(seed+gamma)+n*gamma) + purpose*gamma)}
}

// What is drawn for a call.
const (
	forServiceTime uint64 = iota
	forFault
	forRejection
)

// Uint64 returns 64 random bits.
func (r *Rand) Uint64() uint64 {
	r.state += gamma
	return mix(r.state)
}

// Float64 returns a number evenly distributed over [0, 1).
func (r *Rand) Float64() float64 { return float64(r.Uint64()>>11) / (1 << 53) }

// ExpFloat64 returns an exponentially distributed number of mean 1.
func (r *Rand) ExpFloat64() float64 { return -math.Log1p(-r.Float64()) }

// NormFloat64 returns a number from the standard normal distribution, by Box
// and Muller's transform.
func (r *Rand) NormFloat64() float64 {
	radius := math.Sqrt(2 * r.ExpFloat64())
	return radius * math.Cos(2*math.Pi*r.Float64())
}
