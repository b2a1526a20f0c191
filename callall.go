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

// maxConcurrency bounds the memory that CallAll sets aside, 8 bytes for each.
const maxConcurrency = 1_000_000

// A Result is how the call for one request of [CallAll] ended.
type Result[Req, Res any] struct {
	Request  Req
	Response Res   // meaningful if Err is nil
	Err      error // the call's error as it is, or why the call was not made
}

// CallAll makes a call for each request, at most concurrency of them at a time,
// and yields the position of each request, counted from 0, with its result, in
// the order of the requests. [CallAllUnordered] yields results as they come.
// It is Tower's call_all with a bound.
//
// A failed call is a result like any other; a consumer that wants to stop at an
// error breaks out of its loop. To call a method of a generated stub, pass
// [Bind](client.Method).
//
// # Bounds
//
// A request takes one of the concurrency places when it is pulled and leaves it
// when the loop body is done with its result. So no more than concurrency
// requests are anywhere between, a slow consumer slows the calls down, and with
// a concurrency of 1 nothing is called before the result of the call before it
// has been dealt with. In order, a slow call holds the place of the results
// that wait for it. concurrency is from 1 to 1,000,000; if it is not, the
// sequence is one result with an error that says so, for position 0.
//
// # The end
//
// The sequence ends when the requests have ended and all results are yielded. The
// error of a call does not end it. It ends early in three cases, and whichever it
// is, no further call is made, the calls in flight find their context cancelled,
// and all goroutines have returned before the loop is left:
//
//   - The consumer breaks out of the loop, or panics. The results of the calls
//     in flight are lost.
//   - ctx ends. The calls in flight end with whatever error they make of it and
//     are yielded; the next request, if there is one, is pulled but not called,
//     and its error wraps ctx.Err() and has the status code CANCELLED or
//     DEADLINE_EXCEEDED. A sequence without such an error was called in full.
//   - A call or the request sequence panics: the loop panics with a
//     [*PanicError]. If it calls [runtime.Goexit], so does the loop.
//
// The context of the calls ends with the loop, also when all went well. A stream
// that a call returns as its response must be read to its end in the loop body.
//
// Calls must heed their context, as gRPC's do, because the loop waits for them.
//
// # Requests
//
// reqs is a channel or a sequence. From a channel requests are received until it
// is closed. The wait for the next one ends with the loop, however that ends, and
// with ctx. If ctx ends it, the last result has the error of a request that was not
// called, and the zero Request. A loop that ends early has received one request at
// most that it has not called.
//
// The loop waits for a sequence to return. One that blocks must itself return
// when ctx ends, and a consumer of it cancels ctx before it breaks out of the loop.
// For requests from a channel, pass the channel.
//
// # Concurrency
//
// reqs is pulled on a goroutine of its own, so results are yielded while the next
// request is not there yet. call is called from one goroutine for each request.
// Nothing runs until the returned sequence is ranged over; it may be ranged
// over as often as reqs may.
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

// Bind makes of a generated stub's method what [CallAll] calls. opts are the
// options of each call; those that receive something, such as grpc.Header,
// would be written to by several calls at once and must not be among them.
func Bind[Req, Res any](method func(context.Context, Req, ...grpc.CallOption) (Res, error), opts ...grpc.CallOption) func(context.Context, Req) (Res, error) {
	return func(ctx context.Context, req Req) (Res, error) {
		return method(ctx, req, opts...)
	}
}

// A PanicError is what [CallAll] panics with when a call or the request
// sequence has panicked on a goroutine of its own.
type PanicError struct {
	Value any    // what it panicked with
	Stack []byte // where, as of [debug.Stack]
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

// callAllRun is one loop over the results. Three kinds of goroutine meet in it:
// the consumer, one producer that pulls the requests, and one for each call.
type callAllRun[Req, Res any] struct {
	ctx     context.Context // the caller's
	callCtx context.Context // derived from it, cancelled by stop
	call    func(context.Context, Req) (Res, error)
	ordered bool

	// places holds a token for each request between being pulled and its result
	// having been dealt with.
	places chan struct{}

	// queue hands slots to the consumer: in order as soon as they are made, else
	// when their calls have ended. It has room for as many as there are places,
	// so sending never blocks. The producer closes it when nothing else runs.
	queue chan *callSlot[Req, Res]

	// stop closes stopped and cancels callCtx: the consumer wants no more, or a
	// goroutine broke. It may be called more than once.
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
	done   chan struct{} // closed when result is there
}

// next returns the next slot whose result is there, or nil if no more will be.
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

// receive returns the requests of a channel, and one that will not be called if ctx
// ends before the channel does.
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
	return !r.hasStopped() // with both ready, the choice was random
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
	if r.hasStopped() { // while the request was pulled
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
