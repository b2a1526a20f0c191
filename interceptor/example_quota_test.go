// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"fmt"
	"sync"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

// Quota is a layer of a user: a gate that lets each tenant have so many calls at a
// time, and refuses further ones.
type Quota struct {
	interceptor.GateOnly // It leaves the call path alone.

	limit int
	key   interceptor.KeyBy
	full  *interceptor.Refusal

	mu    sync.Mutex
	inUse map[string]int // Guarded by mu.
}

// NewQuota returns a quota for the tenant that the metadata of a call names.
func NewQuota(limit int) *Quota {
	return &Quota{
		limit: limit,
		key:   interceptor.KeyBy{Metadata: "tenant"},
		full:  interceptor.Refuse("quota", interceptor.ReasonQuota, fmt.Sprintf("%d calls are running, which is the tenant's quota", limit)),
		inUse: map[string]int{},
	}
}

// NewLayer makes a Spec of it, which NewStack takes.
func (q *Quota) NewLayer() (interceptor.Layer, error) { return q, nil }

// String names it in refusals and in Stack.String.
func (*Quota) String() string { return "quota" }

// Traits says that it neither waits nor decides by anything that changes while a
// call waits further in.
func (*Quota) Traits() interceptor.Traits { return 0 }

// WrapGate returns the gate. It takes before it asks inside, so that a call that
// waits further in counts too.
func (q *Quota) WrapGate(inner interceptor.Gate) interceptor.Gate {
	return interceptor.GateFunc(func(ctx context.Context, a *interceptor.Admission, w interceptor.Wait) error {
		tenant := q.key.Key(ctx, a)
		if !q.take(tenant) {
			return q.full.ForKey(tenant)
		}
		a.Hold(&lease{quota: q, tenant: tenant}, 0)
		return inner.Admit(ctx, a, w)
	})
}

func (q *Quota) take(tenant string) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.inUse[tenant] >= q.limit {
		return false
	}
	q.inUse[tenant]++
	return true
}

// InUse returns how many calls are running.
func (q *Quota) InUse() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for _, m := range q.inUse {
		n += m
	}
	return n
}

// lease is what a call has taken.
type lease struct {
	quota  *Quota
	tenant string
}

// Release gives it back, whatever became of the call.
func (l *lease) Release(int64, interceptor.End) {
	l.quota.mu.Lock()
	defer l.quota.mu.Unlock()
	if l.quota.inUse[l.tenant]--; l.quota.inUse[l.tenant] == 0 {
		delete(l.quota.inUse, l.tenant)
	}
}

// nested makes a second call while the first one runs.
type nested struct {
	grpc.ClientConnInterface
	second func()
}

func (c *nested) Invoke(context.Context, string, any, any, ...grpc.CallOption) error {
	if second := c.second; second != nil {
		c.second = nil
		second()
	}
	return nil
}

// A layer of one's own: a quota for each tenant.
func Example_quota() {
	stack, err := interceptor.NewStack(NewQuota(1))
	if err != nil {
		fmt.Println(err)
		return
	}
	server := &nested{}
	conn := stack.Wrap(server)
	call := func(tenant string) error {
		ctx := metadata.AppendToOutgoingContext(context.Background(), "tenant", tenant)
		return conn.Invoke(ctx, "/helloworld.Greeter/SayHello", nil, nil)
	}
	server.second = func() {
		fmt.Println("globex:", call("globex"))
		err := call("acme")
		fmt.Println("acme:", err)
		if r, ok := interceptor.AsRefusal(err); ok {
			fmt.Println(r.Layer, r.Reason, r.Key, status.Code(err))
		}
		for _, d := range status.Convert(err).Details() {
			if info, ok := d.(*errdetails.ErrorInfo); ok {
				fmt.Println(info.GetDomain(), info.GetReason(), info.GetMetadata()["key"])
			}
		}
	}
	fmt.Println("acme:", call("acme"))
	// Output:
	// globex: <nil>
	// acme: belfry: quota: QUOTA ("acme"): 1 calls are running, which is the tenant's quota
	// quota QUOTA acme ResourceExhausted
	// belfry QUOTA acme
	// acme: <nil>
}
