// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/breaker"
	"github.com/belfry-go/belfry/interceptor/buffer"
	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/failfast"
	"github.com/belfry-go/belfry/interceptor/hedge"
	"github.com/belfry-go/belfry/interceptor/mapping"
	"github.com/belfry-go/belfry/interceptor/retry"
	"github.com/belfry-go/belfry/interceptor/throttle"
	"github.com/belfry-go/belfry/interceptor/timeout"
	"github.com/belfry-go/belfry/internal/test/race"
)

const method = "/s.S/M"

// wantRefused checks that err is a refusal of a layer.
func wantRefused(t *testing.T, what string, err error, layer string, reason interceptor.Reason) {
	t.Helper()
	r, ok := interceptor.AsRefusal(err)
	if !ok || r.Layer != layer || r.Reason != reason {
		t.Errorf("%s: error %v, want a refusal of %s with reason %s", what, err, layer, reason)
	}
}

func TestUpdateKeepsConcurrency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"name": "l", "concurrency": {"limit": 2}}`))
		l := s.Layer("l").(*concurrency.Layer)
		server := &fake{}
		errs := calls(t.Context(), s.Wrap(server), method, 5)
		synctest.Wait()
		if r, w := server.running(), l.Waiting(); r != 2 || w != 3 {
			t.Fatalf("under a limit of 2, of 5 calls %d run and %d wait, want 2 and 3", r, w)
		}
		update(t, s, all(`{"loadShed": {}}, {"name": "l", "concurrency": {"limit": 1, "maxWaiters": 10}}`))
		if s.Layer("l") != l || l.InUse() != 2 || l.Waiting() != 3 {
			t.Fatalf("after the update to 1, %d permits are in use and %d calls wait in the same layer (%v), want 2 and 3",
				l.InUse(), l.Waiting(), s.Layer("l") == l)
		}
		wantRefused(t, "a call under the shed that is new", s.Wrap(server).Invoke(t.Context(), method, nil, nil), "l", interceptor.ReasonConcurrency)
		server.end(nil)
		synctest.Wait()
		if r := server.running(); r != 1 {
			t.Errorf("when one of two calls has ended under a limit of 1, %d run, want 1", r)
		}
		update(t, s, all(`{"name": "l", "concurrency": {"limit": 4}}`))
		synctest.Wait()
		if r, w := server.running(), l.Waiting(); r != 4 || w != 0 {
			t.Errorf("after the update to 4, %d calls run and %d wait, want 4 and 0", r, w)
		}
		for range 4 {
			server.end(nil)
		}
		for range 5 {
			if err := <-errs; err != nil {
				t.Errorf("a call that was in the stack during the updates: %v", err)
			}
		}
		if err := s.Drain(t.Context()); err != nil {
			t.Errorf("Drain: %v", err)
		}
		if n := l.InUse(); n != 0 {
			t.Errorf("%d permits in use at rest, want 0", n)
		}
	})
}

func TestUpdateKeepsAlgorithm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"name": "l", "concurrency": {"aimd": {"initial": 100, "backoffRatio": 0.5}}}`))
		l := s.Layer("l").(*concurrency.Layer)
		server := &fake{}
		server.answer(status.Error(codes.Unavailable, ""))
		if err := s.Wrap(server).Invoke(t.Context(), method, nil, nil); err == nil {
			t.Fatal("a call that the server fails returned no error")
		}
		if got := l.Limit(); got != 50 {
			t.Fatalf("after a drop the limit is %d, want 50", got)
		}
		update(t, s, all(`{"name": "l", "concurrency": {"aimd": {"initial": 100, "backoffRatio": 0.9, "max": 200}}}`))
		if got := l.Limit(); got != 50 {
			t.Errorf("after the update the limit is %d, want 50 as before", got)
		}
	})
}

func TestUpdateKeepsRateLimit(t *testing.T) {
	for _, algorithm := range []string{`"burst": 10`, `"algorithm": "ALGORITHM_WINDOW"`} {
		synctest.Test(t, func(t *testing.T) {
			s := newStack(t, all(`{"loadShed": {}}, {"rateLimit": {"limit": 10, "per": "10s", `+algorithm+`}}`))
			server := &fake{}
			server.answer(nil)
			conn := s.Wrap(server)
			for i := range 10 {
				if err := conn.Invoke(t.Context(), method, nil, nil); err != nil {
					t.Fatalf("%s: call %d of 10: %v", algorithm, i, err)
				}
			}
			update(t, s, all(`{"loadShed": {}}, {"rateLimit": {"limit": 10, "per": "20s", `+algorithm+`}}`))
			wantRefused(t, algorithm+": the 11th call, after an update", conn.Invoke(t.Context(), method, nil, nil), "ratelimit", interceptor.ReasonRateLimit)
		})
	}
}

func TestBufferRefusesByPriority(t *testing.T) {
	byFunc := func(ctx context.Context, _ *interceptor.Admission) int {
		return interceptor.MetadataPriority("rank")(ctx, nil)
	}
	for _, field := range []string{`"priorityMetadata": "rank"`, `"priorityFunc": "byRank"`} {
		t.Run(field, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newStack(t, all(`{"loadShed": {}}, {"buffer": {"size": 1, `+field+`}}, {"concurrency": {"limit": 1, `+field+`}}`),
					WithPriorityFunc("byRank", byFunc))
				server := &fake{}
				conn := s.Wrap(server)
				runs := calls(t.Context(), conn, method, 1)
				synctest.Wait()
				low := calls(t.Context(), conn, method, 1)
				synctest.Wait()
				high := calls(metadata.AppendToOutgoingContext(t.Context(), "rank", "1"), conn, method, 1)
				wantRefused(t, "the call of the lower priority", <-low, "buffer", interceptor.ReasonQueueFull)
				server.end(nil)
				synctest.Wait()
				server.end(nil)
				for _, errs := range []chan error{runs, high} {
					if err := <-errs; err != nil {
						t.Errorf("a call: %v, want success", err)
					}
				}
			})
		})
	}
}

func TestUpdateKeepsBuffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"loadShed": {}}, {"name": "b", "buffer": {"size": 2}}, {"concurrency": {"limit": 1}}`))
		b := s.Layer("b").(*buffer.Layer)
		server := &fake{}
		conn := s.Wrap(server)
		errs := calls(t.Context(), conn, method, 3)
		synctest.Wait()
		wantRefused(t, "the 4th call", conn.Invoke(t.Context(), method, nil, nil), "b", interceptor.ReasonQueueFull)
		update(t, s, all(`{"loadShed": {}}, {"name": "b", "buffer": {"size": 3}}, {"concurrency": {"limit": 1}}`))
		if got := b.Waiting(); s.Layer("b") != b || got != 2 {
			t.Errorf("after the update %d calls wait in the same buffer (%v), want 2", got, s.Layer("b") == b)
		}
		more := calls(t.Context(), conn, method, 1)
		synctest.Wait()
		wantRefused(t, "the 5th call with 3 places", conn.Invoke(t.Context(), method, nil, nil), "b", interceptor.ReasonQueueFull)
		for range 4 {
			synctest.Wait()
			server.end(nil)
		}
		for range 3 {
			if err := <-errs; err != nil {
				t.Errorf("a call that waited: %v", err)
			}
		}
		if err := <-more; err != nil {
			t.Errorf("the call in the place that is new: %v", err)
		}
	})
}

func TestUpdateKeepsBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var changes []string
		s := newStack(t, all(`{"name": "b", "breaker": {"consecutiveFailures": 3, "openFor": "10s", "jitter": 0}}`),
			WithBreakerChange(func(layer string, c breaker.Change) {
				changes = append(changes, fmt.Sprint(layer, " ", c.From, " ", c.To))
			}))
		b := s.Layer("b").(*breaker.Layer)
		server := &fake{}
		server.answer(status.Error(codes.Unavailable, ""))
		conn := s.Wrap(server)
		for range 2 {
			conn.Invoke(t.Context(), method, nil, nil)
		}
		update(t, s, all(`{"name": "b", "breaker": {"consecutiveFailures": 3, "openFor": "20s", "jitter": 0}}`))
		conn.Invoke(t.Context(), method, nil, nil)
		if got := b.State(""); got != breaker.Open {
			t.Fatalf("after 2 failures, an update and 1 failure the circuit is %v, want open", got)
		}
		update(t, s, all(`{"name": "b", "breaker": {"consecutiveFailures": 5, "openFor": "30s", "jitter": 0}}`))
		wantRefused(t, "a call on the open circuit after an update", conn.Invoke(t.Context(), method, nil, nil), "b", interceptor.ReasonBreakerOpen)
		server.answer(nil)
		time.Sleep(20 * time.Second)
		if err := conn.Invoke(t.Context(), method, nil, nil); err != nil {
			t.Errorf("the probe: %v", err)
		}
		want := "[b closed open b open half-open b half-open closed]"
		if got := fmt.Sprint(changes); got != want {
			t.Errorf("changes %s, want %s", got, want)
		}
	})
}

func TestUpdateKeepsThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"name": "t", "throttle": {"minRequests": 1000}}`))
		l := s.Layer("t").(*throttle.Layer)
		server := &fake{}
		server.answer(status.Error(codes.Unavailable, ""))
		for range 100 {
			s.Wrap(server).Invoke(t.Context(), method, nil, nil)
		}
		update(t, s, all(`{"name": "t", "throttle": {"minRequests": 1, "maxRefused": 0.5}}`))
		if got := l.Stats(method); got.Requests != 100 || got.Accepts != 0 || got.Probability != 0.5 {
			t.Errorf("after the update Stats() = %+v, want 100 requests, 0 accepts, probability 0.5", got)
		}
	})
}

func TestUpdateKeepsFailFast(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"name": "f", "failFast": {"after": "1s"}}, {"name": "l", "concurrency": {"limit": 1}}`))
		server := &fake{}
		conn := s.Wrap(server)
		running := calls(t.Context(), conn, method, 1)
		synctest.Wait()
		wantRefused(t, "a call that waits for 1s", conn.Invoke(t.Context(), method, nil, nil), "f", interceptor.ReasonFailFast)
		update(t, s, all(`{"name": "f", "failFast": {"after": "5s"}}, {"name": "l", "concurrency": {"limit": 1}}`))
		if !s.Layer("f").(*failfast.Layer).Failing() {
			t.Errorf("after the update it does not fail any more")
		}
		begin := time.Now()
		wantRefused(t, "a call after the update", conn.Invoke(t.Context(), method, nil, nil), "f", interceptor.ReasonFailFast)
		if d := time.Since(begin); d != 0 {
			t.Errorf("it was refused after %v, want at once", d)
		}
		server.end(nil)
		<-running
	})
}

func TestUpdateKeepsBudgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		layers := `{"retry": {"allMethods": true, "maxAttempts": 100, "backoff": {"initial": "0.001s", "max": "0.001s"}}}`
		config := `{"budget": {"minPerSecond": %d}, "budgets": {"b": {"minPerSecond": 1}}, "methodConfig": [{"name": [{}], "layers": [` + layers + `]}]}`
		s := newStack(t, fmt.Sprintf(config, 3))
		server := &fake{}
		server.answer(status.Error(codes.Unavailable, ""))
		s.Wrap(server).Invoke(t.Context(), method, nil, nil)
		b, other := s.Budget(""), s.Budget("b")
		// 30 in reserve and 0.2 for the call.
		if got := b.Balance(); got != 0.2 {
			t.Fatalf("when the budget is spent Balance() = %v, want 0.2", got)
		}
		update(t, s, fmt.Sprintf(config, 4))
		if got := b.Balance(); s.Budget("") != b || got != 10.2 {
			t.Errorf("after the update Balance() = %v in the same budget (%v), want 10.2", got, s.Budget("") == b)
		}
		if s.Budget("b") != other || other.Balance() != 10 || s.Budget("c") != nil {
			t.Errorf("the budget b is not as before")
		}
	})
}

// late is a server that answers after a time.
type late struct {
	grpc.ClientConnInterface
	d time.Duration
}

func (l late) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	time.Sleep(l.d)
	return nil
}

func TestHedgeDelay(t *testing.T) {
	for delay, want := range map[string]time.Duration{`{}`: 0, `{"delay": "0s"}`: hedge.None, `{"delay": "0.010s"}`: 10 * time.Millisecond} {
		s := newStack(t, all(`{"name": "h", "hedge": `+delay+`}`))
		if got := s.Layer("h").(*hedge.Layer).Config().Delay; got != want {
			t.Errorf("%s: Config.Delay = %d, want %d", delay, got, want)
		}
	}
}

func TestUpdateKeepsLatencies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		config := `{"name": "t", "timeout": {"call": "%ds", "adaptive": {"min": "0.001s", "multiple": 2, "minSamples": 20}}}, {"name": "h", "hedge": {"allMethods": true, "maxExtraLoad": %v}}`
		s := newStack(t, all(fmt.Sprintf(config, 10, 0.05)))
		for range 20 {
			if err := s.Wrap(late{d: 100 * time.Millisecond}).Invoke(t.Context(), method, nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		update(t, s, all(fmt.Sprintf(config, 20, 0.1)))
		h := s.Layer("h").(*hedge.Layer)
		if d, ok := h.Delay(method); !ok || d < 100*time.Millisecond || d > 101*time.Millisecond {
			t.Errorf("after 20 calls of 100ms and an update Delay() = %v, %v, want 100ms to 101ms and true", d, ok)
		}
		// The least of 20 or the double of 100ms.
		if d := s.Layer("t").(*timeout.Layer).Timeout(method); d < 200*time.Millisecond || d > 202*time.Millisecond {
			t.Errorf("after 20 calls of 100ms and an update Timeout() = %v, want 200ms to 202ms", d)
		}
		// 20 calls have paid 0.0475 each, besides one a second for 10 s.
		if got := h.Budget().Balance(); got != 10.95 {
			t.Errorf("after 20 calls Balance() = %v, want 10.95", got)
		}
	})
}

// identities is a config of two entries and a shared layer.
const identities = `{"methodConfig": [
	{"name": [{"service": "a.A"}, {"service": "b.B"}], "layers": [
		{"concurrency": {"limit": 1}}, {"concurrency": {"limit": 2}}, {"name": "x", "concurrency": {"limit": 3}}, {"rateLimit": {"limit": 4}}, {"shared": "s"}]},
	{"name": [{}], "layers": [{"concurrency": {"limit": 5}}, {"shared": "s"}]}
], "sharedLayers": {"s": {"concurrency": {"limit": 6}}}}`

// values returns the layers of all entries.
func values(s *Stack) (v [][]interceptor.Layer) {
	for _, e := range s.built.Load().entries {
		var list []interceptor.Layer
		for _, l := range e.layers {
			list = append(list, l.value)
		}
		v = append(v, list)
	}
	return v
}

func TestUpdateTakesOver(t *testing.T) {
	const none = "none"
	for name, c := range map[string]struct {
		js   string
		want []string // For each layer, which of the old ones it is.
	}{
		"the same config": {identities, []string{"0.0", "0.1", "0.2", "0.3", "0.4", "1.0", "0.4"}},
		"another order": {`{"methodConfig": [
			{"name": [{}], "layers": [{"shared": "s"}, {"loadShed": {}}, {"concurrency": {"limit": 15}}]},
			{"name": [{"service": "b.B"}], "layers": [
				{"rateLimit": {"limit": 14}}, {"name": "x", "concurrency": {"limit": 13}}, {"concurrency": {"limit": 11}}, {"shared": "s"}, {"concurrency": {"limit": 12}}]}
			], "sharedLayers": {"s": {"concurrency": {"limit": 16}}}}`,
			[]string{"0.4", none, "1.0", "0.3", "0.2", "0.0", "0.4", "0.1"}},
		"other names, kinds and what cannot change": {`{"methodConfig": [
			{"name": [{"service": "a.A"}], "layers": [
				{"name": "y", "concurrency": {"limit": 1}}, {"name": "x", "rateLimit": {"limit": 3}}, {"rateLimit": {"limit": 4, "perMethod": true}}, {"shared": "s"}]}
			], "sharedLayers": {"s": {"rateLimit": {"limit": 6}}}}`,
			[]string{none, none, none, none}},
		"an entry that is split": {`{"methodConfig": [
			{"name": [{"service": "b.B"}], "layers": [{"concurrency": {"limit": 1}}]},
			{"name": [{"service": "a.A"}], "layers": [{"concurrency": {"limit": 1}}]}]}`,
			[]string{none, "0.0"}}, // The first name of before counts.
		"an entry that another one is put before": {`{"methodConfig": [
			{"name": [{"service": "c.C"}, {"service": "b.B"}], "layers": [{"name": "y", "concurrency": {"limit": 1}}]},
			{"name": [{"service": "a.A"}], "layers": [{"concurrency": {"limit": 1}}]}]}`,
			[]string{none, "0.0"}},
		"an entry whose first name finds nothing to take over": {`{"methodConfig": [
			{"name": [{"service": "a.A"}], "layers": [{"buffer": {"size": 1}}, {"name": "z", "concurrency": {"limit": 1}}]},
			{"name": [{"service": "c.C"}, {"service": "b.B"}], "layers": [{"concurrency": {"limit": 1}}]}]}`,
			[]string{none, none, "0.0"}},
		"an entry whose first name is new": {`{"methodConfig": [
			{"name": [{"service": "c.C"}, {}], "layers": [{"concurrency": {"limit": 1}}]}]}`,
			[]string{"1.0"}},
		"own instead of shared": {`{"methodConfig": [
			{"name": [{}], "layers": [{"concurrency": {"limit": 5}}, {"concurrency": {"limit": 6}}]}]}`,
			[]string{"1.0", none}},
	} {
		s := newStack(t, identities)
		which := map[interceptor.Layer]string{}
		for i, list := range values(s) {
			for j, l := range list {
				if which[l] == "" {
					which[l] = fmt.Sprintf("%d.%d", i, j)
				}
			}
		}
		update(t, s, c.js)
		var got []string
		for _, list := range values(s) {
			for _, l := range list {
				w := which[l]
				if w == "" {
					w = none
				}
				got = append(got, w)
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: the layers are %v of the old ones, want %v", name, got, c.want)
		}
	}
}

func TestSharedLayer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, `{"methodConfig": [
			{"name": [{"service": "a.A"}], "layers": [{"loadShed": {}}, {"shared": "global"}]},
			{"name": [{}], "layers": [{"loadShed": {}}, {"shared": "global"}]}
		], "sharedLayers": {"global": {"concurrency": {"limit": 2}}}}`)
		server := &fake{}
		conn := s.Wrap(server)
		a, b := calls(t.Context(), conn, "/a.A/M", 1), calls(t.Context(), conn, "/b.B/M", 1)
		synctest.Wait()
		wantRefused(t, "the third call of both entries", conn.Invoke(t.Context(), "/a.A/N", nil, nil), "global", interceptor.ReasonConcurrency)
		server.end(nil)
		server.end(nil)
		<-a
		<-b
	})
}

func TestUpdateSparesCallsInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"retry": {"allMethods": true, "maxAttempts": 2, "backoff": {"initial": "0.001s", "max": "0.001s"}}}`))
		server := &fake{}
		errs := calls(t.Context(), s.Wrap(server), method, 1)
		synctest.Wait()
		update(t, s, `{}`)
		if got := s.InFlight(); got != 1 {
			t.Errorf("InFlight() = %d after the update, want 1", got)
		}
		server.end(status.Error(codes.Unavailable, ""))
		time.Sleep(time.Second)
		if got := server.running(); got != 1 {
			t.Fatalf("the call that began under a retry was not repeated after its removal")
		}
		server.end(nil)
		if err := <-errs; err != nil {
			t.Errorf("the call: %v", err)
		}
		server.answer(status.Error(codes.Unavailable, "once"))
		if err := s.Wrap(server).Invoke(t.Context(), method, nil, nil); status.Code(err) != codes.Unavailable {
			t.Errorf("a call without layers: %v, want the server's error", err)
		}
		if err := s.Drain(t.Context()); err != nil {
			t.Errorf("Drain: %v", err)
		}
		wantRefused(t, "a call after Drain", s.Wrap(server).Invoke(t.Context(), method, nil, nil), "stack", interceptor.ReasonDrain)
	})
}

// A config that is refused at the very end, by the observer that it does not show.
func TestUpdateRefusedChangesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newStack(t, all(`{"name": "l", "concurrency": {"limit": 1}}, {"name": "a", "concurrency": {"aimd": {"initial": 100, "backoffRatio": 0.5}}}, {"name": "r", "rateLimit": {"limit": 50, "per": "3600s", "burst": 2}}`),
			WithObserver(&counter{}), WithLayer("second", interceptor.Observe(&counter{})))
		limit, learnt := s.Layer("l").(*concurrency.Layer), s.Layer("a").(*concurrency.Layer)
		server := &fake{}
		conn := s.Wrap(server)
		server.answer(status.Error(codes.Unavailable, ""))
		conn.Invoke(t.Context(), method, nil, nil)
		if got := learnt.Limit(); got != 50 {
			t.Fatalf("after a drop the limit is %d, want 50", got)
		}
		server.hold()
		ctx, cancel := context.WithCancel(t.Context())
		errs := calls(ctx, conn, method, 10)
		synctest.Wait()
		_, err := s.Update(parse(t, all(`{"name": "l", "concurrency": {"limit": 10}}, {"name": "a", "concurrency": {"aimd": {"min": 100}}}, {"name": "r", "rateLimit": {"limit": 1000}}, {"provided": "second"}`)))
		if e := (*Error)(nil); !errors.As(err, &e) || e.Field != "methodConfig[0].layers" {
			t.Fatalf("Update with a second observer: error %v, want an *Error of methodConfig[0].layers", err)
		}
		synctest.Wait()
		if r, w := server.running(), limit.Waiting(); r != 1 || w != 9 {
			t.Errorf("after an update that was refused %d calls run and %d wait, want 1 and 9", r, w)
		}
		if got := learnt.Limit(); got != 50 {
			t.Errorf("after an update that was refused the limit is %d, want 50 as it was learnt", got)
		}
		cancel()
		for range 10 {
			<-errs
		}
	})
}

// What a layer can be made with it can be changed to, if what is fixed is the same.
func TestUpdateAcceptsWhatNewAccepts(t *testing.T) {
	for _, layers := range [][]string{
		{`{"concurrency": {"limit": 1}}`, `{"concurrency": {}}`, `{"concurrency": {"auto": {"noDrains": true}}}`, `{"concurrency": {"aimd": {}}}`, `{"concurrency": {"gradient2": {}}}`, `{"concurrency": {"vegas": {}, "maxWait": "1s"}}`, `{"concurrency": {"limit": 2147483647, "discipline": "DISCIPLINE_CODEL", "maxWaiters": 1}}`},
		{`{"concurrency": {"limit": 1, "perMethod": true}}`, `{"concurrency": {"vegas": {}, "perMethod": true, "maxKeys": 7}}`},
		{`{"rateLimit": {"limit": 1}}`, `{"rateLimit": {"limit": 1000000, "per": "0.001s", "burst": 1000}}`, `{"rateLimit": {"limit": 1, "per": "31536000s"}}`},
		{`{"rateLimit": {"limit": 1, "algorithm": "ALGORITHM_WINDOW", "perMetadata": "k"}}`, `{"rateLimit": {"limit": 1000000, "per": "0.001s", "algorithm": "ALGORITHM_WINDOW", "perMetadata": "k", "maxKeys": 1}}`},
		{`{"timeout": {"idle": "1s"}}`, `{"timeout": {"call": "1s", "adaptive": {"min": "1s"}}}`, `{"timeout": {"lifetime": "1s", "firstResponse": "1s", "message": "1s"}}`},
		{`{"throttle": {}}`, `{"throttle": {"k": 1, "window": "1s", "maxRefused": 1, "minRequests": 1, "rejectCodes": ["UNKNOWN"]}}`},
		{`{"breaker": {}}`, `{"breaker": {"consecutiveFailures": 1}}`, `{"breaker": {"slowCall": "1s", "slowCallRatio": 1, "window": "86400s", "openFor": "0.001s", "jitter": 0}}`},
		{`{"retry": {}}`, `{"retry": {"allMethods": true, "maxAttempts": 100, "codes": ["UNKNOWN"], "backoff": {"initial": "10s", "jitter": "JITTER_NONE"}, "maxServerDelay": "100s"}}`},
		{`{"hedge": {}}`, `{"hedge": {"delay": "1s", "maxExtraLoad": 0.9, "methods": ["/a.A/"]}}`, `{"hedge": {"percentile": 0.5, "window": "1s", "maxAttempts": 10, "nonFatal": ["UNKNOWN"]}}`},
		{`{"failFast": {}}, {"concurrency": {"limit": 1}}`, `{"failFast": {"after": "100s"}}, {"concurrency": {"limit": 1}}`},
		{`{"buffer": {"size": 1}}, {"concurrency": {"limit": 1}}`, `{"buffer": {"size": 2147483647, "maxWait": "1s"}}, {"concurrency": {"limit": 1}}`},
	} {
		for _, from := range layers {
			for _, to := range layers {
				s := newStack(t, all(from))
				old := s.built.Load().entries[0].layers[0]
				b := &built{config: parse(t, all(to))}
				if err := b.build(&s.opts); err != nil {
					t.Fatal(err)
				}
				now := b.entries[0].layers[0]
				if !now.takeOver(old) {
					t.Errorf("%s does not take over from %s", to, from)
				} else if err := now.update(now.value); err != nil {
					t.Errorf("from %s to %s: %v", from, to, err)
				}
			}
		}
	}
}

func TestUpdateSaysWhatBegan(t *testing.T) {
	s := newStack(t, `{"budgets": {"b": {}}, "sharedLayers": {"s": {"concurrency": {"limit": 1}}}, "methodConfig": [
		{"name": [{}], "layers": [{"timeout": {"call": "1s"}}, {"retry": {}}, {"name": "old", "concurrency": {"limit": 1}}, {"rateLimit": {"limit": 1}}, {"shared": "s"}]}]}`)
	same := s.Config()
	if c, err := s.Update(same); err != nil || c.Began != nil || c.Ended != nil {
		t.Errorf("Update to the same config: %+v, %v, want no changes", c, err)
	}
	got := update(t, s, `{"budgets": {"c": {}}, "sharedLayers": {"s": {"concurrency": {"limit": 2}}, "t": {"breaker": {}}}, "methodConfig": [
		{"name": [{"service": "a.A"}]},
		{"name": [{}], "layers": [{"timeout": {"call": "2s"}}, {"retry": {"budget": "c"}}, {"name": "new", "concurrency": {"limit": 1}}, {"rateLimit": {"limit": 1, "algorithm": "ALGORITHM_WINDOW"}}, {"shared": "t"}]}]}`)
	want := Changes{
		Began: []string{`budgets["c"]`, "methodConfig[1].layers[1]", "methodConfig[1].layers[2]", "methodConfig[1].layers[3]", `sharedLayers["t"]`},
		Ended: []string{`budgets["b"]`, "methodConfig[0].layers[1]", "methodConfig[0].layers[2]", "methodConfig[0].layers[3]"},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("Update says\n%q, want\n%q", got, want)
	}
}

func TestUpdateLetsWaitersOfRemovedLayersGo(t *testing.T) {
	for _, layer := range []string{
		`{"concurrency": {"limit": 1}}`,
		`{"concurrency": {"aimd": {"initial": 1, "max": 1}}}`,
		`{"concurrency": {"limit": 1, "perMethod": true}}`,
		`{"rateLimit": {"limit": 1, "per": "3600s"}}`,
		`{"rateLimit": {"limit": 1, "per": "3600s", "perMethod": true}}`,
		`{"rateLimit": {"limit": 1, "per": "3600s", "algorithm": "ALGORITHM_WINDOW"}}`,
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newStack(t, all(layer))
			server := &fake{}
			errs := calls(t.Context(), s.Wrap(server), method, 5)
			synctest.Wait()
			if got := server.running(); got != 1 {
				t.Fatalf("%s: %d of 5 calls run, want 1", layer, got)
			}
			update(t, s, all(`{"breaker": {}}`))
			time.Sleep(time.Millisecond)
			synctest.Wait()
			if got := server.running(); got != 5 {
				t.Errorf("%s: when it has been removed %d of 5 calls run, want all", layer, got)
			}
			for range server.running() {
				server.end(nil)
			}
			for range 5 {
				if err := <-errs; err != nil {
					t.Errorf("%s: a call that waited: %v", layer, err)
				}
			}
		})
	}
}

func TestNames(t *testing.T) {
	s := newStack(t, `{"methodConfig": [{"name": [{}], "layers": [
		{"name": "a", "timeout": {"call": "1s"}}, {"name": "b", "hedge": {}}, {"name": "c", "retry": {}}, {"name": "d", "throttle": {}},
		{"name": "e", "breaker": {}}, {"name": "f", "failFast": {}}, {"name": "g", "loadShed": {}}, {"name": "h", "buffer": {"size": 1}},
		{"name": "i", "rateLimit": {"limit": 1}}, {"name": "j", "concurrency": {"limit": 1}}, {"shared": "k"}]}],
		"sharedLayers": {"k": {"retry": {"budget": "none", "allMethods": true}}}, "budgets": {"none": {"ratio": 0, "minPerSecond": 0}}}`)
	if got, want := s.String(), "*: [a > b > c > d > e > f > g > h > i > j > k]"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
	server := &fake{}
	server.answer(status.Error(codes.Unavailable, "the server's"))
	err := s.Wrap(server).Invoke(t.Context(), method, nil, nil)
	wantRefused(t, "a call whose retry has no budget", err, "k", interceptor.ReasonBudget)
	if got := status.Convert(err).Message(); got != "the server's" {
		t.Errorf("its status has message %q, want the server's", got)
	}
}

func TestConfig(t *testing.T) {
	m := parse(t, all(`{"name": "l", "concurrency": {"limit": 7}}`))
	s, err := NewStackFromConfig(m)
	if err != nil {
		t.Fatal(err)
	}
	got := s.Config()
	if !proto.Equal(got, m) {
		t.Errorf("Config() = %v, want %v", got, m)
	}
	got.MethodConfig[0].Layers[0].Name, m.MethodConfig[0].Layers[0].Name = "x", "x"
	if s.Layer("l") == nil || s.Config().MethodConfig[0].Layers[0].Name != "l" {
		t.Errorf("a change of a message changed the stack")
	}
}

func TestOptions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		obs := &counter{}
		var provided int
		s := newStack(t, `{"methodConfig": [
				{"name": [{"service": "k.K"}], "layers": [{"loadShed": {}}, {"rateLimit": {"limit": 1, "keyFunc": "k"}}]},
				{"name": [{"service": "m.M"}], "layers": [{"name": "m", "breaker": {"consecutiveFailures": 1, "perMetadata": "tenant"}}]},
				{"name": [{"service": "c.C"}], "layers": [{"loadShed": {}}, {"name": "c", "concurrency": {"limit": 3, "costFunc": "c", "priorityFunc": "p"}}]},
				{"name": [{"service": "r.R"}], "layers": [{"retry": {"idempotentFunc": "i", "backoff": {"max": "0.06s"}}}]},
				{"name": [{"service": "p.P"}], "layers": [{"retry": {"policy": "p", "methods": ["/p.P/"]}}]},
				{"name": [{"service": "h.H"}], "layers": [{"hedge": {"policy": "p", "delay": "3600s", "methods": ["/h.H/"]}}]},
				{"name": [{"service": "l.L"}], "layers": [{"provided": "l"}]}]}`,
			WithObserver(obs),
			WithKeyFunc("k", func(_ context.Context, c *interceptor.Admission) string { return c.Method() }),
			WithCostFunc("c", func(context.Context, *interceptor.Admission) int64 { return 2 }),
			WithPriorityFunc("p", func(context.Context, *interceptor.Admission) int { return 2 }),
			WithIdempotentFunc("i", func(m string) bool { return m == "/r.R/Yes" }),
			WithRetryPolicy("p", never),
			WithHedgePolicy("p", func(context.Context, *hedge.Attempt) hedge.Verdict { return hedge.Answer }),
			WithLayer("l", mapping.Error(func(context.Context, string, error) error { provided++; return nil })),
		)
		server := &fake{}
		conn := s.Wrap(server)
		invoke := func(method string) error { return conn.Invoke(t.Context(), method, nil, nil) }
		server.answer(nil)
		if err := errors.Join(invoke("/k.K/A"), invoke("/k.K/B")); err != nil {
			t.Errorf("a call for each of two keys: %v", err)
		}
		wantRefused(t, "a second call for a key", invoke("/k.K/A"), "ratelimit", interceptor.ReasonRateLimit)

		server.answer(status.Error(codes.Unavailable, ""))
		invoke("/m.M/A")
		if got := s.Layer("m").(*breaker.Layer).States(); len(got) != 1 {
			t.Errorf("a breaker per metadata has circuits %v, want one", got)
		}
		for m, want := range map[string]int{"/r.R/Yes": 3, "/r.R/No": 1, "/p.P/M": 1, "/h.H/M": 1} {
			before := obs.attempts()
			invoke(m)
			if got := obs.attempts() - before; got != want {
				t.Errorf("%s: %d attempts, want %d", m, got, want)
			}
		}
		if err := invoke("/l.L/M"); err != nil || provided != 1 {
			t.Errorf("the layer that the program supplies was called %d times, error %v, want 1 and none", provided, err)
		}
		before := obs.attempts()
		invoke("/none.None/M")
		if got := obs.attempts() - before; got != 1 {
			t.Errorf("the observer saw %d attempts of a call without layers, want 1", got)
		}
		server.hold()
		errs := calls(t.Context(), conn, "/c.C/M", 1)
		synctest.Wait()
		wantRefused(t, "a second call that costs 2 of 3", invoke("/c.C/M"), "c", interceptor.ReasonConcurrency)
		server.end(nil)
		<-errs
	})
}

// never is a retry policy.
func never(context.Context, *retry.Attempt) retry.Decision { return retry.Decision{} }

type counter struct {
	interceptor.NopObserver
	mu sync.Mutex // Guards n.
	n  int
}

func (c *counter) Attempt(interceptor.Observed) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n++
}

func (c *counter) attempts() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// Updates at random while calls run lose no call and no permit. The check holds
// for every interleaving.
func TestUpdateUnderLoad(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	configs := []string{
		identities,
		`{}`,
		`{"methodConfig": [
			{"name": [{"service": "a.A"}], "layers": [{"retry": {}}, {"buffer": {"size": 1000}}, {"concurrency": {"limit": 3}}, {"shared": "s"}]},
			{"name": [{}], "layers": [{"shared": "s"}, {"breaker": {}}, {"throttle": {}}]}
		], "sharedLayers": {"s": {"concurrency": {"limit": 2}}}}`,
		all(`{"failFast": {}}, {"rateLimit": {"limit": 1000000, "algorithm": "ALGORITHM_WINDOW"}}, {"concurrency": {"aimd": {}}}`),
	}
	s := newStack(t, configs[0])
	conn := s.Wrap(instant{})
	deadline := time.Now().Add(500 * time.Millisecond)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for time.Now().Before(deadline) {
				m := []string{"/a.A/M", "/b.B/M", "/c.C/M"}[rng.IntN(3)]
				ctx, cancel := context.WithTimeout(context.Background(), time.Duration(rng.IntN(int(time.Millisecond))))
				conn.Invoke(ctx, m, nil, nil)
				cancel()
			}
		})
	}
	for w := range 2 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(100+w)))
			for time.Now().Before(deadline) {
				update(t, s, configs[rng.IntN(len(configs))])
				_, _ = s.String(), s.Config()
			}
		})
	}
	wg.Wait()
	update(t, s, configs[2])
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	if err := s.Drain(ctx); err != nil {
		t.Fatalf("Drain: %v", err)
	}
	for _, list := range values(s) {
		for _, l := range list {
			if l, ok := l.(*concurrency.Layer); ok && (l.InUse() != 0 || l.Waiting() != 0) {
				t.Errorf("%v: %d permits in use and %d calls wait at rest, want none", l, l.InUse(), l.Waiting())
			}
		}
	}
}

// instant answers at once.
type instant struct{ grpc.ClientConnInterface }

func (instant) Invoke(context.Context, string, any, any, ...grpc.CallOption) error { return nil }

func TestAllocations(t *testing.T) {
	if race.Enabled {
		t.Skip("the race detector allocates")
	}
	s := newStack(t, `{"methodConfig": [
		{"name": [{"service": "a.A"}], "layers": [{"rateLimit": {"limit": 100000000}}, {"shared": "s"}]},
		{"name": [{}], "layers": [{"loadShed": {}}, {"shared": "s"}]}
	], "sharedLayers": {"s": {"concurrency": {"limit": 6}}}}`)
	conn := s.Wrap(instant{})
	for _, m := range []string{"/a.A/M", "/c.C/M"} {
		if n := testing.AllocsPerRun(1000, func() { conn.Invoke(context.Background(), m, nil, nil) }); n != 0 {
			t.Errorf("%s: %v allocations per call, want 0", m, n)
		}
	}
}
