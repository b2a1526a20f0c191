// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package replay

import (
	"context"
	"io"
	"math"
	"runtime/debug"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/attempt"
	"github.com/belfry-go/belfry/internal/message"
)

// inline is the most bytes that are sent again by the goroutine that found the failure.
// It is less than gRPC's windows, so sending them does not block on a server that waits
// for its responses to be read. Another goroutine sends the rest, and what the caller
// sends meanwhile.
const inline = 32 << 10

// A Lane is an attempt that is open.
type Lane struct {
	grpc.ClientStream
	Call   *interceptor.Call
	Cancel func() // Frees the context of the attempt. Nil if there is none.

	// What RecvMsg returns first, if another method has found that out. Set before the
	// lane is final, and then used by RecvMsg alone.
	message proto.Message
	err     error

	// Set before the lane is committed: it was not sent all that was kept, because it has
	// failed, so it must not be sent what comes later either.
	dead bool

	// Guarded by Stream.mu.
	live   bool // It was sent all that is kept, or takes no more.
	passed bool // It has failed, and the stream continues without it.

	broken atomic.Pointer[status.Status] // Why it could not be sent what was kept.
}

// RecvMsg receives from the attempt. Its error is why the attempt was broken off, if it was.
func (l *Lane) RecvMsg(m any) error {
	err := l.ClientStream.RecvMsg(m)
	if why := l.broken.Load(); err != nil && why != nil {
		return why.Err()
	}
	return err
}

func (l *Lane) cancel() {
	if l.Cancel != nil {
		l.Cancel()
	}
}

// A Layer makes the further attempts. Its methods are called by whoever has the turn, one
// at a time, without a lock.
type Layer interface {
	// Repeat makes the attempt that follows l, which failed with err. If there is none,
	// next is nil and the error is that of the stream.
	Repeat(l *Lane, err error) (next *Lane, _ error)
}

// A Racer is a Layer that runs attempts side by side.
type Racer interface {
	Layer
	// Race receives the first message from l or from an attempt beside it, and says which.
	// After it no attempt follows.
	Race(l *Lane, m any) (*Lane, error)
	// Choose ends a race that runs: it chooses l, or if that is nil any attempt that is
	// open and has not failed, and cancels the others. Then the race ends as that attempt
	// does. It returns nil if it cannot, because l has failed or there is none now. Unlike
	// Race and Repeat it is called concurrently.
	Choose(l *Lane) *Lane
	// Running returns an attempt of a race that runs, which is open and has not failed, nil
	// if there is none now. It is called concurrently.
	Running() *Lane
}

// Config is what a Stream needs to know.
type Config struct {
	Context context.Context   // The context of the stream's call,
	Call    *interceptor.Call // the call,
	Options []grpc.CallOption // and its options, as the layer got them.
	Layer   Layer
	Limit   int    // How many bytes the stream may keep,
	Total   *Total // and where they count,
	Most    int    // with how many in all.
}

// A Stream is a stream that can be repeated until it commits.
type Stream struct {
	Config
	codec  codec
	plain  bool // No option has chosen the codec.
	single bool // The server sends one message.

	committed atomic.Pointer[Lane]

	// mu guards the fields below. It is not held while a message is sent or received, or
	// the layer is called.
	mu      sync.Mutex
	changed sync.Cond // Signals all of them.
	changes int       // How often it was signalled.
	cur     *Lane
	turn    turn
	final   bool // cur is the last.
	ended   bool // The stream is over, and nothing is kept.
	closed  bool // CloseSend was called.
	own     *streamContext
	sent    buffer
}

// A turn is what the one goroutine does that has it.
type turn uint8

const (
	free      turn = iota // Nobody has it.
	receiving             // It receives from the current attempt.
	racing                // The layer receives from several attempts.
	replacing             // It finds out how the current attempt has ended and replaces it.
)

// Init makes s the stream of a call whose first attempt is open as l. The layer calls it
// once, before it returns s.
func (s *Stream) Init(c Config, l *Lane) {
	s.Config, s.cur, l.live = c, l, true
	s.single = !c.Call.Desc().ServerStreams
	s.changed.L = &s.mu
	for _, o := range c.Options {
		if o, ok := o.(grpc.MaxRetryRPCBufferSizeCallOption); ok {
			s.Limit = min(s.Limit, o.MaxRetryRPCBufferSize)
		}
	}
	s.codec, s.plain = codecOf(c.Options)
	c.Call.Internals().AtStreamEnd(s)
}

// signalLocked wakes all who wait. Caller must hold s.mu.
func (s *Stream) signalLocked() {
	s.changes++
	s.changed.Broadcast()
}

// commit makes l the last attempt, unless another one is.
func (s *Stream) commit(l *Lane) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitLocked(l)
}

// commitLocked is commit. Caller must hold s.mu.
func (s *Stream) commitLocked(l *Lane) {
	if s.final {
		return
	}
	s.final, s.cur = true, l
	s.adopt(l)
	s.settleLocked()
	s.signalLocked()
}

// settleLocked drops what is kept when nobody needs it any more. Caller must hold s.mu.
func (s *Stream) settleLocked() {
	if !s.final || !s.cur.live && !s.cur.passed && !s.ended {
		return
	}
	if s.committed.Load() == nil {
		s.cur.dead = s.cur.dead || !s.cur.live || s.cur.passed
		s.committed.Store(s.cur)
	}
	s.dropLocked()
}

// dropLocked drops what is kept. Caller must hold s.mu.
func (s *Stream) dropLocked() {
	s.Total.give(len(s.sent.bytes))
	s.sent.bytes = nil
}

// adopt makes the results of l those of the stream.
func (s *Stream) adopt(l *Lane) {
	if l.Call != s.Call {
		s.Call.Adopt(l.Call)
	}
}

// commitNowLocked commits to the current attempt, or to whichever a race chooses. It waits
// only while an attempt is being made. Caller must hold s.mu, which it gives up meanwhile.
func (s *Stream) commitNowLocked() {
	for !s.final {
		switch s.turn {
		case racing:
			n := s.changes
			s.mu.Unlock()
			l := s.Layer.(Racer).Choose(nil)
			s.mu.Lock()
			if l != nil {
				s.commitLocked(l)
			} else if n == s.changes && !s.final {
				s.changed.Wait()
			}
		case replacing:
			s.changed.Wait()
		default:
			s.commitLocked(s.cur)
		}
	}
}

// StreamEnded is called by the stack when the stream has ended.
func (s *Stream) StreamEnded() {
	s.mu.Lock()
	s.ended = true
	if s.turn == free || s.turn == receiving { // Otherwise whoever has the turn commits.
		s.commitLocked(s.cur)
	}
	s.settleLocked()
	s.signalLocked()
	l, own := s.committed.Load(), s.own
	s.mu.Unlock()
	if l != nil {
		l.cancel()
	}
	if own != nil {
		own.cancel()
	}
}

// take waits for the turn and takes it, unless the stream is final.
func (s *Stream) take() (cur *Lane, final bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.turn == replacing || s.turn != free && !s.final {
		s.changed.Wait()
	}
	if !s.final {
		s.turn = receiving
	}
	return s.cur, s.final
}

// give gives the turn back.
func (s *Stream) give() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn = free
	s.signalLocked()
}

func (s *Stream) RecvMsg(m any) error {
	if l := s.committed.Load(); l != nil {
		return s.receive(l, m)
	}
	cur, final := s.take()
	if final {
		return s.receive(cur, m)
	}
	defer s.give()
	for {
		l, err := s.first(cur, m)
		if err == nil || err == io.EOF {
			s.commit(l)
		}
		s.mu.Lock()
		final := s.final
		s.mu.Unlock()
		if final {
			return s.end(l, err)
		}
		if cur = s.replace(l, err); cur == l {
			return s.end(l, l.err)
		}
	}
}

// receive receives from the last attempt.
func (s *Stream) receive(l *Lane, m any) error {
	switch {
	case l.message != nil: // The caller may have another type for it.
		data, err := s.codec.Marshal(l.message)
		if err == nil {
			err = s.codec.Unmarshal(data, m)
			data.Free()
		}
		l.message = nil
		return s.end(l, err)
	case l.err != nil:
		return l.err
	}
	return s.end(l, l.RecvMsg(m))
}

// end frees an attempt from which RecvMsg returned err, if it has ended.
func (s *Stream) end(l *Lane, err error) error {
	if err != nil || s.single {
		l.cancel()
	}
	return err
}

// first receives from an attempt from which nothing was received, or from one beside it.
func (s *Stream) first(l *Lane, m any) (*Lane, error) {
	r, ok := s.Layer.(Racer)
	if !ok || !s.startRace() {
		return l, l.RecvMsg(m)
	}
	won := l
	defer func() { // Also if it panics.
		s.mu.Lock()
		defer s.mu.Unlock()
		s.turn = receiving
		s.commitLocked(won)
	}()
	won, err := r.Race(l, m)
	return won, err
}

// startRace reports whether the layer may race.
func (s *Stream) startRace() bool {
	decodes := s.decodes()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !decodes || s.final {
		return false
	}
	s.turn = racing
	return true
}

// decodes reports whether what is kept can be sent again, by the first message.
func (s *Stream) decodes() bool {
	s.mu.Lock()
	var data []byte
	kept := len(s.sent.bytes) > 0
	if kept {
		data, _ = s.sent.at(0)
	}
	s.mu.Unlock()
	if !kept {
		return true
	}
	_, err := s.decode(data)
	return err == nil
}

// decode returns a message to send again.
func (s *Stream) decode(data []byte) (any, error) {
	return s.sent.kind.Decode(func(m any) error {
		return s.codec.Unmarshal(mem.BufferSlice{mem.SliceBuffer(data)}, m)
	})
}

// replace replaces l, which failed with err. It returns the attempt that is current then:
// l, with its error, if there is no further one. The caller has the turn.
func (s *Stream) replace(l *Lane, err error) *Lane {
	s.mu.Lock()
	s.turn = replacing
	s.mu.Unlock()
	var next *Lane
	defer func() {
		if next == nil { // Or a panic.
			s.replaced(l, l)
		}
	}()
	l.err = err
	if s.decodes() {
		next, l.err = s.Layer.Repeat(l, err)
	}
	if next == nil {
		return l
	}
	l.cancel()
	s.replaced(l, next)
	s.Feed(next)
	return next
}

// replaced ends a replacement of l by next, which is l if there is no further attempt.
func (s *Stream) replaced(l, next *Lane) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.turn = receiving
	if next != l {
		s.cur, l.passed = next, true
		s.adopt(next)
	}
	if next == l || s.ended {
		s.commitLocked(next)
	}
	s.signalLocked()
}

// Pass records that l has failed, and that the race continues without it.
func (s *Stream) Pass(l *Lane) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.final {
		l.passed = true
		s.signalLocked()
	}
}

// resolve finds out how l has ended, as its caller was told by a method that does not say,
// and replaces it. A race finds that out by itself. It reports whether the stream continues
// without l.
func (s *Stream) resolve(l *Lane) (continues bool) {
	s.mu.Lock()
	for s.turn != free && (s.cur == l || s.turn == racing) && !l.passed && !s.final {
		s.changed.Wait()
	}
	if s.cur != l || l.passed || s.final {
		defer s.mu.Unlock()
		return s.cur != l || !s.final
	}
	s.turn = replacing
	s.mu.Unlock()
	defer s.give()
	err := s.statusOf(l)
	if err != nil && err != io.EOF {
		return s.replace(l, err) != l
	}
	l.err = err
	s.commit(l)
	return false
}

// statusOf returns how an attempt has ended that takes no more messages, and from which
// none was received. It is nil if there is a message to receive.
func (s *Stream) statusOf(l *Lane) error {
	m := attempt.Reply(s.Call.Method())
	if m == nil || !s.plain { // It is not known what a message would be received to.
		md, err := l.Header()
		if err != nil {
			return err
		}
		if !s.headerless(l, md) {
			return nil
		}
		m = new(emptypb.Empty)
	}
	if err := l.RecvMsg(m); err != nil {
		return err
	}
	l.message = m
	return nil
}

// headerless reports whether l, whose header is md, has ended without one, and so without a
// message: gRPC returns no header only then. Other connections may return none of a stream
// that is well, whose context has not ended.
func (s *Stream) headerless(l *Lane, md metadata.MD) bool {
	return len(md) == 0 && (s.Call.Internals().OnGRPC() || l.Context().Err() != nil)
}

// Header waits for the header of an attempt: the current one, or one of a race. It commits
// the stream to that, because a caller that has seen a header would notice another attempt.
// It does not keep a race from starting or from being won by another attempt.
func (s *Stream) Header() (metadata.MD, error) {
	if l := s.committed.Load(); l != nil {
		return l.Header()
	}
	for {
		l, final := s.ask()
		if final {
			return l.Header()
		}
		md, err := l.Header()
		switch {
		case err == nil && !s.headerless(l, md):
			if s.settleOn(l, len(md) > 0) {
				return md, nil
			}
		case !s.resolve(l):
			return md, err
		}
	}
}

// ask returns the attempt to ask for its header. It waits while none is open.
func (s *Stream) ask() (l *Lane, final bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for !s.final {
		switch s.turn {
		case racing:
			n := s.changes
			s.mu.Unlock()
			l := s.Layer.(Racer).Running()
			s.mu.Lock()
			if l != nil {
				return l, s.final && s.cur == l
			}
			if n != s.changes || s.final {
				continue
			}
		case replacing:
		default:
			return s.cur, false
		}
		s.changed.Wait()
	}
	return s.cur, true
}

// settleOn reports whether l, whose header was asked for, is the attempt to tell of. If
// there is one it commits to l.
func (s *Stream) settleOn(l *Lane, header bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.final || l.passed || s.turn == replacing:
		return s.cur == l && s.final
	case s.turn == racing && header:
		s.mu.Unlock()
		chosen := s.Layer.(Racer).Choose(l)
		s.mu.Lock()
		if chosen != l {
			return s.cur == l && s.final
		}
	case s.turn == racing:
		return true // No header, and still open: a connection that is not gRPC's.
	case s.cur != l:
		return false
	}
	if header {
		s.commitLocked(l)
	}
	return !header || s.cur == l
}

// SendMsg returns nil if the message was sent, or kept for an attempt that continues.
func (s *Stream) SendMsg(m any) error {
	if l := s.committed.Load(); l != nil {
		return s.send(l, m)
	}
	data, known := s.encode(m)
	l, direct := s.keep(m, data, known)
	data.Free()
	if direct {
		return s.send(l, m)
	}
	if l == nil {
		return nil // feed sends it.
	}
	err := l.SendMsg(m)
	if err == nil {
		return nil
	}
	if err == io.EOF {
		if s.resolve(l) {
			return nil
		}
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.commitNowLocked() // The client cannot send it, so no attempt can.
	if s.cur != l {
		return nil // But another one has the message, and tells.
	}
	l.cancel()
	return err
}

// send sends to the last attempt.
func (s *Stream) send(l *Lane, m any) error {
	if l.dead {
		return io.EOF
	}
	err := l.SendMsg(m)
	if err != nil && err != io.EOF {
		l.cancel() // As in RecvMsg, which the caller need not call any more.
	}
	return err
}

// encode encodes a message to be kept. known is false if that is not possible.
func (s *Stream) encode(m any) (data mem.BufferSlice, known bool) {
	if _, prepared := m.(*grpc.PreparedMsg); prepared || s.codec == nil || m == nil {
		return nil, false
	}
	data, err := s.codec.Marshal(m)
	return data, err == nil
}

// keep keeps a message for further attempts, and returns the attempt to send it to, nil if
// feed sends it. If the message cannot be kept, the stream commits, and direct is true:
// the message goes to the last attempt.
func (s *Stream) keep(m any, data mem.BufferSlice, known bool) (l *Lane, direct bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := s.committed.Load(); l != nil {
		return l, true
	}
	// Do not wait for a replay while the message fits: it may itself wait for the caller
	// to receive. After CloseSend gRPC refuses the message.
	if known && !s.closed && s.fitsLocked(m, data.Len()) {
		s.sent.add(data)
		s.signalLocked()
		if s.cur.live && !s.cur.passed {
			return s.cur, false
		}
		return nil, false
	}
	s.commitNowLocked()
	for s.committed.Load() == nil {
		s.changed.Wait()
	}
	return s.committed.Load(), true
}

// fitsLocked reports whether a message of n bytes may be kept, and counts it. Caller must
// hold s.mu.
func (s *Stream) fitsLocked(m any, n int) bool {
	if len(s.sent.bytes) == 0 && !s.sent.kind.Is(m) {
		s.sent.kind = message.TypeOf(m)
	}
	n += frame
	return s.sent.kind.Is(m) && len(s.sent.bytes)+n <= s.Limit && s.Total.take(n, s.Most)
}

// CloseSend closes the sending side of the attempts that were sent all that is kept. feed
// closes that of the others.
func (s *Stream) CloseSend() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	l, live := s.cur, s.cur.live && !s.cur.passed && !s.cur.dead
	s.signalLocked()
	s.mu.Unlock()
	if !live {
		return nil
	}
	return l.CloseSend()
}

// Context returns a context that lives as long as the stream, whichever attempt that
// becomes.
func (s *Stream) Context() context.Context {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.own == nil {
		if l := s.committed.Load(); l != nil {
			return l.Context()
		}
		s.own = &streamContext{stream: s}
		s.own.Context, s.own.cancel = context.WithCancel(s.Config.Context)
		if s.ended {
			s.own.cancel()
		}
	}
	return s.own
}

// A streamContext is the context of a stream that was not committed when it was asked for.
type streamContext struct {
	context.Context
	cancel context.CancelFunc
	stream *Stream
}

// Value finds what gRPC keeps in the context of a stream. That of the current attempt comes
// first, because the caller's context may be that of another stream, as in a proxy. What
// package context looks for is our own: it recognises it by the Done channel.
func (c *streamContext) Value(key any) any {
	own := c.Context.Value(key)
	if ctx, ok := own.(context.Context); ok && ctx.Done() == c.Done() {
		return own
	}
	return c.stream.current().Context().Value(key)
}

// Trailer returns the trailer of the current attempt.
func (s *Stream) Trailer() metadata.MD { return s.current().Trailer() }

func (s *Stream) current() *Lane {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cur
}

// Feed sends an attempt that is open what was kept, and what comes meanwhile. It returns
// at once if that may block.
func (s *Stream) Feed(l *Lane) {
	s.mu.Lock()
	n := len(s.sent.bytes)
	beside := l != s.cur && !s.closed
	s.signalLocked()
	s.mu.Unlock()
	if n > inline || beside {
		go s.feedApart(l, 0)
		return
	}
	s.feed(l, 0, n)
}

// feed sends an attempt what was kept from an offset on, until it has caught up and is the
// current one, or has ended. It leaves what is beyond another offset to a goroutine.
func (s *Stream) feed(l *Lane, from, to int) {
	returned := false
	defer func() {
		if !returned { // A panic.
			s.breakOff(l, "sending it again panicked")
		}
	}()
	s.feedFrom(l, from, to)
	returned = true
}

// feedApart is feed on a goroutine of its own. A panic there would end the program, and no
// caller could recover from it.
func (s *Stream) feedApart(l *Lane, from int) {
	defer func() {
		if p := recover(); p != nil {
			logger.Errorf("sending a message to another attempt panicked: %v\n%s", p, debug.Stack())
		}
	}()
	s.feed(l, from, math.MaxInt)
}

var logger = grpclog.Component("belfry")

// breakOff ends an attempt that cannot be sent what was kept.
func (s *Stream) breakOff(l *Lane, why string) {
	l.broken.Store(status.New(codes.Internal, "belfry: another attempt could not be sent a message: "+why))
	l.cancel()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.caughtUpLocked(l)
}

func (s *Stream) feedFrom(l *Lane, from, to int) {
	for {
		data, next, ok := s.next(l, from)
		if !ok {
			return
		}
		if from >= to {
			go s.feedApart(l, from)
			return
		}
		m, err := s.decode(data)
		if err != nil { // Though the first message was decoded: the attempt must not end well.
			s.breakOff(l, err.Error())
			return
		}
		if l.SendMsg(m) != nil { // RecvMsg returns how it has ended.
			s.mu.Lock()
			if s.committed.Load() == nil {
				l.dead = true
			}
			s.caughtUpLocked(l)
			s.mu.Unlock()
			return
		}
		from = next
	}
}

// next returns the message to send to l from an offset on, and the offset of the one after
// it. It waits for a message if another attempt is the current one. ok is false if feed
// has done its part.
func (s *Stream) next(l *Lane, from int) (data []byte, after int, ok bool) {
	s.mu.Lock()
	for {
		switch {
		case s.ended || l.passed || s.final && s.cur != l:
			s.mu.Unlock()
			return nil, 0, false
		case from < len(s.sent.bytes):
			defer s.mu.Unlock()
			data, after = s.sent.at(from)
			return data, after, true
		case s.closed:
			s.mu.Unlock()
			_ = l.CloseSend() // Before anybody may send to it directly.
			s.mu.Lock()
			s.caughtUpLocked(l)
			s.mu.Unlock()
			return nil, 0, false
		case s.cur == l:
			defer s.mu.Unlock()
			s.caughtUpLocked(l)
			return nil, 0, false
		}
		s.changed.Wait()
	}
}

// caughtUpLocked records that an attempt was sent all that is kept, or takes no more.
// Caller must hold s.mu.
func (s *Stream) caughtUpLocked(l *Lane) {
	l.live = true
	s.settleLocked()
	s.signalLocked()
}
