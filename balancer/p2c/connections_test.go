// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"google.golang.org/grpc/balancer"
)

// frame is an HTTP/2 frame.
func frame(kind, flags byte, payload ...byte) []byte {
	f := binary.BigEndian.AppendUint32(nil, uint32(len(payload))<<8|uint32(kind))
	f = append(f, flags, 0, 0, 0, 0)
	return append(f, payload...)
}

func setting(id uint16, v uint32) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint16(nil, id), v)
}

func TestConnectionsReadSettings(t *testing.T) {
	rnd := newRand(t)
	in := func(sent ...[]byte) (got []int64) {
		c := &connections{}
		w := newTransport(&connection{owner: c}, nil)
		last := w.most.Load()
		for _, f := range sent {
			for len(f) > 0 { // in pieces of any size
				n := 1 + rnd.IntN(len(f))
				w.see(f[:n])
				f = f[n:]
			}
			if most := w.most.Load(); most != last {
				got, last = append(got, most), most
			}
		}
		return got
	}
	for range 100 {
		data := make([]byte, rnd.IntN(100))
		for i := range data {
			data[i] = byte(rand.Uint32())
		}
		got := in(
			frame(4, 0, append(setting(4, 65535), append(setting(3, 7), setting(5, 20000)...)...)...),
			frame(4, 1),          // an acknowledgement
			frame(0, 0, data...), // another frame, whatever it holds
			frame(4, 0),
			frame(4, 0, setting(1, 100)...),
			frame(4, 0, append(setting(3, 9), setting(3, 11)...)...), // the last one counts
			frame(4, 0, 0, 3, 0), // not whole
			frame(4, 0, setting(3, 0)...),
		)
		if len(got) != 3 || got[0] != 7 || got[1] != 11 || got[2] != 0 {
			t.Fatalf("streams that the server allows became %v, want 7, 11 and 0", got)
		}
	}
}

// The number of free streams is that of the joined connections without the reserved ones,
// whatever happens between a reservation and the end of its call.
func TestConnectionsCountFreeStreams(t *testing.T) {
	rnd := newRand(t)
	for range 200 {
		c := &connections{ep: &endpoint{policy: &policy{}}}
		c.full.Store(true) // so that take does not call grow
		var ks []*connection
		var transports []*transport
		for range 3 {
			k := &connection{owner: c}
			w := newTransport(k, nil)
			w.most.Store(2)
			ks, transports = append(ks, k), append(transports, w)
		}
		var links []link
		for i, k := range ks {
			links = append(links, link{k, transports[i], fixedPicker{}})
		}
		p := &linksPicker{c, links}
		reserved := 0
		var dones []func(balancer.DoneInfo)
		for step := range 100 {
			k := rnd.IntN(3)
			switch rnd.IntN(6) {
			case 0:
				ks[k].joined = transports[k]
				ks[k].joinLocked()
			case 1:
				ks[k].partLocked()
			case 2:
				if c.take() {
					reserved++
				}
			case 3:
				if reserved == 0 {
					break
				}
				reserved--
				r, err := p.Pick(balancer.PickInfo{})
				if err != nil {
					c.free.Add(1) // as untake does
				} else {
					dones = append(dones, r.Done)
				}
			case 4:
				if n := len(dones); n > 0 {
					dones[n-1](balancer.DoneInfo{})
					dones = dones[:n-1]
				}
			case 5:
				most := rnd.Int64N(4)
				more := most - transports[k].most.Swap(most)
				if transports[k].word.Load()&apart == 0 {
					c.free.Add(more)
				}
			}
			want := int64(-reserved)
			for i, k := range ks {
				if k.joined != nil {
					want += transports[i].most.Load() - transports[i].open()
				}
			}
			if got := c.free.Load(); got != want {
				t.Fatalf("step %d: %d streams are free, want %d", step, got, want)
			}
		}
	}
}

type fixedPicker struct{}

func (fixedPicker) Pick(balancer.PickInfo) (balancer.PickResult, error) {
	return balancer.PickResult{}, nil
}

// Without the setting, picks do not look for free streams.
func TestConnectionsOffByDefault(t *testing.T) {
	bubble(t, func(t *testing.T, w *world) {
		for _, config := range []string{`{}`, `{"maxConnectionsPerSubchannel":1}`} {
			w.start(config, some("a")...)
			if c := w.p.picker.config; c.limited() {
				t.Errorf("with %s picks look for free streams", config)
			}
			for _, ep := range w.p.endpoints.All() {
				if ep.connections != nil {
					t.Errorf("with %s an endpoint may have several connections", config)
				}
			}
		}
	})
}
