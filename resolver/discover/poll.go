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

// FullSets returns a source from one that delivers its whole set each time,
// as most registries do: each set becomes the changes from the one before, and
// [Synced]. The key of an endpoint is the one it was given with [Key], or else
// its addresses; an endpoint that is in a set twice counts once. An empty set
// means that there are no endpoints.
//
// The function returns the sequence of one watch, and both are held to what
// [Source] says of Watch, errors included. A set in which two different
// endpoints have the same key is such an error, and the set before it stays.
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
	// A nudge is answered no sooner after the last poll than a tenth of the
	// interval, and within these bounds.
	minPollSpacing = time.Second
	maxPollSpacing = 30 * time.Second
)

// Poll returns a source that calls f, which returns the full set of endpoints
// as it is now, at once and then every interval, plus or minus a tenth. The set
// is taken as in [FullSets]; an empty one without an error means that there are
// no endpoints.
//
// If f fails, the error is reported, once until f succeeds, the last set stays, and f is called again with the backoff of [WithBackoff], or after
// interval if that is shorter.
// When a connection fails or is lost, f is called early, but not within a tenth
// of interval (at least 1 s, at most 30 s) of the last call, nor during a
// backoff.
//
// The context that f is given ends with the watch, and after interval, or 10 s
// if that is longer; f must heed it. Each channel polls for itself, so f must be
// safe for concurrent use if the source is used by several.
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

// poller looks again and again.
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
			// This call answers the nudges so far.
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

// sleepOrNudge waits for d or a nudge, and reports whether it was one of them
// rather than ctx ending first.
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
