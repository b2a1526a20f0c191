// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"fmt"
	"math"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// SetSpeed sets the rate at which work is done, from now on and of calls in
// progress too: at speed 0.2 what is left of a call takes five times as long.
// A server starts at speed 1; f must be positive and finite. Delays that
// requests ask for are not work and take their time at any speed.
func (s *Server) SetSpeed(f float64) error {
	if !(f > 0) || math.IsInf(f, 1) {
		return fmt.Errorf("testserver: SetSpeed: f is %v, must be positive and finite", f)
	}
	s.change(func(c *condition) { c.speed = f })
	return nil
}

// Stall stops all work until Resume, as a garbage collector or a hypervisor
// does: no call starts to be served, fails or is answered. Connections live on,
// and what Reject or the health service answer is answered.
func (s *Server) Stall() { s.stall(math.MaxInt64) }

// StallFor is Stall for a time d, which must be positive. Of stalls that
// overlap the one that ends last counts.
func (s *Server) StallFor(d time.Duration) error {
	if d <= 0 {
		return fmt.Errorf("testserver: StallFor: d is %v, must be positive", d)
	}
	s.stall(d)
	return nil
}

func (s *Server) stall(d time.Duration) {
	s.conditions.Lock()
	defer s.conditions.Unlock()
	now := s.clock()
	end := now + d
	if end < now { // without end
		end = math.MaxInt64
	}
	if !s.current.Load().stalled {
		s.changeLocked(now, func(c *condition) { c.stalled = true })
	} else if end <= s.stallEnd {
		return
	}
	s.stallEnd = end
	s.stopStallTimerLocked()
	if end == math.MaxInt64 || s.closed {
		return
	}
	s.stallTimer = time.AfterFunc(d, func() {
		s.conditions.Lock()
		defer s.conditions.Unlock()
		// A stall that was made longer, or ended and started again, while this
		// function waited for the lock ends at another time.
		if s.current.Load().stalled && s.stallEnd == end {
			s.changeLocked(end, func(c *condition) { c.stalled = false })
		}
	})
}

// Resume ends a stall, however it started. Work continues where it stopped.
func (s *Server) Resume() {
	s.conditions.Lock()
	defer s.conditions.Unlock()
	s.stopStallTimerLocked()
	if s.current.Load().stalled {
		s.changeLocked(s.clock(), func(c *condition) { c.stalled = false })
	}
}

// stopStallTimerLocked stops the end of a stall. Caller must hold s.conditions.
func (s *Server) stopStallTimerLocked() {
	if s.stallTimer != nil {
		s.stallTimer.Stop()
		s.stallTimer = nil
	}
}

// Fail makes the server answer a fraction of its calls, in (0, 1], with a code
// other than OK at once, without queue, work or response headers: after the
// request of a unary or server-stream call has been read, and before the first
// one of the other streams is. It takes the place of an earlier Fail or
// FailAfterHeaders; Heal ends it.
func (s *Server) Fail(code codes.Code, fraction float64) error {
	if err := checkFault("Fail", code, fraction); err != nil {
		return err
	}
	s.change(func(c *condition) { c.fail = fault{code: code, fraction: fraction} })
	return nil
}

// FailAfterHeaders is Fail, but response headers go before the status. To
// gRPC's own retries such a call is committed: it is not tried again.
func (s *Server) FailAfterHeaders(code codes.Code, fraction float64) error {
	if err := checkFault("FailAfterHeaders", code, fraction); err != nil {
		return err
	}
	s.change(func(c *condition) { c.fail = fault{code: code, fraction: fraction, headers: true} })
	return nil
}

// Reject makes the server answer a fraction of its calls, in (0, 1], with a code
// other than OK when their headers arrive, before the request is read, as a
// shedding proxy does, or a server that does not know the method. (For that
// case itself, call a method that does not exist.) It takes the place of an
// earlier Reject; Heal ends it.
func (s *Server) Reject(code codes.Code, fraction float64) error {
	if err := checkFault("Reject", code, fraction); err != nil {
		return err
	}
	s.change(func(c *condition) { c.reject = fault{code: code, fraction: fraction} })
	return nil
}

func checkFault(method string, code codes.Code, fraction float64) error {
	if code == codes.OK || code >= numCodes {
		return fmt.Errorf("testserver: %s: code is %v, must be one of gRPC's and not OK", method, code)
	}
	if !(fraction > 0 && fraction <= 1) {
		return fmt.Errorf("testserver: %s: fraction is %v, must be in (0, 1]", method, fraction)
	}
	return nil
}

// BlackHole makes the server accept calls and answer none, those in progress
// included, until Heal; calls that have waited are then served. A call ends
// early when its client gives up. Fail and Reject are answers too: they wait or,
// for Reject, do not apply.
func (s *Server) BlackHole() { s.change(func(c *condition) { c.blackHole = true }) }

// Heal ends what Fail, FailAfterHeaders, Reject, BlackHole and DropPackets began. A stall and
// a speed are not faults; they have Resume and SetSpeed.
func (s *Server) Heal() {
	s.change(func(c *condition) { c.fail, c.reject, c.blackHole, c.drops = fault{}, fault{}, false, false })
}

// SetServing sets what the server says to health checks, of the whole server
// and of TestService: SERVING, as it does at first, or NOT_SERVING. It serves
// calls either way.
func (s *Server) SetServing(serving bool) {
	st := grpc_health_v1.HealthCheckResponse_NOT_SERVING
	if serving {
		st = grpc_health_v1.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", st)
	s.health.SetServingStatus(testingv1.TestService_ServiceDesc.ServiceName, st)
}

// tap sees the headers of a call before anything else is done for it. It runs
// on the connection's reading goroutine and must not block.
func (s *Server) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	c := s.current.Load()
	if c.reject.fraction == 0 || c.blackHole || !strings.HasPrefix(info.FullMethodName, methodPrefix) {
		return ctx, nil
	}
	if !c.reject.hits(randOf(s.seed, s.rejections.Add(1), forRejection)) {
		return ctx, nil
	}
	s.counters.begin()
	s.counters.end(c.reject.code)
	return nil, status.Errorf(c.reject.code, "testserver: %s rejects calls", s.name)
}

// methodPrefix is what the full names of TestService's methods begin with.
var methodPrefix = "/" + testingv1.TestService_ServiceDesc.ServiceName + "/"

// open waits while the server answers nothing. It returns false if stop was
// closed first.
func (s *Server) open(stop <-chan struct{}) bool {
	for {
		c := s.current.Load()
		if !c.stalled && !c.blackHole {
			return true
		}
		select {
		case <-c.changed:
		case <-stop:
			return false
		}
	}
}
