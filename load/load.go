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

// A Metric makes the Meters of one channel, and holds what its endpoints share, such
// as the mean latency of all of them. It is safe for concurrent use.
//
// An implementation embeds [MetricBase], so that it still compiles when a later
// version adds a method. [Register] gives it a name for the service config.
type Metric interface {
	// NewMeter returns the Meter of one more endpoint.
	NewMeter(Endpoint) Meter

	// Class returns the class of a call, from the full name of its method and whether
	// it is a stream. The policy may use an Estimate again for calls of class 0. For
	// other classes it asks each time.
	Class(method string, stream bool) Class

	metricBase()
}

// A Class is a kind of calls. The cost of an endpoint may differ between classes. Each
// Metric defines its own.
type Class uint8

// MetricBase is embedded by every Metric. Its Class is 0 for all calls.
type MetricBase struct{}

// Class returns 0.
func (MetricBase) Class(string, bool) Class { return 0 }

func (MetricBase) metricBase() {}

// An Endpoint describes the endpoint of a new Meter.
type Endpoint struct {
	// Address is the first of the endpoint's addresses.
	Address string
}

// A Meter measures one endpoint. It is safe for concurrent use, and its methods
// neither block nor allocate. Close may take a lock.
//
// The policy counts the attempts in flight and tells the Meter their number, so a
// Meter need not count them. An implementation embeds [MeterBase], which has the
// methods that most Meters do not need.
type Meter interface {
	// Load returns what one more attempt to the endpoint would cost now. Estimate.Good
	// says for how long the policy may use it again.
	Load(Query) Estimate

	// Start is called when an attempt is sent to the endpoint. Every Start is followed
	// by exactly one Finish with the Ticket that Start returned. The Meter must not keep
	// the Attempt.
	Start(*Attempt) Ticket

	// Respond is called when the first response of a stream arrives: its headers or a
	// message. It is called at most once for an attempt, before its Finish. The time to
	// the first response is the stream's latency. From then on the stream is not an
	// attempt in flight any more, but an open stream.
	Respond(Response)

	// Finish is called when an attempt ends. It returns true if an Estimate that Load
	// returned before, with nothing in flight, must not be used again. It may be called
	// after Close. The Meter must not keep the Sample.
	Finish(*Sample) bool

	// Report is called when the server sends a report out of band, not with the end of
	// an attempt.
	Report(OutOfBand)

	// Inspect returns what the Meter knows of the endpoint, for snapshots and pages.
	Inspect(Query) Details

	// Close is called, at most once, when the endpoint is gone: it is not one of the
	// channel's endpoints any more.
	Close()

	meterBase()
}

// MeterBase is embedded by every Meter. Its Respond, Report and Close do nothing,
// and its Inspect returns no Details.
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
	// Weight is the weight of the endpoint divided by the mean of the channel's
	// endpoints, above 0. The policy already draws endpoints in proportion to their
	// weights. A Metric only has to use InFlight/Weight in place of InFlight.
	Weight float64
	// Class is what Metric.Class returned for the call.
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

// An Estimate is what one more attempt to an endpoint would cost. A Metric that does not
// know a field other than Cost leaves it 0.
type Estimate struct {
	// Cost is finite and at least 0, in any unit. The policy picks the endpoint with
	// the least cost.
	Cost float64
	// Error is the standard error of Cost, divided by Cost; 0 if Cost is exact. The
	// policy treats costs as equal that differ by no more than a few errors.
	Error float64
	// Queue is the number of attempts in flight that count for Cost, divided by the
	// weight. Of endpoints whose costs are equal within their errors, the policy picks
	// one with the least Queue. While no endpoint of the channel has any, it picks one
	// at random.
	Queue float64
	// Heard is when the endpoint last answered or failed, or 0 if that does not matter.
	// Now and then the policy picks an endpoint of which this was long ago.
	Heard Instant
	// Good is for how long the policy may use the Estimate again, 0 for not at all. It
	// may do so while no attempt to the endpoint starts or ends. If nothing was in
	// flight, it may do so whenever nothing is in flight again, until a Finish returns
	// true.
	Good time.Duration
}

// forever is the Good of an Estimate that only attempts change.
const forever = time.Duration(math.MaxInt64)

// Details are what a Meter knows of an endpoint. A field that the Metric does not
// measure is 0.
type Details struct {
	// Latency is how long a call is expected to take if nothing else is in flight.
	Latency time.Duration
	// Samples is the number of latencies that Latency follows from. A latency that is
	// half forgotten counts as half.
	Samples float64
}

// An Attempt describes an attempt that is sent.
type Attempt struct {
	// Query is that of a Load just before the attempt: it does not count the attempt
	// itself.
	Query
	// Method is the full name of the method, such as "/pkg.Service/Method".
	Method string
	// Stream is whether the attempt is a stream, for which Respond will be called.
	// Without the dial options of the policy it is always false.
	Stream bool
}

// A Response is the first response of a stream.
type Response struct {
	// Now is the time.
	Now Instant
	// Ticket is what Start returned for the attempt.
	Ticket Ticket
}

// A Ticket is what a Meter remembers of an attempt until it ends. Start returns it,
// and Respond and Finish get it back.
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
	// Responded is whether Respond was called for the attempt. Then its latency is known
	// already.
	Responded bool
	// Report is the report that the server sent with the end of the attempt, nil if it
	// sent none. The Meter must not keep it.
	Report *Report
	// InFlight is the number of other attempts in flight to the endpoint. It is set only
	// if Report is.
	InFlight int
	// Pushback is for how long the server asked not to be tried again, from 0 (it did
	// not ask) to one minute.
	Pushback time.Duration
}

// An OutOfBand is a report that a server sent out of band.
type OutOfBand struct {
	// Now is the time.
	Now Instant
	// Report is what the server reported. The Meter must not keep it.
	Report *Report
	// InFlight is the number of attempts in flight to the endpoint.
	InFlight int
}

// A Report is what a server says of its load, as in the ORCA protocol. A number
// that the server did not send is 0.
type Report struct {
	// CPU, Memory and Application are utilizations, at least 0. 1 is full use. CPU and
	// Application may be above 1.
	CPU, Memory, Application float64
	// QPS and EPS are the requests and the errors per second.
	QPS, EPS float64
	// Named are the server's own metrics by their names. The map must not be changed.
	Named map[string]float64
}

// Outcome says how an attempt ended, as far as it matters for the endpoint's load.
type Outcome uint8

const (
	// Completed is an attempt that the endpoint answered. Its latency counts.
	Completed Outcome = iota
	// Failed is an attempt that the server or the path to it failed. However fast
	// it failed, it never makes the endpoint look fast.
	Failed
	// Cancelled is an attempt that its caller gave up, such as the loser of a hedge. It
	// is not a failure, and never makes the endpoint look fast, however early it ends.
	// Its latency would have been at least the time that it took. Each Metric says
	// whether that counts.
	Cancelled
	// NotSent is an attempt that was never sent to the server. It undoes the Start.
	NotSent
	// Expired is an attempt that was not answered before the deadline of its caller. Its
	// latency would have been at least the time that it took.
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

// latency returns the time from the start of an attempt until now, in nanoseconds. It is
// at least 1, because a coarse clock may return the same time twice.
func (t Ticket) latency(now Instant) float64 {
	return float64(max(now-t.Started, 1))
}

// A failure counts as a latency of this many times what the average endpoint costs.
const (
	defaultFailurePenalty = 10
	maxFailurePenalty     = 1e6
)

func checkFailurePenalty(v float64) error {
	return checkRange("failurePenalty", v, 1, maxFailurePenalty)
}

// bits32 packs two numbers into one word, as float32.
func bits32(hi, lo float64) uint64 {
	return uint64(math.Float32bits(float32(hi)))<<32 | uint64(math.Float32bits(float32(lo)))
}

func floats32(w uint64) (hi, lo float64) {
	return float64(math.Float32frombits(uint32(w >> 32))), float64(math.Float32frombits(uint32(w)))
}
