// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package check

import (
	"errors"
	"math"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
)

// checks calls check on a new Errors and returns the errors' text.
func checks(check func(e *Errors)) string {
	e := Of("x")
	check(e)
	if err := e.Err(); err != nil {
		return err.Error()
	}
	return ""
}

func TestRange(t *testing.T) {
	for _, test := range []struct {
		name   string
		in     Range[float64]
		ok     []float64
		bad    []float64
		wanted string
	}{
		{"From", From(0.5, 1), []float64{0.5, 1}, []float64{0.4, 1.1}, "from 0.5 to 1"},
		{"Between", Between(0.0, 1), []float64{0.5}, []float64{-1, 1}, "above 0 and below 1"},
		{"Above", Above(0.0, 1), []float64{0.5, 1}, []float64{-1, 1.1}, "above 0 and at most 1"},
		{"Below", Below(1e-6, 1), []float64{1e-6, 0.9}, []float64{1e-7, 1}, "at least 0.000001 and below 1"},
		{"AtLeast", AtLeast(1.0), []float64{1, 1e300}, []float64{0.9, math.Inf(1)}, "a finite number of at least 1"},
		{"Positive", Positive[float64], []float64{0.1}, []float64{-1, 0}, "positive"},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, v := range test.ok {
				if ok, _ := test.in(v); !ok {
					t.Errorf("%v is not in the range, want it in", v)
				}
			}
			for _, v := range append(test.bad, math.NaN()) {
				if ok, text := test.in(v); ok || text != test.wanted {
					t.Errorf("%v: in the range %t, %q; want false, %q", v, ok, text, test.wanted)
				}
			}
		})
	}
}

func TestDefault(t *testing.T) {
	for _, test := range []struct {
		v, want int
		err     string
	}{
		{0, 3, ""}, {7, 7, ""}, {9, 3, "x: N is 9, must be from 1 to 8, or 0 for 3"},
	} {
		got := test.v
		err := checks(func(e *Errors) { Default(e, "N", &got, From(1, 8), 3) })
		if got != test.want || err != test.err {
			t.Errorf("%d becomes %d with error %q, want %d with %q", test.v, got, err, test.want, test.err)
		}
	}
}

func TestDefaultOrNone(t *testing.T) {
	for _, test := range []struct {
		v, want time.Duration
		err     string
	}{
		{0, time.Hour, ""}, {time.Second, time.Second, ""}, {None, None, ""},
		{-2, time.Hour, "x: D is -2ns, must be at least 1s, None (-1) for never, or 0 for 1h"},
	} {
		got := test.v
		err := checks(func(e *Errors) { DefaultOrNone(e, "D", &got, AtLeast(time.Second), time.Hour, "never") })
		if got != test.want || err != test.err {
			t.Errorf("%v becomes %v with error %q, want %v with %q", test.v, got, err, test.want, test.err)
		}
	}
}

func TestZeroIsNone(t *testing.T) {
	e := Of("x")
	v := -2.0
	DefaultOrNone(e, "V", &v, From(1.0, 2), 1, "none")
	var c *Error
	errors.As(e.Err(), &c)
	if got, want := ZeroIsNone(c.Rule), "must be from 1 to 2, or 0 for none"; got != want {
		t.Errorf("ZeroIsNone(%q) = %q, want %q", c.Rule, got, want)
	}
	if got, want := ZeroIsNone("must be 1, or 0 for 2"), "must be 1, or 0 for 2"; got != want {
		t.Errorf("ZeroIsNone = %q, want %q", got, want)
	}
}

func TestCodes(t *testing.T) {
	e := Of("x")
	if s := Codes(e, "C", nil, codes.Internal); !s.Has(codes.Internal) {
		t.Error("nil is not the default")
	}
	if s := Codes(e, "C", []codes.Code{}, codes.Internal); s != 0 {
		t.Errorf("an empty list is %b, want no codes", s)
	}
	if err := e.Err(); err != nil {
		t.Error(err)
	}
	want := "x: C[1] is OK, must be a code from Canceled to Unauthenticated"
	if got := checks(func(e *Errors) { Codes(e, "C", []codes.Code{codes.Internal, codes.OK}) }); got != want {
		t.Errorf("error %q, want %q", got, want)
	}
}

func TestErrors_Nested(t *testing.T) {
	inner := Of("inner")
	inner.Add("A", 1, "must be 2")
	inner.In("B").Add("C", "", "must not be empty")
	got := checks(func(e *Errors) {
		e.In("Outer").Nested("Inner", inner.Err())
		e.Nested("Other", errors.New("broken"))
		e.Nested("None", nil)
	})
	want := "x: Outer.Inner.A is 1, must be 2\nx: Outer.Inner.B.C is \"\", must not be empty\nx: Other: broken"
	if got != want {
		t.Errorf("errors\n%s, want\n%s", got, want)
	}
}
