// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/told"
)

// FullSets returns a source for a watcher that delivers its whole set each time,
// as most registries do. It turns each set into the changes from the set before,
// and [Synced]. The key of an endpoint is the one it was given with [Key], or else
// its addresses. An endpoint that is in a set twice counts once. An empty set
// means that there are no endpoints.
//
// The function watch returns the sequence of one watch. Both must do what
// [Source] says of Watch and its sequence. An error does not end the sequence. A
// set in which two different endpoints have the same key is an error too, and the
// set before it stays.
//
// FullSets returns an error if watch is nil. If watch may be called
// concurrently, the source may be used by any number of channels.
func FullSets(watch func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error]) (Source, error) {
	if watch == nil {
		return nil, errors.New("discover: FullSets: the function is nil")
	}
	return fullSets(watch), nil
}

type fullSets func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error]

// Watch implements [Source].
func (watch fullSets) Watch(ctx context.Context) iter.Seq2[Change, error] {
	sets := watch(ctx)
	if sets == nil {
		return nil
	}
	return func(yield func(Change, error) bool) {
		var prev map[string]resolver.Endpoint
		for endpoints, err := range sets {
			var set map[string]resolver.Endpoint
			if err == nil {
				set, err = keyed(endpoints)
			}
			if err != nil {
				if !yield(Change{}, err) {
					return
				}
				continue
			}
			if !yield(Batch(append(diff(prev, set), Synced())...), nil) {
				return
			}
			prev = set
		}
	}
}

// diff returns the changes that lead from prev to next.
func diff(prev, next map[string]resolver.Endpoint) (changes []Change) {
	for k, ep := range next {
		if old, ok := prev[k]; !ok || !equalEndpoints(old, ep) {
			changes = append(changes, Insert(k, ep))
		}
	}
	for k := range prev {
		if _, ok := next[k]; !ok {
			changes = append(changes, Remove(k))
		}
	}
	return changes
}

const (
	// pollJitter spreads the polls of clients that started together.
	pollJitter = 0.1
	// pollTimeout is the least deadline that a poll is given.
	pollTimeout = 10 * time.Second
	// A nudge waits until a tenth of the interval, at least minPollSpacing and at
	// most maxPollSpacing, has passed since the last poll.
	minPollSpacing = time.Second
	maxPollSpacing = 30 * time.Second
)

// Poll returns a source that calls f at once, and again at the given interval,
// plus or minus a tenth, after each call has returned. f returns the full set of
// endpoints as it is now. Keys and duplicates are as in [FullSets]. An empty set
// without an error means that there are no endpoints.
//
// If f fails, the last set stays. Each different error is reported once until f
// succeeds. f is called again with the backoff of [WithBackoff], or after interval
// if that is shorter. A panic of f is a failure of the watch.
//
// When a connection fails or is lost, f is called early, but not sooner after the
// last call than a tenth of interval (at least 1 s, at most 30 s, and no more than
// interval), and not during a backoff.
//
// The context of f ends with the watch, or after interval, or after 10 s if
// interval is shorter. f must return when it ends. Each channel polls for itself,
// so f must be safe for concurrent use if several channels use the source.
//
// Poll returns an error if f is nil or interval is not positive.
func Poll(f func(ctx context.Context) ([]resolver.Endpoint, error), interval time.Duration) (Source, error) {
	if f == nil {
		return nil, errors.New("discover: Poll: the function is nil")
	}
	if interval <= 0 {
		return nil, fmt.Errorf("discover: Poll: interval %v: must be positive", interval)
	}
	return fullSets(poller{
		look: func(ctx context.Context) ([]resolver.Endpoint, time.Duration, error) {
			endpoints, err := f(ctx)
			return endpoints, jittered(float64(interval), pollJitter), err
		},
		timeout: max(interval, pollTimeout),
		spacing: min(max(interval/10, minPollSpacing), maxPollSpacing),
	}.poll), nil
}

// poller calls look repeatedly.
type poller struct {
	look    func(ctx context.Context) (set []resolver.Endpoint, next time.Duration, err error)
	timeout time.Duration // of a look
	spacing time.Duration // least time from a look to the one that answers a nudge
}

func (p poller) poll(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] {
	env := watchEnvOf(ctx)
	return func(yield func([]resolver.Endpoint, error) bool) {
		failures := 0
		var reported told.Errors // since the last set
		for {
			// The call below answers any earlier nudge.
			select {
			case <-env.nudge:
			default:
			}
			endpoints, wait, err := p.call(ctx)
			if ctx.Err() != nil {
				return
			}
			if (err == nil || reported.First(err.Error())) && !yield(endpoints, err) {
				return
			}
			spacing := min(p.spacing, wait)
			if err == nil {
				failures = 0
				reported.Forget()
			} else {
				failures++
				wait = min(wait, retryDelay(env.backoff, failures))
				spacing = wait
			}
			if !sleep(ctx, spacing) || !sleepOrNudge(ctx, wait-spacing, env.nudge) {
				return
			}
		}
	}
}

func (p poller) call(ctx context.Context) ([]resolver.Endpoint, time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	endpoints, next, err := p.look(ctx)
	if err != nil {
		return nil, next, err
	}
	return endpoints, next, nil
}

// sleepOrNudge waits for d or a nudge. It reports false if ctx ended first.
func sleepOrNudge(ctx context.Context, d time.Duration, nudge <-chan struct{}) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-nudge:
		return true
	case <-ctx.Done():
		return false
	}
}
