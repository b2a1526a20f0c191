// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry

import (
	"context"
	"fmt"
	"iter"
	"runtime"
	"runtime/debug"
	"sync"

	"google.golang.org/grpc"
)

// maxConcurrency bounds the memory that CallAll reserves: 8 bytes for each call at a time.
const maxConcurrency = 1_000_000

// A Result is how the call for one request of [CallAll] ended.
type Result[Req, Res any] struct {
	Request  Req
	Response Res   // meaningful if Err is nil
	Err      error // the error that the call returned, or why the call was not made
}

// CallAll makes a call for each request, at most concurrency of them at a time.
// It yields the index of each request, counted from 0, and its result, in the
// order of the requests. [CallAllUnordered] yields results as they come. It is
// Tower's call_all with a bound.
//
// A failed call is a result like any other. To stop at an error, break out of
// the loop. To call a method of a generated stub, pass [Bind](client.Method).
//
// # Bounds
//
// There are as many places as concurrency says. A request takes a place before
// it is pulled, and leaves it when the loop body is done with its result. So a
// slow consumer slows the calls down, and with a concurrency of 1 a call starts
// only after the loop body is done with the result before it. CallAll keeps the
// order, so the results that wait for a slow call keep their places meanwhile.
//
// concurrency is from 1 to 1,000,000. Otherwise no call is made, and the
// sequence is one result, for index 0, with an error that says so.
//
// # The end
//
// The sequence ends when the requests have ended and all results are yielded. The
// error of a call does not end it. It ends early in three cases. In each of them
// no further call is made, the context of the calls in flight is cancelled, and
// all goroutines have returned before the loop is left:
//
//   - The consumer breaks out of the loop, or panics. The results of the calls
//     in flight are lost.
//   - ctx ends. The calls in flight are yielded with the error that they return.
//     The next request, if there is one, is pulled but not called. Its error
//     wraps ctx.Err() and has the status code CANCELLED or DEADLINE_EXCEEDED. If
//     no result has such an error, a call was made for every request.
//   - A call or the request sequence panics: the loop panics with a
//     [*PanicError]. If it calls [runtime.Goexit], so does the loop.
//
// The context of the calls ends with the loop in any case. So read a stream that
// a call returns as its response to its end in the loop body.
//
// The loop waits for its calls, so calls must return when their context ends, as
// gRPC's do.
//
// # Requests
//
// reqs is a channel or a sequence. From a channel requests are received until it
// is closed. The wait for the next request ends with the loop and with ctx. If ctx
// ends it, the last result has the zero Request and the error of a request that was
// not called. A loop that ends early has received at most one request that it has
// not called.
//
// The loop waits for a sequence to return. A sequence that blocks must return when
// ctx ends, and its consumer must cancel ctx before it breaks out of the loop. For
// requests from a channel, pass the channel itself.
//
// # Concurrency
//
// reqs is pulled on a goroutine of its own, so results are yielded while the loop
// waits for the next request. Each call runs on a goroutine of its own. Nothing
// runs until the returned sequence is ranged over. It may be ranged over as often
// as reqs may.
func CallAll[Req, Res any, Reqs Requests[Req]](ctx context.Context, concurrency int, reqs Reqs, call func(context.Context, Req) (Res, error)) iter.Seq2[int, Result[Req, Res]] {
	return callAll(ctx, concurrency, reqs, call, true)
}

// Requests are what [CallAll] makes calls for.
type Requests[Req any] interface {
	<-chan Req | chan Req | iter.Seq[Req] | func(yield func(Req) bool)
}

// CallAllUnordered is [CallAll] with the results in the order in which the
// calls end, so that none waits for a slower one before it.
func CallAllUnordered[Req, Res any, Reqs Requests[Req]](ctx context.Context, concurrency int, reqs Reqs, call func(context.Context, Req) (Res, error)) iter.Seq2[int, Result[Req, Res]] {
	return callAll(ctx, concurrency, reqs, call, false)
}

// Bind turns a method of a generated stub into a function for [CallAll]. opts are
// the options of each call. An option that receives something, such as
// grpc.Header, must not be among them, because several calls would write to it at
// the same time.
func Bind[Req, Res any](method func(context.Context, Req, ...grpc.CallOption) (Res, error), opts ...grpc.CallOption) func(context.Context, Req) (Res, error) {
	return func(ctx context.Context, req Req) (Res, error) {
		return method(ctx, req, opts...)
	}
}

// A PanicError is what [CallAll] panics with when a call or the request
// sequence has panicked on a goroutine of its own.
type PanicError struct {
	Value any    // the argument of panic
	Stack []byte // where it panicked, as [debug.Stack] formats it
}

// Error returns the value and the stack.
func (e *PanicError) Error() string {
	return fmt.Sprintf("belfry: panic in CallAll: %v\n\n%s", e.Value, e.Stack)
}

// Unwrap returns Value if it is an error, else nil.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

func callAll[Req, Res any](ctx context.Context, concurrency int, reqs any, call func(context.Context, Req) (Res, error), ordered bool) iter.Seq2[int, Result[Req, Res]] {
	return func(yield func(int, Result[Req, Res]) bool) {
		if concurrency < 1 || concurrency > maxConcurrency {
			yield(0, Result[Req, Res]{Err: fmt.Errorf("belfry: CallAll: concurrency is %d, must be from 1 to %d", concurrency, maxConcurrency)})
			return
		}
		callCtx, cancel := context.WithCancel(ctx)
		r := &callAllRun[Req, Res]{
			ctx:     ctx,
			callCtx: callCtx,
			call:    call,
			ordered: ordered,
			places:  make(chan struct{}, concurrency),
			queue:   make(chan *callSlot[Req, Res], concurrency),
			stopped: make(chan struct{}),
		}
		r.stop = sync.OnceFunc(func() {
			close(r.stopped)
			cancel()
		})
		// Deferred for a loop body that panics or calls runtime.Goexit.
		defer r.stopAndWait()

		go r.produce(r.sequence(reqs))
		for {
			s := r.next()
			if s == nil || !yield(s.index, s.result) {
				break
			}
			<-r.places
		}
		r.stopAndWait()
		switch {
		case r.panicked != nil:
			panic(r.panicked)
		case r.broken:
			runtime.Goexit()
		}
	}
}

// callAllRun is one loop over the results. Three kinds of goroutine use it: the
// consumer, one producer that pulls the requests, and one for each call.
type callAllRun[Req, Res any] struct {
	ctx     context.Context // the caller's
	callCtx context.Context // derived from it, cancelled by stop
	call    func(context.Context, Req) (Res, error)
	ordered bool

	// places holds a token for each place that is taken: from before the request is
	// pulled until the loop body is done with its result.
	places chan struct{}

	// queue hands slots to the consumer: when they are made if the results are
	// ordered, else when their calls have ended. It has as much room as there are
	// places, so sending never blocks. The producer closes it when nothing else runs.
	queue chan *callSlot[Req, Res]

	// stop closes stopped and cancels callCtx. It is called when the consumer leaves
	// the loop or a goroutine breaks, and may be called more than once.
	stop    func()
	stopped chan struct{}

	// broken says that a call or the requests panicked, with panicked, or called
	// runtime.Goexit. The first to do so sets both, in breakOnce; the consumer
	// reads them after queue is closed.
	breakOnce sync.Once
	broken    bool
	panicked  *PanicError

	calls sync.WaitGroup
}

type callSlot[Req, Res any] struct {
	index  int
	result Result[Req, Res]
	done   chan struct{} // closed when result is set
}

// next waits for the next slot with a result. It returns nil if there is none.
func (r *callAllRun[Req, Res]) next() *callSlot[Req, Res] {
	select {
	case s := <-r.queue:
		if s == nil {
			return nil
		}
		select {
		case <-s.done:
			return s
		case <-r.stopped: // a call broke; this one may never end
		}
	case <-r.stopped:
	}
	return nil
}

// stopAndWait returns when no goroutine of r runs any more.
func (r *callAllRun[Req, Res]) stopAndWait() {
	r.stop()
	for range r.queue {
	}
}

// sequence returns what is in [Requests] as a sequence.
func (r *callAllRun[Req, Res]) sequence(reqs any) iter.Seq[Req] {
	switch reqs := reqs.(type) {
	case chan Req:
		return r.receive(reqs)
	case <-chan Req:
		return r.receive(reqs)
	case iter.Seq[Req]:
		return reqs
	}
	return reqs.(func(func(Req) bool))
}

// receive returns the requests of a channel. If ctx ends before the channel is
// closed, one request follows that will not be called.
func (r *callAllRun[Req, Res]) receive(reqs <-chan Req) iter.Seq[Req] {
	return func(yield func(Req) bool) {
		for {
			var req Req
			more := true
			select {
			case req, more = <-reqs:
			case <-r.stopped:
				return
			case <-r.ctx.Done():
				select {
				case req, more = <-reqs:
				default:
				}
			}
			if !more || !yield(req) {
				return
			}
		}
	}
}

// produce pulls each request when there is a place for it, and starts its call.
func (r *callAllRun[Req, Res]) produce(reqs iter.Seq[Req]) {
	defer close(r.queue)
	defer r.calls.Wait()
	r.guard(func() {
		if !r.takePlace() {
			return
		}
		index := 0
		for req := range reqs {
			if !r.start(index, req) || !r.takePlace() {
				return
			}
			index++
		}
	})
}

// takePlace waits for a place and reports whether there is one.
func (r *callAllRun[Req, Res]) takePlace() bool {
	select {
	case r.places <- struct{}{}:
	case <-r.stopped:
	}
	return !r.hasStopped() // if both cases were ready, select took either
}

func (r *callAllRun[Req, Res]) hasStopped() bool {
	select {
	case <-r.stopped:
		return true
	default:
		return false
	}
}

// start starts the call for a request and reports whether more may follow.
func (r *callAllRun[Req, Res]) start(index int, req Req) bool {
	if r.hasStopped() { // stopped while the request was pulled
		return false
	}
	s := &callSlot[Req, Res]{index: index, done: make(chan struct{})}
	s.result.Request = req
	if r.ctx.Err() != nil {
		s.result.Err = newContextError(r.ctx, fmt.Sprintf("CallAll: request %d was not called", index))
		close(s.done)
		r.queue <- s
		return false
	}
	if r.ordered {
		r.queue <- s
	}
	r.calls.Go(func() {
		r.guard(func() {
			s.result.Response, s.result.Err = r.call(r.callCtx, req)
			close(s.done)
			if !r.ordered {
				r.queue <- s
			}
		})
	})
	return true
}

// guard runs f and keeps its panic or runtime.Goexit for the consumer.
func (r *callAllRun[Req, Res]) guard(f func()) {
	returned := false
	defer func() {
		if returned {
			return
		}
		var p *PanicError // stays nil for Goexit
		if v := recover(); v != nil {
			p = &PanicError{Value: v, Stack: debug.Stack()}
		}
		r.breakOnce.Do(func() { r.broken, r.panicked = true, p })
		r.stop()
	}()
	f()
	returned = true
}
