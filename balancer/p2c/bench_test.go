// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	_ "google.golang.org/grpc/balancer/leastrequest"
	"google.golang.org/grpc/balancer/roundrobin"
	"google.golang.org/grpc/balancer/weightedroundrobin"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/test/lbtest"
)

// subject is a policy in a benchmark.
type subject struct{ name, policy, config string }

var subjects = []subject{
	{"expectedLatency", Name, `{}`},
	{"expectedLatency-2", Name, `{"choiceCount":2,"memory":0}`},
	{"expectedLatency-neverAside", Name, `{"failureAccrual":{"failures":0,"successRate":0}}`},
	{"peakEwma", Name, `{"load":{"peakEwma":{}}}`},
	{"pendingRequests", Name, `{"load":{"pendingRequests":{}}}`},
	{"constant", Name, `{"load":{"constant":{}}}`},
	{"pendingRequests-fixed", Name, `{"load":{"pendingRequests":{}},"endpointLimit":{"fixed":100}}`},
	{"pendingRequests-auto", Name, `{"load":{"pendingRequests":{}},"endpointLimit":{"auto":{}}}`},
	{"expectedLatency-connections", Name, `{"maxConnectionsPerSubchannel":2}`},
}

var peers = []subject{
	{"grpc-round_robin", roundrobin.Name, `{}`},
	{"grpc-least_request", "least_request_experimental", `{"choiceCount":2}`},
	{"grpc-weighted_round_robin", weightedroundrobin.Name, `{}`},
}

// endpoints returns n endpoints of one address each.
func endpoints(n int) []resolver.Endpoint { return lbtest.Endpoints(n) }

// start builds the policy and brings n endpoints to READY.
func (s subject) start(tb testing.TB, n int) (*lbtest.Channel, balancer.Balancer) {
	tb.Helper()
	state, err := lbtest.State(s.policy, s.config, endpoints(n))
	if err != nil {
		tb.Fatal(err)
	}
	cc, b, err := lbtest.Start(s.policy, state)
	if err != nil {
		tb.Fatal(err)
	}
	return cc, b
}

// BenchmarkPick measures Pick and Done. The floor is what any policy of this kind needs:
// two readings of the clock, and a random number for each choice.
func BenchmarkPick(b *testing.B) {
	for _, choices := range []int{2, 8} {
		b.Run(fmt.Sprintf("floor-%d", choices), func(b *testing.B) {
			start := time.Now()
			b.Run("serial", func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					floor(start, choices)
				}
			})
			b.Run("parallel", func(b *testing.B) {
				b.ReportAllocs()
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						floor(start, choices)
					}
				})
			})
		})
	}
	for _, s := range append(subjects[:len(subjects):len(subjects)], peers...) {
		for _, n := range []int{10, 100, 1000, 10000} {
			if s.policy != Name && n > 1000 {
				continue // gRPC's own policies need minutes until all are READY
			}
			b.Run(fmt.Sprintf("%s/n=%d", s.name, n), func(b *testing.B) {
				cc, lb := s.start(b, n)
				defer lb.Close()
				state, _ := cc.State()
				info := balancer.PickInfo{FullMethodName: "/belfry.testing.v1.TestService/Unary", Ctx: context.Background()}
				done := balancer.DoneInfo{BytesSent: true, BytesReceived: true}
				one := func() {
					r, err := state.Picker.Pick(info)
					if err != nil {
						b.Fatal(err)
					}
					if r.Done != nil {
						r.Done(done)
					}
				}
				for range 10 * n {
					one()
				}
				b.Run("serial", func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						one()
					}
				})
				b.Run("parallel", func(b *testing.B) {
					b.ReportAllocs()
					b.RunParallel(func(pb *testing.PB) {
						for pb.Next() {
							one()
						}
					})
				})
			})
		}
	}
}

var sink uint64

func floor(start time.Time, choices int) {
	picked := time.Since(start)
	r := random(rand.Uint64())
	var sum uint64
	for range choices {
		sum += uint64(r.below(1000))
	}
	done := time.Since(start)
	if sum == uint64(picked) && picked == done {
		sink++
	}
}

// BenchmarkReady measures the time from a resolver update with n endpoints until the last
// of them is READY.
func BenchmarkReady(b *testing.B) {
	for _, s := range append([]subject{subjects[0]}, peers...) {
		for _, n := range []int{100, 1000, 10000} {
			if s.policy != Name && n > 1000 {
				continue
			}
			b.Run(fmt.Sprintf("%s/n=%d", s.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					_, lb := s.start(b, n)
					b.StopTimer()
					lb.Close()
					b.StartTimer()
				}
			})
		}
	}
}

// BenchmarkUpdate measures a resolver update that changes the weight of one endpoint of n.
// One resolver keeps the rest of its list (kept), as package discover does. The other makes
// the whole list again (made).
func BenchmarkUpdate(b *testing.B) {
	for _, n := range []int{100, 1000, 10000} {
		kept, made := endpoints(n), endpoints(n)
		for name, other := range map[string][]resolver.Endpoint{"kept": slices.Clone(kept), "made": made} {
			b.Run(fmt.Sprintf("%s/n=%d", name, n), func(b *testing.B) {
				s := subjects[0]
				_, lb := s.start(b, n)
				defer lb.Close()
				config := must(parseConfig(json.RawMessage(s.config)))
				other[n/2] = weighted(other[n/2].Addresses[0].Addr, 2)
				lists := [][]resolver.Endpoint{kept, other}
				b.ReportAllocs()
				for i := 0; b.Loop(); i++ {
					must(0, lb.UpdateClientConnState(balancer.ClientConnState{
						ResolverState: resolver.State{Endpoints: lists[i%2]}, BalancerConfig: config,
					}))
				}
			})
		}
	}
}

// BenchmarkSnapshot measures a snapshot of a policy with n endpoints.
func BenchmarkSnapshot(b *testing.B) {
	for _, n := range []int{100, 10000} {
		b.Run(fmt.Sprintf("n=%d", n), func(b *testing.B) {
			_, lb := subjects[0].start(b, n)
			defer lb.Close()
			b.ReportAllocs()
			for b.Loop() {
				lb.(*policy).snapshot()
			}
		})
	}
}
