// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/naming/endpoints"

	"github.com/belfry-go/belfry/internal/test/enginetest"
	"github.com/belfry-go/belfry/internal/test/leaktest"
	"github.com/belfry-go/belfry/resolver/discover"
)

func TestMain(m *testing.M) { leaktest.Main(m) }

// newSource returns a source that reads all keys again once an hour, unless an
// event makes it.
func newSource(client *clientv3.Client, target string) source {
	return source{client, target + "/", time.Hour, timeout}
}

// value is the value of an endpoint without metadata.
func value(addr string) string { return fmt.Sprintf(`{"Op":0,"Addr":%q,"Metadata":null}`, addr) }

type set = enginetest.Set

func TestDecode(t *testing.T) {
	for _, tt := range []struct{ value, want, wantErr string }{
		{value: value("a:1"), want: "a:1*1@"},
		{value: `{"Addr":"a:1","Metadata":{"weight":2,"zone":"z","other":[1]}}`, want: "a:1*2@z"},
		{value: `{"Addr":"a:1","Metadata":{"draining":true,"group":2}}`, want: "a:1*1@ group 2 draining"},
		{value: `{"Addr":"a:1","Metadata":{"draining":1}}`, wantErr: "metadata: json: cannot unmarshal number"},
		{value: `{"Addr":"a:1","Metadata":"text"}`, want: "a:1*1@"},
		{value: `{"Addr":"a:1","Metadata":[1]}`, want: "a:1*1@"},
		{value: `{"Addr":"a:1","Metadata":{"weight":0}}`, wantErr: "weight 0: must be at least 1"},
		{value: `{"Addr":"a:1","Metadata":{"weight":"2"}}`, wantErr: "metadata: json: cannot unmarshal string"},
		{value: `{"Addr":"a:1","Metadata":{"weight":-1}}`, wantErr: "metadata: json: cannot unmarshal number"},
		{value: `{"Addr":""}`, wantErr: "address is empty"},
		{value: `{"Addr":"a b"}`, wantErr: "contains white space"},
		{value: `null`, wantErr: "address is empty"},
		{value: `a:1`, wantErr: "invalid character"},
		{value: `["a:1"]`, wantErr: "cannot unmarshal array"},
		{value: ``, wantErr: "unexpected end"},
	} {
		ep, err := decode([]byte(tt.value))
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("decode(%s): error %v, want one that contains %q", tt.value, err, tt.wantErr)
			}
			continue
		}
		if got := enginetest.Show(ep); err != nil || got != tt.want {
			t.Errorf("decode(%s) = %s, error %v, want %s", tt.value, got, err, tt.want)
		}
	}
}

func TestArguments(t *testing.T) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"127.0.0.1:1"}})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, tt := range []struct {
		client       *clientv3.Client
		target, want string
	}{
		{nil, "a", "the client is nil"},
		{client, "", "the target is empty"},
		{client, "a/", `target "a/": must not end with a slash`},
	} {
		if _, err := New(tt.client, tt.target); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("New(%q): error %v, want one that contains %q", tt.target, err, tt.want)
		}
		if _, err := Register(t.Context(), tt.client, tt.target, discover.MustEndpoint("a:1"), 0); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Register(%q): error %v, want one that contains %q", tt.target, err, tt.want)
		}
	}
	two := discover.MustEndpoint("a:1", discover.Address("b:1"))
	if _, err := Register(t.Context(), client, "a", two, 0); err == nil || !strings.Contains(err.Error(), "2 addresses: must be one") {
		t.Errorf("Register of two addresses: error %v", err)
	}
	named := discover.MustEndpoint("a:1", discover.ServerName("n"))
	if _, err := Register(t.Context(), client, "a", named, 0); err == nil || !strings.Contains(err.Error(), "has a server name") {
		t.Errorf("Register with a server name: error %v", err)
	}
	if _, err := Register(t.Context(), client, "a", discover.MustEndpoint("a:1"), time.Millisecond); err == nil || !strings.Contains(err.Error(), "ttl 1ms: must be at least 1s") {
		t.Errorf("Register with a short ttl: error %v", err)
	}
}

func TestSource(t *testing.T) {
	c := startCluster(t, 3)
	client := c.admin(t)

	t.Run("says that an empty prefix is empty, and sees no others' keys", func(t *testing.T) {
		put(t, client, "empty2/a", value("a:1"), "empty", value("a:1"))
		w := enginetest.Watch(t, newSource(client, "empty"))
		w.WaitSet(t, set{})
		put(t, client, "empty/b", value("b:1"))
		w.WaitSet(t, set{"b": "b:1*1@"})
		commit(t, client, clientv3.OpDelete("empty", clientv3.WithPrefix()))
		w.WaitSet(t, set{})
	})

	t.Run("reads what etcd's own package writes, and the other way", func(t *testing.T) {
		manager, err := endpoints.NewManager(client, "own")
		if err != nil {
			t.Fatal(err)
		}
		if err := manager.AddEndpoint(t.Context(), "own/x", endpoints.Endpoint{Addr: "x:1", Metadata: map[string]any{"weight": 3}}); err != nil {
			t.Fatal(err)
		}
		reg, err := Register(t.Context(), client, "own", discover.MustEndpoint("y:1", discover.Weight(2), discover.Zone("z"), discover.Group(1), discover.Draining()), 0)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := Register(t.Context(), client, "own", discover.MustEndpoint("p:1", discover.Key("pod-1")), 0)
		if err != nil {
			t.Fatal(err)
		}
		w := enginetest.Watch(t, newSource(client, "own"))
		w.WaitSet(t, set{"x": "x:1*3@", "y:1": "y:1*2@z group 1 draining", "pod-1": "p:1*1@"})
		list, err := manager.List(t.Context())
		got, _ := json.Marshal(list)
		const want = `{"own/pod-1":{"Addr":"p:1","Metadata":null},"own/x":{"Addr":"x:1","Metadata":{"weight":3}},"own/y:1":{"Addr":"y:1","Metadata":{"draining":true,"group":1,"weight":2,"zone":"z"}}}`
		if err != nil || string(got) != want {
			t.Errorf("etcd's own package lists %s, error %v, want %s", got, err, want)
		}
		for _, r := range []*Registration{reg, plain} {
			if err := r.Leave(t.Context()); err != nil {
				t.Errorf("Leave: %v", err)
			}
		}
		w.WaitSet(t, set{"x": "x:1*3@"})
		if err := reg.Leave(t.Context()); err != nil {
			t.Errorf("second Leave: %v", err)
		}
		if errs := w.Errors(); len(errs) > 0 {
			t.Errorf("errors %q", errs)
		}
	})

	t.Run("keeps what a key had when its value is not valid", func(t *testing.T) {
		put(t, client, "bad/a", "nonsense")
		w := enginetest.Watch(t, newSource(client, "bad"))
		w.WaitError(t, `etcd: key "bad/a": invalid character`)
		if w.Known() {
			t.Error("there is a set, although no value was valid")
		}
		put(t, client, "bad/a", value("a:1"), "bad/b", value("b:1"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
		put(t, client, "bad/a", "more nonsense", "bad/c", "", "bad/d", value("d:1"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@", "d": "d:1*1@"})
		w.WaitError(t, "(and 1 more keys)")
		commit(t, client, clientv3.OpDelete("bad/a"), clientv3.OpDelete("bad/c"))
		w.WaitSet(t, set{"b": "b:1*1@", "d": "d:1*1@"})
		if errs := w.Errors(); len(errs) != 2 {
			t.Errorf("errors %q, want 2", errs)
		}
	})

	t.Run("survives a compaction of what it missed", func(t *testing.T) {
		put(t, client, "compact/a", value("a:1"), "compact/b", value("b:1"))
		w := enginetest.Watch(t, newSource(c.client(t, 0), "compact"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
		c.cut(0)
		commit(t, client, clientv3.OpDelete("compact/a"))
		compact(t, client, commit(t, client, clientv3.OpPut("compact/c", value("c:1"))))
		c.connect(0)
		w.WaitSet(t, set{"b": "b:1*1@", "c": "c:1*1@"})
		if errs := w.Errors(); len(errs) > 0 {
			t.Errorf("errors %q", errs)
		}
	})

	t.Run("tells of a removal that came when it was time to read again", func(t *testing.T) {
		put(t, client, "late/a", value("a:1"))
		src := newSource(c.client(t), "late")
		src.readEvery = 300 * time.Millisecond
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		known := map[string]bool{}
		for element := range src.Watch(ctx) {
			for change := range element.All() {
				switch change.Op {
				case discover.OpInsert:
					known[change.Key] = true
				case discover.OpRemove:
					delete(known, change.Key)
				case discover.OpSynced:
					if !known["b"] {
						put(t, client, "late/b", value("b:1"))
						continue
					}
					if !known["a"] {
						return
					}
				}
			}
			if known["a"] && known["b"] {
				commit(t, client, clientv3.OpDelete("late/a"))
				// The client keeps the event meanwhile.
				time.Sleep(2 * src.readEvery)
			}
		}
		t.Error("the removal was not told")
	})

	t.Run("survives silence", func(t *testing.T) {
		put(t, client, "silent/a", value("a:1"))
		src := newSource(c.client(t, 1), "silent")
		src.readEvery, src.timeout = 100*time.Millisecond, 200*time.Millisecond
		w := enginetest.Watch(t, src)
		w.WaitSet(t, set{"a": "a:1*1@"})
		c.proxies[1].Stall()
		put(t, client, "silent/b", value("b:1"))
		w.WaitError(t, `etcd: reading "silent/"`)
		c.proxies[1].Resume()
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
	})

	t.Run("survives a change of the leader", func(t *testing.T) {
		put(t, client, "leader/a", value("a:1"))
		w := enginetest.Watch(t, newSource(c.client(t), "leader"))
		w.WaitSet(t, set{"a": "a:1*1@"})
		c.moveLeader(t)
		put(t, client, "leader/b", value("b:1"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
	})

	t.Run("keeps its set without a majority, and a new watch takes an old one", func(t *testing.T) {
		put(t, client, "alone/a", value("a:1"))
		src := newSource(c.client(t, 2), "alone")
		w := enginetest.Watch(t, src)
		w.WaitSet(t, set{"a": "a:1*1@"})
		c.stop(0)
		c.stop(1)
		w.WaitError(t, `"alone/"`)
		src.timeout = 200 * time.Millisecond
		late := enginetest.Watch(t, src)
		late.WaitSet(t, set{"a": "a:1*1@"})
		late.WaitError(t, `etcd: reading "alone/"`)
		c.start(t, 0)
		c.start(t, 1)
		put(t, client, "alone/b", value("b:1"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
		late.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
	})

	t.Run("survives a restart of all members", func(t *testing.T) {
		put(t, client, "restart/a", value("a:1"))
		w := enginetest.Watch(t, newSource(c.client(t), "restart"))
		w.WaitSet(t, set{"a": "a:1*1@"})
		for i := range c.members {
			c.stop(i)
		}
		for i := range c.members {
			c.start(t, i)
		}
		put(t, client, "restart/b", value("b:1"))
		w.WaitSet(t, set{"a": "a:1*1@", "b": "b:1*1@"})
	})
}

// A cluster that is made again has the same name and lower revisions.
func TestSourceOfAClusterThatLostItsData(t *testing.T) {
	c, fresh := startCluster(t, 1), startCluster(t, 1)
	client := c.client(t)
	src := newSource(client, "o")
	src.readEvery = 100 * time.Millisecond
	for i := range 100 {
		put(t, client, "o/a", value(fmt.Sprint("a:", i+1)))
	}
	w := enginetest.Watch(t, src)
	w.WaitSet(t, set{"a": "a:100*1@"})
	put(t, fresh.client(t), "o/b", value("b:1"))
	c.proxies[0].ForwardTo(fresh.members[0].Clients[0].Addr().String())
	w.WaitSet(t, set{"b": "b:1*1@"})
	put(t, fresh.client(t), "o/c", value("c:1"))
	w.WaitSet(t, set{"b": "b:1*1@", "c": "c:1*1@"})
}

func TestErrorsAreReportedOnce(t *testing.T) {
	var got []error
	w := watch{yield: func(_ discover.Change, err error) bool { got = append(got, err); return true }}
	for _, text := range []string{"a", "a", "b", "b", "a"} {
		w.report(t.Context(), errors.New(text))
	}
	if text := fmt.Sprint(got); text != "[a b]" {
		t.Errorf("reported %s, want [a b]", text)
	}
}

// At rest the channel has what etcd has, and no call has failed, after 1,000
// changes during which etcd was disturbed in every way.
func TestRandomChanges(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	c := startCluster(t, 3)
	client := c.admin(t)
	addrs := enginetest.Serve(t, 10)
	model, values := set{}, map[string]string{}
	change := func(i int) clientv3.Op {
		key := fmt.Sprint("k", i)
		switch kind := rng.IntN(8); {
		case kind < 3 && i > 0: // k0 stays, so that calls need not fail.
			delete(model, key)
			return clientv3.OpDelete("random/" + key)
		case kind < 4:
			return clientv3.OpPut("random/"+key, []string{"", "nonsense", "{}", `{"Addr":1}`}[rng.IntN(4)])
		}
		weight, zone := 1+rng.IntN(3), string(rune('a'+rng.IntN(2)))
		model[key] = fmt.Sprintf("%s*%d@%s", addrs[i], weight, zone)
		values[key] = fmt.Sprintf(`{"Addr":%q,"Metadata":{"weight":%d,"zone":%q}}`, addrs[i], weight, zone)
		return clientv3.OpPut("random/"+key, values[key])
	}
	for model["k0"] == "" {
		commit(t, client, change(0))
	}
	src := newSource(c.client(t), "random")
	src.readEvery, src.timeout = 20*time.Millisecond, time.Second
	channel := enginetest.Dial(t, src)
	channel.WaitKey(t, "k0")
	channel.Load(4)

	undo := func() {}
	disturbances := rng.Perm(6)
	var revision int64
	for changes := 0; changes < 1000; {
		if len(disturbances) > 0 && changes >= 1000-160*len(disturbances) {
			undo()
			undo = func() {}
			i := rng.IntN(len(c.members))
			switch disturbances[0] {
			case 0:
				compact(t, client, revision)
			case 1:
				c.moveLeader(t)
			case 2:
				c.stop(i)
				undo = func() { c.start(t, i) }
			case 3:
				c.cut(i)
				undo = func() { c.connect(i) }
			case 4:
				for i := range c.members {
					c.cut(i)
				}
				undo = func() {
					compact(t, client, revision)
					for i := range c.members {
						c.connect(i)
					}
				}
			default:
				c.proxies[i].Stall()
				undo = c.proxies[i].Resume
			}
			disturbances = disturbances[1:]
		}
		var ops []clientv3.Op
		for _, i := range rng.Perm(len(addrs))[:1+rng.IntN(len(addrs))] {
			ops = append(ops, change(i))
		}
		revision = commit(t, client, ops...)
		changes += len(ops)
	}
	undo()
	// Which endpoint a key with nonsense keeps depends on what was seen.
	for key := range values {
		if _, ok := model[key]; ok {
			put(t, client, "random/"+key, values[key])
		} else {
			commit(t, client, clientv3.OpDelete("random/"+key))
		}
	}
	channel.WaitSet(t, model)
	channel.Stop(t)

	delete(model, "k9")
	commit(t, client, clientv3.OpDelete("random/k9"))
	channel.WaitSet(t, model)
	began := time.Now()
	put(t, client, "random/k9", value(addrs[9]))
	channel.WaitShare(t, addrs[9], len(model))
	t.Logf("a new endpoint had its share of the calls %v after it was registered", time.Since(began))
}

// While etcd is out of order calls go on with the last set, each error is reported once,
// and the source catches up. The flag -outage says how long that is.
func TestOutages(t *testing.T) {
	c := startCluster(t, 3)
	client := c.admin(t)
	addrs := enginetest.Serve(t, 3)
	put(t, client, "outages/a", value(addrs[0]))
	proxy := enginetest.NewProxy(t)
	target := func() string { return c.back[0].Addr() }
	proxy.ForwardTo(target())
	src := newSource(newClient(t, []string{proxy.Addr()}), "outages")
	src.readEvery, src.timeout = 100*time.Millisecond, time.Second
	channel := enginetest.Dial(t, src)
	model := set{"a": addrs[0] + "*1@"}
	channel.WaitSet(t, model)
	channel.Load(4)
	n := 0
	channel.Survive(t, func() set {
		n++
		model["b"] = fmt.Sprintf("%s*%d@", addrs[1+n%2], n)
		put(t, client, "outages/b", fmt.Sprintf(`{"Addr":%q,"Metadata":{"weight":%d}}`, addrs[1+n%2], n))
		return model
	}, append(proxy.Disturb(target), enginetest.Disturbance{
		Name: "restarted",
		Begin: func() {
			proxy.ForwardTo("")
			for i := range c.members {
				c.stop(i)
			}
		},
		End: func() {
			for i := range c.members {
				c.start(t, i)
			}
			proxy.ForwardTo(target())
		},
		Told: "etcd:",
	}, enginetest.Disturbance{
		Name:  "nonsense in the values",
		Begin: func() { put(t, client, "outages/a", "nonsense", "outages/c", "nonsense") },
		End: func() {
			put(t, client, "outages/a", value(addrs[0]))
			commit(t, client, clientv3.OpDelete("outages/c"))
		},
		Told: "invalid character",
	})...)
}
