// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package testserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/orca"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/test/bufconn"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

// An Option configures a server at its start. Of options that say the same
// thing the last one counts, but for Register and GRPC, which add up.
type Option func(*config) error

type config struct {
	name        string
	address     string // "" is in memory
	model       Model
	workers     int
	seed        uint64
	keepWorking bool
	report      func(Stats) orca.ServerMetrics
	register    []func(grpc.ServiceRegistrar)
	grpc        []grpc.ServerOption
}

// Name sets the server's name. Responses and errors contain it, and it is the
// server's address in memory. Default: "server", in a Cluster "server-0" and
// so on. It must not be empty.
func Name(name string) Option {
	return func(c *config) error {
		if name == "" {
			return errors.New(`testserver: Name: name is "", must not be empty`)
		}
		c.name = name
		return nil
	}
}

// ServiceTime sets how long the work of a call takes. A bidi stream draws a
// service time for each request message, other calls one in all, which ends
// before the first response. Default: Fixed(0).
func ServiceTime(m Model) Option {
	return func(c *config) error {
		if m == nil {
			return errors.New("testserver: ServiceTime: model is nil, must be set")
		}
		c.model = m
		return m.Validate()
	}
}

// Workers sets how many pieces of work are done at a time; those that find no
// worker free wait in one FIFO queue without bound. 0 means no queue: all work
// is done at once, side by side, however much there is. Default: 0.
func Workers(n int) Option {
	return func(c *config) error {
		if n < 0 {
			return fmt.Errorf("testserver: Workers: n is %d, must not be negative", n)
		}
		c.workers = n
		return nil
	}
}

// Seed sets the seed of service times and of which calls fail. Any number is as
// good as another. Default: 1, in a Cluster the position of the server plus 1,
// for two servers with one seed draw the same service times.
func Seed(seed uint64) Option {
	return func(c *config) error {
		c.seed = seed
		return nil
	}
}

// KeepWorking makes the work of a call continue, and keep its worker, after the
// client has given up, as in a server that does not look at its context. By
// default a call that is cancelled gives its worker, or its place in the queue,
// to the next.
func KeepWorking() Option {
	return func(c *config) error {
		c.keepWorking = true
		return nil
	}
}

// Listen sets the address to listen on, in the form of net.Listen("tcp"). A
// port of 0 is chosen by the system and kept through restarts. Default:
// "127.0.0.1:0".
func Listen(address string) Option {
	return func(c *config) error {
		if _, _, err := net.SplitHostPort(address); err != nil {
			return fmt.Errorf("testserver: Listen: address is %q, must be host:port: %w", address, err)
		}
		c.address = address
		return nil
	}
}

// InMemory makes the server reachable through [Server.DialOptions] only, over a
// buffer in memory instead of a port. It is what testing/synctest needs, where a
// goroutine that reads from a socket would hold the virtual time.
func InMemory() Option {
	return func(c *config) error {
		c.address = ""
		return nil
	}
}

// ReportLoad adds an ORCA load report to the end of every call of TestService.
// report makes it out of the server's counts, in which the call has finished; it
// is called on the calls' goroutines, concurrently. The maps of what it returns
// may be nil and are not changed. MeasuredLoad returns a report of what the
// server really does. Default: no reports.
func ReportLoad(report func(Stats) orca.ServerMetrics) Option {
	return func(c *config) error {
		if report == nil {
			return errors.New("testserver: ReportLoad: report is nil, must be set")
		}
		c.report = report
		return nil
	}
}

// Register adds services to the server. register is called once for each
// grpc.Server that is made: at the start, at a restart and at a GOAWAY.
func Register(register func(grpc.ServiceRegistrar)) Option {
	return func(c *config) error {
		if register == nil {
			return errors.New("testserver: Register: register is nil, must be set")
		}
		c.register = append(c.register, register)
		return nil
	}
}

// GRPC adds options to the grpc.Server, such as grpc.MaxConcurrentStreams or
// keepalive parameters. The tap handle is taken: grpc.NewServer panics at a
// second grpc.InTapHandle.
func GRPC(opts ...grpc.ServerOption) Option {
	return func(c *config) error {
		c.grpc = append(c.grpc, opts...)
		return nil
	}
}

// A Server is an in-process gRPC server. All methods are safe for concurrent
// use.
type Server struct {
	// Immutable after Start.
	name        string
	address     string // where it listens, with the port once that is known; "" in memory
	model       Model
	workers     int
	seed        uint64
	keepWorking bool
	report      func(Stats) orca.ServerMetrics
	options     []grpc.ServerOption // complete
	register    []func(grpc.ServiceRegistrar)
	health      *health.Server
	epoch       time.Time
	queue       *queue // nil without workers

	// How often each kind of randomness was asked for; the number of a drawing
	// is what tells it from the others.
	works      atomic.Uint64
	failures   atomic.Uint64
	rejections atomic.Uint64

	counters counters

	// current is the last condition of the timeline.
	current atomic.Pointer[condition]

	// conditions guards the growth of the timeline and what follows. It is a
	// leaf: no other lock is taken under it.
	conditions sync.Mutex
	stallEnd   time.Duration // since epoch; of the stall that lasts
	stallTimer *time.Timer   // ends it
	closed     bool
	freePort   func() // gives the port back; nil if it is not kept

	// life guards what follows. It is taken before any run.mu and not held while
	// something stops.
	life     sync.Mutex
	finished bool              // Close was called
	run      *run              // nil while stopped
	memory   *bufconn.Listener // run's listener, if in memory
}

// Start starts a server. Whoever starts it must Close it.
func Start(opts ...Option) (*Server, error) {
	return start(config{name: "server", address: "127.0.0.1:0", model: Fixed(0), seed: 1}, opts)
}

func start(c config, opts []Option) (*Server, error) {
	for _, o := range opts {
		if err := o(&c); err != nil {
			return nil, err
		}
	}
	s := &Server{
		name:        c.name,
		address:     c.address,
		model:       c.model,
		workers:     c.workers,
		seed:        c.seed,
		keepWorking: c.keepWorking,
		report:      c.report,
		register:    c.register,
		health:      health.NewServer(),
		epoch:       time.Now(),
	}
	if s.workers > 0 {
		s.queue = newQueue(s.workers)
	}
	if s.report != nil {
		s.options = append(s.options, orca.CallMetricsServerOption(reporter{s}))
	}
	s.options = append(s.options, grpc.InTapHandle(s.tap), grpc.WaitForHandlers(true))
	s.options = append(s.options, c.grpc...)
	s.current.Store(&condition{speed: 1, changed: make(chan struct{})})
	s.SetServing(true)

	s.life.Lock()
	defer s.life.Unlock()
	if err := s.listenLocked(); err != nil {
		return nil, err
	}
	if s.memory == nil {
		s.address = s.run.listener.Addr().String()
	}
	return s, nil
}

// listenLocked opens the port and begins a run. Caller must hold s.life.
func (s *Server) listenLocked() error {
	if s.address == "" {
		s.memory = bufconn.Listen(memoryBuffer)
		s.run = newRun(s, s.memory)
		return nil
	}
	l, err := net.Listen("tcp", s.address)
	if err != nil {
		return fmt.Errorf("testserver: %s: %w", s.name, err)
	}
	s.run = newRun(s, l)
	return nil
}

// memoryBuffer is how many bytes a connection in memory holds in each direction.
const memoryBuffer = 64 << 10

// newGRPCServer returns a grpc.Server for a run, which has everything
// registered and does not serve yet.
func (s *Server) newGRPCServer(r *run) *grpc.Server {
	g := grpc.NewServer(s.options...)
	testingv1.RegisterTestServiceServer(g, &service{server: s, dead: r.dead})
	grpc_health_v1.RegisterHealthServer(g, s.health)
	for _, register := range s.register {
		register(g)
	}
	return g
}

// Name returns the server's name.
func (s *Server) Name() string { return s.name }

// Addr returns the server's address, "127.0.0.1:12345", which stays the same
// through restarts; of a server in memory, its name.
func (s *Server) Addr() string {
	if s.address == "" {
		return s.name
	}
	return s.address
}

// Endpoint returns the server's address as an endpoint.
func (s *Server) Endpoint() resolver.Endpoint {
	return resolver.Endpoint{Addresses: []resolver.Address{{Addr: s.Addr()}}}
}

// DialOptions returns what a client needs to reach the server, and no other if
// it is in memory: credentials, and a dialer for what is in memory.
func (s *Server) DialOptions() []grpc.DialOption {
	opts := []grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}
	if s.address == "" {
		opts = append(opts, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return s.DialContext(ctx)
		}))
	}
	return opts
}

// DialContext connects to the server, for a dialer of a test that does more.
func (s *Server) DialContext(ctx context.Context) (net.Conn, error) {
	if s.address != "" {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.address)
	}
	s.life.Lock()
	l := s.memory
	s.life.Unlock()
	if l == nil {
		return nil, fmt.Errorf("testserver: %s: %w", s.name, syscall.ECONNREFUSED)
	}
	return l.DialContext(ctx)
}

// NewClient returns a channel to the server alone. The caller must close it.
func (s *Server) NewClient(opts ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+s.Addr(), append(s.DialOptions(), opts...)...)
}

// GoAway sends GOAWAY on all open connections: clients start no more calls on
// them, those in flight finish, and then the connections close. New connections are served. GoAway returns at once; a connection in the
// middle of its handshake delays the GOAWAY of the others until that is over.
func (s *Server) GoAway() error {
	s.life.Lock()
	defer s.life.Unlock()
	if s.run == nil {
		return fmt.Errorf("testserver: %s: GoAway: server is stopped", s.name)
	}
	if err := s.run.goAway(); err != nil {
		return fmt.Errorf("testserver: %s: GoAway: %w", s.name, err)
	}
	return nil
}

// CloseConnections closes all open connections without a GOAWAY, as a failing
// network does; calls in flight on them are lost. New connections are served.
func (s *Server) CloseConnections() {
	s.life.Lock()
	r := s.run
	s.life.Unlock()
	if r != nil {
		r.closeConns()
	}
}

// Stop stops the server at once, as a crash does: the port refuses connections,
// and open ones close without a GOAWAY. It returns when the last handler has. It
// does nothing to a server that is stopped, and hastens a GracefulStop. On Linux
// the port stays the server's until Close: nobody else is given it, so nobody
// else answers there.
func (s *Server) Stop() {
	s.life.Lock()
	r := s.run
	s.life.Unlock()
	if r == nil {
		return
	}
	r.kill()
	s.retire(r)
}

// GracefulStop stops the server as a well-behaved one stops: the port refuses
// connections, open ones get a GOAWAY, and calls in flight finish.
// If ctx ends first, the rest is a Stop, and the error is the context's.
func (s *Server) GracefulStop(ctx context.Context) error {
	s.life.Lock()
	r := s.run
	s.life.Unlock()
	if r == nil {
		return nil
	}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		r.drain()
	}()
	var err error
	select {
	case <-drained:
	case <-ctx.Done():
		err = fmt.Errorf("testserver: %s: GracefulStop: %w", s.name, ctx.Err())
		r.kill()
		<-drained
	}
	s.retire(r)
	return err
}

// retire forgets a run that is over.
func (s *Server) retire(r *run) {
	s.life.Lock()
	defer s.life.Unlock()
	if s.run == r {
		s.run, s.memory = nil, nil
	}
}

// Restart starts a stopped server again, on the same port, with its counts, its
// speed and its faults as they were. If another listens on the port by now, Restart
// tries again until ctx ends.
func (s *Server) Restart(ctx context.Context) error {
	for {
		err := s.restart()
		if !errors.Is(err, syscall.EADDRINUSE) {
			return err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(err, ctx.Err())
		}
	}
}

func (s *Server) restart() error {
	s.life.Lock()
	defer s.life.Unlock()
	switch {
	case s.finished:
		return fmt.Errorf("testserver: %s: Restart: server is closed", s.name)
	case s.run != nil:
		return fmt.Errorf("testserver: %s: Restart: server is running", s.name)
	}
	return s.listenLocked()
}

// Close stops the server for good, as Stop does. It is idempotent.
func (s *Server) Close() {
	s.life.Lock()
	s.finished = true
	s.life.Unlock()
	s.Stop()
	s.conditions.Lock()
	defer s.conditions.Unlock()
	s.closed = true
	s.stopStallTimerLocked()
	if s.freePort != nil {
		s.freePort()
		s.freePort = nil
	}
}

// keepPort keeps the port of an address on which the server listens no more.
func (s *Server) keepPort(addr net.Addr) {
	s.conditions.Lock()
	defer s.conditions.Unlock()
	if tcp, ok := addr.(*net.TCPAddr); ok && s.freePort == nil && !s.closed {
		s.freePort = bind(tcp)
	}
}
