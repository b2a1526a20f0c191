// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package testserver runs real gRPC servers inside the process, for tests,
// benchmarks and examples: on loopback ports, or in memory where the wire does
// not matter.
//
// A server offers the service belfry.testing.v1.TestService and behaves by a
// model. Each call is a piece of work whose size is drawn from a [Model], such
// as [Lognormal]; with [Workers] the work goes through one FIFO queue before c
// workers, so that overload shows as queueing; [Server.SetSpeed] and
// [Server.Stall] change the rate at which work is done, of calls in progress
// too. Faults are methods of the running server: instant failures
// ([Server.Fail]), failures after headers ([Server.FailAfterHeaders]), early
// rejection ([Server.Reject]), answers that never come ([Server.BlackHole]),
// broken connections ([Server.CloseConnections]), GOAWAY ([Server.GoAway]),
// stop and restart on the same port ([Server.Stop], [Server.GracefulStop],
// [Server.Restart]). What a single request asks for in its Behaviour comes on
// top of all that.
//
// Tests start a server with [New], which closes it with the test, and programs
// with [Start]:
//
//	srv, err := testserver.Start(
//		testserver.ServiceTime(testserver.Exponential(10*time.Millisecond)),
//		testserver.Workers(4),
//	)
//	if err != nil {
//		return err
//	}
//	defer srv.Close()
//	conn, err := srv.NewClient()
//
// A test waits for what a server sees instead of sleeping: [Server.Wait],
// [Server.WaitInFlight] and [Server.WaitConnections] return on the event. In a
// testing/synctest bubble a server started with [InMemory] runs in virtual
// time, to the nanosecond.
//
// A server under load costs little more than gRPC itself: without Workers no
// call takes a lock, and no goroutine is started but gRPC's own.
package testserver
