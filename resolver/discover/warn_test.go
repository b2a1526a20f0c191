// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/belfry-go/belfry"
	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc"
	"google.golang.org/grpc/attributes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/status"
)

// errorLog is what was logged as an error, which gRPC shows unless it is told
// otherwise.
var errorLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func init() {
	warnings := io.Discard
	if os.Getenv("GRPC_GO_LOG_SEVERITY_LEVEL") == "warning" {
		warnings = os.Stderr // of the child of a test; gRPC writes errors to it too
	}
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, warnings, errorWriter{}))
}

type errorWriter struct{}

func (errorWriter) Write(p []byte) (int, error) {
	errorLog.mu.Lock()
	defer errorLog.mu.Unlock()
	return errorLog.text.Write(p)
}

// forgetLogged makes logged count from now on.
func forgetLogged() {
	errorLog.mu.Lock()
	defer errorLog.mu.Unlock()
	errorLog.text.Reset()
}

// logged returns how many errors were logged that contain the text.
func logged(text string) int {
	errorLog.mu.Lock()
	defer errorLog.mu.Unlock()
	return strings.Count(errorLog.text.String(), text)
}

// noEqual is a value of a registry that is made again for every set.
type noEqual struct{ m map[string]string }

func TestAttributesThatNeverCompareAsEqualAreLoggedOnce(t *testing.T) {
	forgetLogged()
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		const text = `endpoint "unequal" compare as different although they hold the same`
		for range 5 {
			e := ep("1")
			e.Attributes = attributes.New("meta", &noEqual{map[string]string{"v": "1"}})
			src.send(discover.Insert("unequal", e), discover.Synced())
		}
		synctest.Wait()
		if got := logged(text); got != 1 {
			t.Errorf("logged %d times, want once", got)
		}
	})
}

func TestAttributesOfAddressesThatChangeAgainAndAgainAreLoggedOnce(t *testing.T) {
	forgetLogged()
	const text = `changed the attributes of the addresses of endpoint "restless"`
	set := func(src *script, i int, other string) {
		e := ep("1")
		e.Addresses[0].Attributes = attributes.New("version", i)
		src.send(discover.Insert("restless", e), ins("weighted", "2", discover.Weight(uint32(i+1))), ins("other", other), discover.Synced())
		synctest.Wait()
	}
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		for i := range 3 { // changes twice, and pauses
			set(src, i, "3")
		}
		for i := range 2 {
			set(src, 2, fmt.Sprint("4", i))
		}
		set(src, 3, "3")
		if got := logged(text); got != 0 {
			t.Errorf("logged %d times before the third change in a row, want never", got)
		}
		for i := 4; i < 10; i++ {
			set(src, i, "3")
		}
		if got := logged(text); got != 1 {
			t.Errorf("logged %d times, want once", got)
		}
	})
}

func TestEndpointsThatDifferInTheServerNameOnlyAreLoggedOnce(t *testing.T) {
	forgetLogged()
	bridged(t, nil, func(t *testing.T, src *script, cc *fakeConn, _ resolver.Resolver) {
		const text = `endpoints "k1" and "k2" have the same address, 192.0.2.1:443, and differ in the server name only (one.internal, two.internal)`
		src.send(
			ins("k1", "192.0.2.1:443", discover.ServerName("one.internal")),
			ins("k2", "192.0.2.1:443", discover.ServerName("two.internal")),
			ins("k3", "192.0.2.1:443", discover.ServerName("one.internal")), discover.Synced())
		src.send(ins("k2", "192.0.2.1:443", discover.ServerName("two.internal"), discover.Weight(2)), discover.Synced())
		synctest.Wait()
		wantSets(t, cc, "k1=192.0.2.1:443")
		if got := logged(text); got != 1 {
			t.Errorf("logged %d times, want once", got)
		}
	})
}

func TestServerNameIsThatOfAllAddresses(t *testing.T) {
	for _, e := range []resolver.Endpoint{
		ep("a:1", discover.Address("b:1"), discover.ServerName("orders.internal")),
		ep("a:1", discover.ServerName("orders.internal"), discover.Address("b:1")),
	} {
		for _, a := range e.Addresses {
			if a.ServerName != "orders.internal" {
				t.Errorf("server name of %s is %q, want orders.internal", a.Addr, a.ServerName)
			}
		}
	}
	_, err := discover.Endpoint("a:1", discover.ServerName(""))
	wantError(t, err, "server name is empty")
}

func TestAddressesThatCannotBeDialledAreReported(t *testing.T) {
	for _, tt := range []struct{ addr, want string }{
		{"10.0.0.1", `has no port: write "10.0.0.1:443"`},
		{"orders", `has no port: write "orders:443"`},
		{"::1", `has no port: write "[::1]:443"`},
		{"[::1]", `has no port: write "[::1]:443"`},
		{"fe80::1:2:3:4:443", `has no port: write "[fe80::1:2:3:4:443]:443"`}, // it is an address
		{"1:2:3:4:5:6:7:8:443", `write an IPv6 address in brackets, "[1:2:3:4:5:6:7:8]:443"`},
		{"http://10.0.0.1:80", `has a scheme: write "10.0.0.1:80"`},
		{"dns:///orders:80", `has a scheme: write "orders:80"`},
		{"dns://8.8.8.8/orders:80", `has a scheme: write "orders:80"`},
		{"10.0.0.1:99999", `port "99999": must be from 1 to 65535`},
		{"10.0.0.1:0", `port "0": must be from 1 to 65535`},
		{"10.0.0.1:", `port "": must be from 1 to 65535`},
		{"10.0.0.1:-1", `port "-1": must be from 1 to 65535`},
		{"10.0.0.1:44_3", `port "44_3": must be from 1 to 65535`},
		{"a:b:c", `is not a host and port: write "host:443"`},
		{"unix-abstract:orders", `write "unix:@orders"`},
		{"10.0.0.1:443", ""},
		{"[::1]:443", ""},
		{"[fe80::1%eth0]:443", ""},
		{"orders.internal:443", ""},
		{":443", ""},
		{"10.0.0.1:https", ""},
		{"unix:orders.sock", ""},
		{"unix:///run/orders.sock", ""},
		{"unix:@orders", ""},
	} {
		synctest.Test(t, func(t *testing.T) {
			cc := &fakeConn{}
			buildWith(t, cc, must(discover.List(ep(tt.addr, discover.Key("k")))), resolver.BuildOptions{})
			synctest.Wait()
			if tt.want == "" {
				wantErrors(t, cc)
				wantSets(t, cc, "k="+tt.addr)
				return
			}
			wantErrors(t, cc, `ignored Insert("k"): address "`+tt.addr+`"`)
			wantErrors(t, cc, tt.want)
			wantSets(t, cc) // An empty set would hide the reason.

			cc = &fakeConn{} // What has a dialer may dial it.
			build(t, cc, must(discover.List(ep(tt.addr, discover.Key("k")))))
			synctest.Wait()
			wantErrors(t, cc)
		})
	}
}

// A set that has become unusable does not replace one that is in use.
func TestSetOfUnusableEndpointsIsNotPublished(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cc, src := &fakeConn{}, &script{}
		buildWith(t, cc, src, resolver.BuildOptions{}, exact())
		synctest.Wait()
		src.send(ins("a", "a:1"), discover.Synced())
		src.fail("down")
		time.Sleep(1100 * time.Millisecond)
		src.send(ins("b", "b"), ins("c", "c"), discover.Synced())
		time.Sleep(time.Minute)
		wantSets(t, cc, "a=a:1")
		wantErrors(t, cc, "down", `ignored Insert("b"): address "b" has no port: write "b:443" (and 1 more faults)`)
		src.send(ins("c", "c:1"))
		time.Sleep(time.Second)
		wantSets(t, cc, "a=a:1", "c=c:1")
		src.send(ins("a", "a:1"), discover.Remove("c"), discover.Remove("a"), ins("d", "d"))
		time.Sleep(time.Second)
		wantSets(t, cc, "a=a:1", "c=c:1")
		src.send(discover.Remove("b"), discover.Remove("d"))
		time.Sleep(time.Second)
		wantSets(t, cc, "a=a:1", "c=c:1", "-")
	})
}

func TestChannelWithoutOneSourceSaysWhatToWrite(t *testing.T) {
	list := must(discover.List(ep("192.0.2.1:443")))
	var none *script
	for _, tt := range []struct {
		name string
		opts []grpc.DialOption
		want string
	}{
		{"no source", nil, "add discover.WithSource(src) to the options of grpc.NewClient"},
		{"two sources", []grpc.DialOption{discover.WithSource(list), discover.WithSource(list)}, "has 2 sources: use WithSource once, and discover.Merge to combine sources"},
		{"nil source", []grpc.DialOption{discover.WithSource(nil)}, "WithSource: the source is nil"},
		{"nil pointer", []grpc.DialOption{discover.WithSource(none)}, "WithSource: the source is nil"},
		{"bad option", []grpc.DialOption{discover.WithSource(list, discover.WithSyncTimeout(-1))}, "WithSyncTimeout: -1ns: must be positive"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(testContext(t))
			defer cancel()
			conn := dialTarget(t, "belfry:///orders", append(tt.opts, grpc.WithUnaryInterceptor(
				func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoker grpc.UnaryInvoker, opts ...grpc.CallOption) error {
					err := invoker(ctx, method, req, reply, cc, opts...)
					if strings.Contains(method, "WaitReady") {
						cancel() // It knows enough.
					}
					return err
				}))...)
			_, err := call(testContext(t), conn)
			if status.Code(err) != codes.Unavailable {
				t.Errorf("code = %v, want Unavailable", status.Code(err))
			}
			wantError(t, err, tt.want)
			wantError(t, belfry.WaitReady(ctx, conn), tt.want)
		})
	}
}

// A source that does not stop must not hold up the calls of its channel, which
// wait for the lock that gRPC holds when it goes idle.
func TestCallsDoNotWaitForASourceThatDoesNotStop(t *testing.T) {
	s := startServer(t)
	release := make(chan struct{})
	defer close(release)
	stuck := make(chan struct{}, 2)
	src := sourceFunc(func(ctx context.Context, yield func(discover.Change, error) bool) {
		yield(discover.Batch(ins("a", s.addr), discover.Synced()), nil)
		<-ctx.Done()
		stuck <- struct{}{}
		<-release
	})
	conn := dial(t, src, grpc.WithIdleTimeout(20*time.Millisecond))
	ctx := testContext(t)
	for range 3 {
		if _, err := call(ctx, conn); err != nil {
			t.Fatalf("call = %v", err)
		}
		for st := conn.GetState(); st != connectivity.Idle; st = conn.GetState() {
			if !conn.WaitForStateChange(ctx, st) {
				t.Fatalf("state = %v, want IDLE", st)
			}
		}
	}
	<-stuck
}
