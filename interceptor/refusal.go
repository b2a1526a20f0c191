// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"
)

// Domain is the domain of the ErrorInfo in a refusal's status.
const Domain = "belfry"

// Reason is why a layer refused: the reason of the ErrorInfo in a refusal's status. Your
// own layer may use its own reason, whose code is then UNAVAILABLE unless the refusal
// says otherwise.
type Reason string

// The reasons of belfry's own layers, and the codes that go with them.
const (
	ReasonRateLimit   Reason = "RATE_LIMIT"   // RESOURCE_EXHAUSTED
	ReasonQuota       Reason = "QUOTA"        // RESOURCE_EXHAUSTED
	ReasonConcurrency Reason = "CONCURRENCY"  // UNAVAILABLE: no permit
	ReasonQueueFull   Reason = "QUEUE_FULL"   // UNAVAILABLE: the queue or buffer is full
	ReasonShed        Reason = "SHED"         // UNAVAILABLE: nothing ready inside a load shed
	ReasonFailFast    Reason = "FAIL_FAST"    // UNAVAILABLE: not ready for too long
	ReasonThrottled   Reason = "THROTTLED"    // UNAVAILABLE: client-side throttling
	ReasonBreakerOpen Reason = "BREAKER_OPEN" // UNAVAILABLE
	ReasonNotReady    Reason = "NOT_READY"    // UNAVAILABLE: no endpoint is READY
	ReasonDrain       Reason = "DRAIN"        // UNAVAILABLE: the stack is draining
	ReasonClosed      Reason = "CLOSED"       // CANCELLED: the connection was closed while the call waited
	ReasonDeadline    Reason = "DEADLINE"     // DEADLINE_EXCEEDED: the named layer's, or the caller's
	ReasonCancelled   Reason = "CANCELLED"    // CANCELLED: the caller gave up while waiting
	ReasonFilter      Reason = "FILTER"       // PERMISSION_DENIED, or what the predicate says
	ReasonBudget      Reason = "BUDGET"       // the server's last error
	// ReasonNotIdempotent is why an attempt that was sent is not repeated: its method is
	// not known to be idempotent. The code is that of the server's error.
	ReasonNotIdempotent Reason = "NOT_IDEMPOTENT"
)

// Code returns the status code that goes with the reason.
func (r Reason) Code() codes.Code {
	switch r {
	case ReasonRateLimit, ReasonQuota:
		return codes.ResourceExhausted
	case ReasonDeadline:
		return codes.DeadlineExceeded
	case ReasonCancelled, ReasonClosed:
		return codes.Canceled
	case ReasonFilter:
		return codes.PermissionDenied
	}
	return codes.Unavailable
}

// A Refusal is the error of a call that a layer refused or cut short. errors.As finds it
// in what the stub returns. Its status carries an ErrorInfo with the reason, the domain
// "belfry" and the layer, and a RetryInfo if RetryAfter is positive. The status is built
// when it is first asked for, so a layer makes one Refusal and returns it many times,
// and refusing costs nothing.
//
// A Refusal must not be changed once it has been returned.
type Refusal struct {
	Layer      string        // which layer, as its String names it
	Reason     Reason        // why
	Code       codes.Code    // the status code; OK, the zero value, means the reason's
	Message    string        // more for humans; may be empty
	RetryAfter time.Duration // when to try again; zero if not known
	Key        string        // which of the layer's keys, such as a tenant; empty if it has none
	Err        error         // what it wraps: the server's last error, a context's error; may be nil
	Sent       bool          // whether the call, or an attempt of it, was sent before it was cut short
	// Further says that a further attempt was refused: Err is the server's last error,
	// and its status is the refusal's.
	Further bool

	status atomic.Pointer[status.Status]
}

// Refuse returns a refusal of a call that was not sent, for a layer to make once
// and return many times.
func Refuse(layer string, reason Reason, message string) *Refusal {
	return &Refusal{Layer: layer, Reason: reason, Message: message}
}

// After returns a copy of r with a RetryAfter of d.
func (r *Refusal) After(d time.Duration) *Refusal {
	c := r.copy()
	c.RetryAfter = d
	return c
}

// Because returns a copy of r that wraps err. sent says whether the call, or an
// attempt of it, had been sent.
func (r *Refusal) Because(err error, sent bool) *Refusal {
	c := r.copy()
	c.Err, c.Sent = err, sent
	return c
}

// ForKey returns a copy of r that names the key, such as a tenant, whose share was used
// up: in its text, and as "key" in the metadata of its ErrorInfo.
func (r *Refusal) ForKey(key string) *Refusal {
	c := r.copy()
	c.Key = key
	return c
}

// RefusedAgain returns the error of a call whose further attempt was refused with
// refused, after an attempt that failed with last. Its status is that of last, and
// errors.As finds in it which layer refused and why. refused and last are not nil.
func RefusedAgain(refused, last error) error {
	r, ok := AsRefusal(refused)
	if !ok {
		r = Refuse(stackName, ReasonShed, refused.Error())
	}
	r = r.Because(last, true)
	r.Further = true
	return r
}

func (r *Refusal) copy() *Refusal {
	return &Refusal{
		Layer: r.Layer, Reason: r.Reason, Code: r.Code, Message: r.Message,
		RetryAfter: r.RetryAfter, Key: r.Key, Err: r.Err, Sent: r.Sent, Further: r.Further,
	}
}

// Ended returns the refusal of a call whose ctx ended before it was sent:
// DEADLINE_EXCEEDED or CANCELLED, wrapping ctx's error. If the cause of ctx's end is a
// refusal, of a layer outside, Drain or the closed connection, it returns that one, which
// then says that the call was not sent.
func Ended(ctx context.Context, layer string) error {
	if r, ok := AsRefusal(context.Cause(ctx)); ok {
		if r.Sent { // A deadline layer says so of the calls that it cuts short.
			r = r.Because(r.Err, false)
		}
		return r
	}
	r := &Refusal{Layer: layer, Reason: ReasonDeadline, Message: "the caller's deadline passed before the call was sent", Err: ctx.Err()}
	if errors.Is(r.Err, context.Canceled) {
		r.Reason, r.Message = ReasonCancelled, "the caller gave up before the call was sent"
	} else if r.Err == nil { // The deadline would certainly have passed, see Wait.Sleep.
		r.Err = context.DeadlineExceeded
	}
	return r
}

// AsRefusal returns the refusal in err's tree, if it has one.
func AsRefusal(err error) (*Refusal, bool) {
	if err == nil {
		return nil, false
	}
	if r, ok := err.(*Refusal); ok { // Without the reflection of errors.As.
		return r, true
	}
	var r *Refusal
	ok := errors.As(err, &r)
	return r, ok
}

// NotSent reports whether nothing was sent on behalf of the call.
func (r *Refusal) NotSent() bool { return !r.Sent }

// Error returns the layer, the reason, the message and what it wraps.
func (r *Refusal) Error() string {
	var b strings.Builder
	b.WriteString("belfry: ")
	b.WriteString(r.Layer)
	b.WriteString(": ")
	b.WriteString(string(r.Reason))
	if r.Key != "" {
		fmt.Fprintf(&b, " (%q)", r.Key)
	}
	if r.Message != "" {
		b.WriteString(": ")
		b.WriteString(r.Message)
	}
	if r.Err != nil {
		b.WriteString(": ")
		b.WriteString(r.Err.Error())
	}
	return b.String()
}

// Unwrap returns what r wraps.
func (r *Refusal) Unwrap() error { return r.Err }

// GRPCStatus returns r as a status. If a further attempt was refused, that is the status
// of the server's error, unchanged. For a filter without a Code whose predicate's error
// has a status, it is that status with the ErrorInfo added.
func (r *Refusal) GRPCStatus() *status.Status {
	if st := r.status.Load(); st != nil {
		return st
	}
	st := r.buildStatus()
	r.status.Store(st) // If two build it at once, both are right.
	return st
}

func (r *Refusal) buildStatus() *status.Status {
	if r.Further {
		return status.Convert(r.Err)
	}
	metadata := map[string]string{"layer": r.Layer}
	if r.Key != "" {
		metadata["key"] = strings.ToValidUTF8(r.Key, "\uFFFD") // Or there would be no details at all.
	}
	details := []protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason:   string(r.Reason),
		Domain:   Domain,
		Metadata: metadata,
	}}
	if r.RetryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(r.RetryAfter)})
	}
	st := status.New(r.statusCode(), r.Error())
	if r.Reason == ReasonFilter && r.Code == codes.OK {
		// A predicate that has a status of its own means it to be seen.
		if own, ok := status.FromError(r.Err); ok && own.Code() != codes.OK {
			st = own
		}
	}
	if with, err := st.WithDetails(details...); err == nil {
		st = with // It fails only on strings that are not UTF-8; the status stands without details then.
	}
	return st
}

// statusCode returns the code of r, unless r has the status of what it wraps.
func (r *Refusal) statusCode() codes.Code {
	if r.Code != codes.OK {
		return r.Code
	}
	return r.Reason.Code()
}
