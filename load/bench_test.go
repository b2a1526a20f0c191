// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"sync/atomic"
	"testing"
)

// BenchmarkMeter measures what one pick asks of one endpoint: a Load, or a Start and a
// Finish. Parallel goroutines share one endpoint, which is the worst case. Time advances
// by 1 us an operation.
func BenchmarkMeter(b *testing.B) {
	for _, kind := range metrics {
		b.Run(kind.name, func(b *testing.B) {
			for _, op := range []struct {
				name string
				do   func(*counted, Instant) float64
			}{
				{"Load", func(m *counted, now Instant) float64 { return m.Load(now) }},
				{"Start+Finish", func(m *counted, now Instant) float64 {
					m.Finish(now+1000, Sample{Ticket: m.Start(now)})
					return 0
				}},
			} {
				metric, err := kind.make()
				if err != nil {
					b.Fatal(err)
				}
				m := newMeter(metric)
				for i := range Instant(1000) {
					m.Load(i * 1000)
					run(m, i*1000, 1000, Completed)
				}
				var clock atomic.Int64
				clock.Store(1_000_000)
				b.Run(op.name+"/serial", func(b *testing.B) {
					b.ReportAllocs()
					now := Instant(clock.Load())
					var sum float64
					for b.Loop() {
						now += 1000
						sum += op.do(m, now)
					}
					clock.Store(int64(now))
					sink = sum
				})
				b.Run(op.name+"/parallel", func(b *testing.B) {
					b.ReportAllocs()
					b.RunParallel(func(pb *testing.PB) {
						now := Instant(clock.Load())
						var sum float64
						for pb.Next() {
							now += 1000
							sum += op.do(m, now)
						}
						if sum < 0 {
							b.Error("a load was negative")
						}
					})
				})
			}
		})
	}
}

// sink keeps results from being optimised away.
var sink float64
