// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/resolver"
)

// BenchmarkBridge measures what a channel's resolver spends on a set of n
// endpoints: on the first, and on one that differs from it in one endpoint.
func BenchmarkBridge(b *testing.B) {
	for _, n := range []int{100, 1000, 10000} {
		endpoints := make([]resolver.Endpoint, n)
		for i := range endpoints {
			endpoints[i] = discover.MustEndpoint(fmt.Sprintf("10.%d.%d.%d:443", i>>16, i>>8&255, i&255), discover.Weight(uint32(i+1)))
		}
		var inserts []discover.Change
		for _, ep := range endpoints {
			inserts = append(inserts, discover.Insert(ep.Addresses[0].Addr, ep))
		}
		src := must(discover.List(endpoints...))
		bd, err := discover.NewBuilder("belfry", func(resolver.Target) (discover.Source, error) { return src, nil })
		if err != nil {
			b.Fatal(err)
		}
		b.Run(fmt.Sprint("first/", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				updated := make(chan int)
				r, err := bd.Build(target("belfry:///orders"), notify{updated: updated}, resolver.BuildOptions{})
				if err != nil {
					b.Fatal(err)
				}
				if got := <-updated; got != n {
					b.Fatalf("%d endpoints, want %d", got, n)
				}
				r.Close()
			}
		})
		b.Run(fmt.Sprint("change/", n), func(b *testing.B) {
			b.ReportAllocs()
			updated, change := make(chan int), make(chan struct{})
			flip := sourceFunc(func(ctx context.Context, yield func(discover.Change, error) bool) {
				if !yield(discover.Batch(append(inserts, discover.Synced())...), nil) {
					return
				}
				for w := uint32(1); ; w++ {
					select {
					case <-ctx.Done():
						return
					case <-change:
					}
					if !yield(ins("it", "it:443", discover.Weight(w)), nil) || !yield(discover.Synced(), nil) {
						return
					}
				}
			})
			bd, err := discover.NewBuilder("belfry", func(resolver.Target) (discover.Source, error) { return flip, nil })
			if err != nil {
				b.Fatal(err)
			}
			r, err := bd.Build(target("belfry:///orders"), notify{updated: updated}, resolver.BuildOptions{})
			if err != nil {
				b.Fatal(err)
			}
			defer r.Close()
			<-updated
			for b.Loop() {
				change <- struct{}{}
				<-updated
			}
		})
	}
}

// notify is a channel that only says how many endpoints it got.
type notify struct {
	resolver.ClientConn
	updated chan int
}

func (c notify) UpdateState(s resolver.State) error {
	c.updated <- len(s.Endpoints)
	return nil
}
