// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"fmt"
	"math"
	"time"
)

// An Instant is a point in time, in nanoseconds of a monotonic clock since an
// origin that the owner of the Metric chooses. All Instants given to the Meters
// of one Metric share the origin.
type Instant int64

// A Metric makes the Meters of one channel. What its endpoints share, such as
// the mean latency of them all, lives in it. It is safe for concurrent use.
//
// An implementation embeds [MetricBase], so that it still compiles when a method
// is added here. [Register] gives it a name for the service config.
type Metric interface {
	// NewMeter returns the Meter of one more endpoint.
	NewMeter(Endpoint) Meter

	// Class returns the class of a call. The policy keeps an Estimate for calls of
	// class 0, and asks for the others each time.
	Class(method string, stream bool) Class

	metricBase()
}

// A Class tells kinds of calls apart for which an endpoint has different costs. A
// Metric says what its classes are.
type Class uint8

// MetricBase is embedded by every Metric. Its Class is 0 for all calls.
type MetricBase struct{}

// Class returns 0.
func (MetricBase) Class(string, bool) Class { return 0 }

func (MetricBase) metricBase() {}

// An Endpoint is what a Metric is told of an endpoint when it makes its Meter.
type Endpoint struct {
	// Address is the first of the endpoint's addresses.
	Address string
}

// A Meter measures one endpoint. It is safe for concurrent use, and its methods
// neither block nor allocate.
//
// The policy counts what is in flight and tells the Meter at each call, so a
// Meter keeps no such count. An implementation embeds [MeterBase], which has the
// methods that most have no use for.
type Meter interface {
	// Load says what one more attempt at the endpoint would cost now. The policy
	// may keep the answer for as long as it says.
	Load(Query) Estimate

	// Start says that an attempt was sent to the endpoint. Every Start is
	// followed by exactly one Finish with the Ticket that it returned. The Attempt must
	// not be kept.
	Start(*Attempt) Ticket

	// Respond says that the first response of a stream has arrived, its headers or
	// a message. It is called at most once for an attempt, before its Finish. The
	// time to the first response is the stream's latency; from then on it is no
	// attempt in flight any more but an open stream.
	Respond(Response)

	// Finish says that an attempt ended, and returns whether an Estimate given before,
	// with nothing in flight, is not good any more. It may come after Close. The Sample
	// must not be kept.
	Finish(*Sample) bool

	// Report gives the Meter a report that the server sent by itself, and not with
	// the end of an attempt.
	Report(OutOfBand)

	// Inspect says what the Meter knows of the endpoint, for people to look at.
	Inspect(Query) Details

	// Close says that the endpoint is gone: it no longer counts as one of the
	// channel's endpoints. It is called at most once.
	Close()

	meterBase()
}

// MeterBase is embedded by every Meter. Its Respond, Report and Close do nothing,
// and its Inspect knows nothing.
type MeterBase struct{}

// Respond does nothing.
func (MeterBase) Respond(Response) {}

// Report does nothing.
func (MeterBase) Report(OutOfBand) {}

// Inspect returns no details.
func (MeterBase) Inspect(Query) Details { return Details{} }

// Close does nothing.
func (MeterBase) Close() {}

func (MeterBase) meterBase() {}

// A Query is what the policy tells a Meter when it asks for the load.
type Query struct {
	// Now is the time.
	Now Instant
	// InFlight is the number of attempts in flight to the endpoint, open streams
	// not counted.
	InFlight int
	// Streams is the number of open streams to the endpoint: those that have their
	// first response.
	Streams int
	// Weight is the weight of the endpoint in relation to the mean of the channel,
	// above 0. 1 is the average endpoint. Endpoints are drawn in proportion to
	// their weights already; what is left for a Metric is to count InFlight/Weight
	// where it counts attempts in flight.
	Weight float64
	// Class is that of the call to be sent, as the Metric named it.
	Class Class
}

// queue returns the attempts in flight per unit of weight.
func (q *Query) queue() float64 { return perWeight(q.InFlight, q.Weight) }

func perWeight(n int, weight float64) float64 {
	if weight == 1 {
		return float64(n)
	}
	return float64(n) / weight
}

// An Estimate is what one more attempt at an endpoint would cost. The zero value
// of all fields but Cost is right for a Metric that knows nothing of them.
type Estimate struct {
	// Cost is finite and never negative. The endpoint with the least is picked. It
	// may be in any unit.
	Cost float64
	// Error is the standard error of Cost as a part of it, 0 if it is exact. The
	// policy takes costs for equal that differ by less.
	Error float64
	// Queue is the number of attempts in flight that count for Cost, per weight.
	// Of endpoints whose costs are equal within their Error, the policy takes the
	// one with the least, and while it is 0 for all, any of them.
	Queue float64
	// Heard is when the endpoint last answered or failed, or 0 if that does not
	// matter. The policy now and then tries one that was not heard of for long.
	Heard Instant
	// Good is for how long the policy may use the Estimate again while no attempt to
	// the endpoint starts or ends. One with nothing in flight it may use again when
	// nothing is, unless a Finish since has returned true. 0 is not at all.
	Good time.Duration
}

// forever is the Good of an Estimate that only attempts change.
const forever = time.Duration(math.MaxInt64)

// Details are what a Meter knows of an endpoint. A field is 0 if the Metric has
// no such thing.
type Details struct {
	// Latency is how long a call is expected to take if nothing else is in flight.
	Latency time.Duration
	// Samples is the number of latencies that Latency stands on, those that are
	// half forgotten counted as half.
	Samples float64
}

// An Attempt is what a Meter is told of an attempt when it is sent.
type Attempt struct {
	// Query is what the policy would have asked just before, this attempt not
	// counted.
	Query
	// Method is the full name of the method, such as "/pkg.Service/Method".
	Method string
	// Stream is whether the attempt is a stream that Respond will be called for. It
	// is known only if the dial options of the policy are in use.
	Stream bool
}

// A Response is the first response of a stream.
type Response struct {
	// Now is the time.
	Now Instant
	// Ticket is what Start returned for the attempt.
	Ticket Ticket
}

// A Ticket is what a Meter has to be told again about an attempt when it ends.
// It is a plain value.
type Ticket struct {
	// Started is when the attempt was sent.
	Started Instant
	// A and B are the Meter's own.
	A, B uint64
}

// A Sample is how an attempt ended.
type Sample struct {
	// Now is the time.
	Now Instant
	// Ticket is what Start returned for the attempt.
	Ticket Ticket
	// Outcome is how it ended.
	Outcome Outcome
	// Responded is whether Respond was called for the attempt, so that its
	// latency has been taken already.
	Responded bool
	// Report is what the server said of its load with the end of the attempt, nil
	// if nothing. It must not be kept.
	Report *Report
	// InFlight is the number of other attempts in flight to the endpoint. It is known only
	// beside a Report.
	InFlight int
	// Pushback is for how long the server asked not to be tried again, 0 if it did
	// not.
	Pushback time.Duration
}

// An OutOfBand is a report that a server sent by itself.
type OutOfBand struct {
	// Now is the time.
	Now Instant
	// Report is what it said. It must not be kept.
	Report *Report
	// InFlight is the number of attempts in flight to the endpoint.
	InFlight int
}

// A Report is what a server says of its load, as in the ORCA protocol. A number
// that the server did not send is 0.
type Report struct {
	// CPU, Memory and Application are utilizations: 1 is all there is, and CPU and
	// Application may be above it.
	CPU, Memory, Application float64
	// QPS and EPS are the requests and the errors per second.
	QPS, EPS float64
	// Named are the metrics of the server's own by their names. It must not be
	// changed.
	Named map[string]float64
}

// Outcome is how an attempt ended, as far as the load of its endpoint goes.
type Outcome uint8

const (
	// Completed is an attempt that the endpoint answered. Its latency counts.
	Completed Outcome = iota
	// Failed is an attempt that the server or the path to it failed. However fast
	// it failed, it never makes the endpoint look fast.
	Failed
	// Cancelled is an attempt that its caller gave up, such as the loser of a
	// hedge. It counts as pending until it ends. However early that is, it never
	// makes the endpoint look fast, and it is no failure. That it took so long may
	// count: each Metric says how.
	Cancelled
	// NotSent is an attempt that never left. It undoes the Start.
	NotSent
	// Expired is an attempt that was not answered before the deadline that its
	// caller had set. All it says is that it would have taken longer.
	Expired
)

// String returns the name of the outcome in lower case.
func (o Outcome) String() string {
	switch o {
	case Completed:
		return "completed"
	case Failed:
		return "failed"
	case Cancelled:
		return "cancelled"
	case NotSent:
		return "not_sent"
	case Expired:
		return "expired"
	default:
		return fmt.Sprintf("outcome(%d)", uint8(o))
	}
}

// A ConfigError says which parameter of a Metric is out of its range.
type ConfigError struct {
	Field string // the name of the parameter in a service config, such as "decay"
	Value any
	Rule  string // what the value must be
}

// Error names the field, the value and the rule.
func (e *ConfigError) Error() string {
	return fmt.Sprintf("load: %s: %v, must be %s", e.Field, e.Value, e.Rule)
}

// checkRange returns an error unless lo <= v <= hi. NaN is in no range.
func checkRange(field string, v, lo, hi float64) error {
	if v >= lo && v <= hi {
		return nil
	}
	return &ConfigError{field, v, fmt.Sprintf("between %v and %v", lo, hi)}
}

// checkPositive is checkRange for numbers that must be above zero.
func checkPositive(field string, v, hi float64) error {
	if v > 0 && v <= hi {
		return nil
	}
	return &ConfigError{field, v, fmt.Sprintf("above 0 and at most %v", hi)}
}

// checkDuration returns an error unless d is above zero.
func checkDuration(field string, d time.Duration) error {
	if d > 0 {
		return nil
	}
	return &ConfigError{field, d, "above 0s"}
}

// latency returns the time from the start of an attempt until now, at least one
// nanosecond, for a clock that stands still has measured nothing.
func (t Ticket) latency(now Instant) float64 {
	return float64(max(now-t.Started, 1))
}

// The penalty of a failure counts as this many times the mean latency unless
// configured otherwise.
const (
	defaultFailurePenalty = 10
	maxFailurePenalty     = 1e6
)

func checkFailurePenalty(v float64) error {
	return checkRange("failurePenalty", v, 1, maxFailurePenalty)
}

func bits32(hi, lo float64) uint64 {
	return uint64(math.Float32bits(float32(hi)))<<32 | uint64(math.Float32bits(float32(lo)))
}

func floats32(w uint64) (hi, lo float64) {
	return float64(math.Float32frombits(uint32(w >> 32))), float64(math.Float32frombits(uint32(w)))
}
