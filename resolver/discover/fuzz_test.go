// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/resolver"
)

// The pauses of the fuzz test. Their odd nanoseconds keep a pause, or a sum of
// them, from ending at the very moment when the bridge acts.
var pauses = []time.Duration{
	3*time.Millisecond + 1,
	100*time.Millisecond + 3,
	1300*time.Millisecond + 5,
	20*time.Second + 7,
}

// FuzzBridge plays random histories of a source (inserts, removes, syncs,
// errors that end a watch and errors that do not, ends, pauses, channels that go
// idle and come back) to a bridge and to a model of it that has neither
// goroutines nor channels. Every set and error that is published must be the
// model's, in its order.
func FuzzBridge(f *testing.F) {
	f.Add([]byte{0x00, 0x10, 0x03, 0x07, 0x02, 0x07})
	f.Add([]byte{0x00, 0x03, 0x05, 0x27, 0x10, 0x03, 0x07})             // a failure, and replay
	f.Add([]byte{0x00, 0x37, 0x10, 0x17, 0x06, 0x02})                   // no Synced, then the end
	f.Add([]byte{0x37, 0x00, 0x37, 0x05, 0x27, 0x10, 0x37})             // nothing, for too long
	f.Add([]byte{0x03, 0x00, 0x07, 0x10, 0x07, 0x20, 0x07, 0x30, 0x17}) // coalescing
	f.Add([]byte{0x00, 0x03, 0x08, 0x10, 0x03, 0x04, 0x08, 0x06, 0x05}) // idle and back
	rng := rand.New(rand.NewPCG(1, 2))
	for range 40 {
		ops := make([]byte, 60)
		for i := range ops {
			ops[i] = byte(rng.Uint32())
		}
		f.Add(ops)
	}
	f.Fuzz(func(t *testing.T, ops []byte) {
		ops = ops[:min(len(ops), 150)] // the nanoseconds of the pauses stay below a microsecond
		synctest.Test(t, func(t *testing.T) { playHistory(t, ops) })
	})
}

func playHistory(t *testing.T, ops []byte) {
	src := &script{}
	cc, m := &fakeConn{}, newModel()
	r := build(t, cc, src, exact())
	synctest.Wait()
	check := func(i int) {
		synctest.Wait()
		if got := cc.calls(); !slices.Equal(got, m.log) {
			t.Fatalf("after %d of the operations %x the channel was told\n%q, want\n%q", i, ops, got, m.log)
		}
	}
	for i, op := range ops {
		arg := int(op >> 4)
		switch op & 15 {
		case 0, 1, 9, 10:
			key, addr, weight := fmt.Sprint("k", arg%4), fmt.Sprint("a", (arg+int(op&3))%5), uint32(1+op&1)
			src.send(ins(key, addr, discover.Weight(weight)))
			m.insert(key, addr, weight)
		case 2, 11:
			key := fmt.Sprint("k", arg%4)
			src.send(discover.Remove(key))
			m.remove(key)
		case 3, 12:
			src.send(discover.Synced())
			m.sync()
		case 4:
			src.do(step{err: fmt.Errorf("hiccup %d", i)})
			m.err(fmt.Sprintf("hiccup %d", i))
		case 5:
			src.fail(fmt.Sprintf("failure %d", i))
			m.fail(fmt.Sprintf("failure %d", i))
		case 6:
			if arg > 1 { // nothing comes after it: not too many
				src.end()
				m.end()
				break
			}
			src.send(discover.Final())
			m.final()
		case 13:
			key, addr := fmt.Sprint("k", arg%4), fmt.Sprint("a", arg%5)
			src.send(discover.Batch(ins(key, addr, discover.Weight(1)), discover.Remove("k0"), ins("k1", "a1", discover.Weight(1))))
			m.insert(key, addr, 1)
			m.remove("k0")
			m.insert("k1", "a1", 1)
		case 8:
			if arg > 7 {
				continue
			}
			check(i)
			r.Close()
			cc, m = &fakeConn{}, newModel()
			r = build(t, cc, src, exact())
			synctest.Wait()
		default:
			d := pauses[arg%len(pauses)]
			time.Sleep(d)
			m.sleep(d)
		}
		check(i + 1)
	}
	d := pauses[3]
	time.Sleep(d)
	m.sleep(d)
	check(len(ops))
}

// model says what a bridge with default options and the exact backoff does.
type model struct {
	now time.Duration
	log []string

	current, next map[string]resolver.Endpoint // nil: there is none

	running    bool
	lastErr    bool // the last thing yielded was an error
	told       bool // an error has come since the watch began
	synced     bool // the running watch was
	failures   int
	restartAt  time.Duration
	began      time.Duration
	syncBy     time.Duration
	dirty      bool
	dirtySince time.Duration
	flushAt    time.Duration
	published  bool
	last       string
	reportAt   time.Duration // no error is reported before
	held       []string
}

const never = time.Duration(1<<63 - 1)

func newModel() *model {
	m := &model{restartAt: never, flushAt: never}
	m.start()
	return m
}

func (m *model) start() {
	m.running, m.lastErr, m.told, m.synced, m.restartAt = true, false, false, false, never
	m.next, m.began, m.syncBy = map[string]resolver.Endpoint{}, m.now, m.now+15*time.Second
}

// change applies f, which reports whether it has changed the set.
func (m *model) change(f func(set map[string]resolver.Endpoint) bool) {
	if !m.running {
		return
	}
	m.lastErr = false
	if m.next != nil {
		f(m.next)
		return
	}
	m.dirty = f(m.current) || m.dirty
	m.notQuiet()
}

// notQuiet puts off the next update.
func (m *model) notQuiet() {
	if !m.dirty {
		return
	}
	if m.flushAt == never {
		m.dirtySince = m.now
	}
	m.flushAt = min(m.now+5*time.Millisecond, m.dirtySince+50*time.Millisecond)
}

func (m *model) insert(key, addr string, weight uint32) {
	m.change(func(set map[string]resolver.Endpoint) bool {
		old, known := set[key]
		set[key] = discover.SetKey(ep(addr, discover.Weight(weight)), key)
		return !known || old.Addresses[0].Addr != addr || discover.WeightOf(old) != weight
	})
}

func (m *model) remove(key string) {
	m.change(func(set map[string]resolver.Endpoint) bool {
		_, known := set[key]
		delete(set, key)
		return known
	})
}

func (m *model) promote() {
	if m.next != nil {
		m.current, m.next = m.next, nil
	}
	m.flush()
}

func (m *model) sync() {
	if m.running {
		m.lastErr, m.synced = false, true
		m.promote()
	}
}

func (m *model) final() {
	m.sync()
	m.running = false
}

func (m *model) err(msg string) {
	if m.running {
		m.lastErr, m.told = true, true
		m.report(msg)
		m.notQuiet()
	}
}

func (m *model) report(msg string) {
	if m.now < m.reportAt {
		m.held = append(m.held, msg)
		return
	}
	m.reportAt = m.now + time.Second
	m.log = append(m.log, "error: discover: watching belfry:///orders: "+msg)
}

func (m *model) fail(msg string) {
	m.err(msg)
	m.end()
}

func (m *model) end() {
	if !m.running {
		return
	}
	if !m.lastErr {
		m.err("the source ended without an error and without Final; watching it again")
	}
	m.running, m.next = false, nil
	if m.synced || m.now-m.began >= 8*time.Second {
		m.failures = 0
	}
	m.restartAt = m.now + min(time.Second<<m.failures, 8*time.Second)
	m.failures = min(m.failures+1, 3)
}

func (m *model) flush() {
	m.flushAt, m.dirty = never, false
	if m.current == nil {
		return
	}
	var keys []string
	for k := range m.current {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	var state resolver.State
	taken := map[string]bool{}
	for _, k := range keys {
		if addr := m.current[k].Addresses[0].Addr; !taken[addr] {
			taken[addr] = true
			state.Endpoints = append(state.Endpoints, m.current[k])
		}
	}
	if s := show(state); !m.published || s != m.last {
		m.published, m.last = true, s
		m.log = append(m.log, s)
	}
}

func (m *model) sleep(d time.Duration) {
	for end := m.now + d; ; {
		deadline, reportAt := never, never
		if m.next != nil {
			deadline = m.syncBy
		}
		if len(m.held) > 0 {
			reportAt = m.reportAt
		}
		at := min(m.restartAt, m.flushAt, deadline, reportAt)
		if at > end {
			m.now = end
			return
		}
		m.now = at
		switch at {
		case reportAt:
			msg := m.held[len(m.held)-1]
			if n := len(m.held) - 1; n > 0 {
				msg += fmt.Sprintf(" (and %d more errors)", n)
			}
			m.held = nil
			m.report(msg)
		case m.flushAt:
			m.flush()
		case m.restartAt:
			m.start()
		default:
			switch {
			case m.current != nil:
				m.report(fmt.Sprintf("the source has failed, and its new watch has not said Synced within 15s; the last set, of %d endpoints, stays (a source that never says Synced is to be wrapped in Settle)", len(m.current)))
				m.syncBy = never
			case len(m.next) > 0:
				m.promote()
			default:
				m.syncBy = at + 15*time.Second
				if !m.told {
					m.told = true
					m.report("the source has delivered no endpoints within 15s")
				}
			}
		}
	}
}
