// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/belfry-go/belfry/resolver/discover"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"
)

func open(resolver.Target) (discover.Source, error) { return &script{}, nil }

func TestDefaultAuthorityIsANameForACertificate(t *testing.T) {
	for _, tt := range []struct{ target, want string }{
		{"belfry:///orders", "orders"},
		{"belfry:orders", "orders"},
		{"belfry:///orders:443", "orders:443"},
		{"belfry:///orders.internal", "orders.internal"},
		{"belfry:///prod/payments", "payments.prod"},
		{"belfry:///eu/prod/payments:8443", "payments.prod.eu:8443"},
		{"belfry:///a%20b", "a%20b"},
		{"belfry:///[::1]:443", "[::1]:443"},
		{"belfry:///:443", "localhost:443"},
		{"belfry://registry:2379/orders", "orders"},
		{"belfry://orders", "orders"},
		{"belfry:///", "localhost"},
	} {
		if got := discover.DefaultAuthority(target(tt.target)); got != tt.want {
			t.Errorf("authority of %s = %q, want %q", tt.target, got, tt.want)
		}
	}
}

func TestWithAuthorityOverridesTheDefault(t *testing.T) {
	b, err := discover.NewBuilder("belfry", open, discover.WithAuthority(func(t resolver.Target) string {
		return "x." + t.Endpoint()
	}))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := b.(resolver.AuthorityOverrider).OverrideAuthority(target("belfry:///orders")), "x.orders"; got != want {
		t.Errorf("authority = %q, want %q", got, want)
	}
}

func TestNewBuilderRejectsBadValues(t *testing.T) {
	good := backoff.DefaultConfig
	with := func(f func(*backoff.Config)) discover.Option {
		c := good
		f(&c)
		return discover.WithBackoff(c)
	}
	for _, tt := range []struct {
		opt  discover.Option
		want string
	}{
		{nil, "option 0 is nil"},
		{with(func(c *backoff.Config) { c.BaseDelay = 0 }), "BaseDelay 0s: must be positive"},
		{with(func(c *backoff.Config) { c.MaxDelay = time.Millisecond }), "MaxDelay 1ms: must be at least BaseDelay, 1s"},
		{with(func(c *backoff.Config) { c.Multiplier = 0.5 }), "Multiplier 0.5"},
		{with(func(c *backoff.Config) { c.Jitter = 2 }), "Jitter 2: must be from 0 to 1"},
		{discover.WithSyncTimeout(0), "WithSyncTimeout: 0s: must be positive"},
		{discover.WithAuthority(nil), "WithAuthority: the function is nil"},
	} {
		_, err := discover.NewBuilder("belfry", open, tt.opt)
		wantError(t, err, tt.want)
	}
	_, err := discover.NewBuilder("belfry", nil)
	wantError(t, err, "nil")
}

func TestSchemeMustBeALowerCaseURLScheme(t *testing.T) {
	for _, good := range []string{"etcd", "x", "my-registry.v2+tls"} {
		b, err := discover.NewBuilder(good, open)
		if err != nil {
			t.Errorf("scheme %q: %v", good, err)
		} else if b.Scheme() != good {
			t.Errorf("scheme = %q, want %q", b.Scheme(), good)
		}
	}
	for _, bad := range []string{"", "Etcd", "2x", "-x", "a_b", "a:b", "ü"} {
		if _, err := discover.NewBuilder(bad, open); err == nil {
			t.Errorf("scheme %q was accepted", bad)
		}
	}
}

func TestBuildFailsIfTheSourceCannotBeOpened(t *testing.T) {
	for _, tt := range []struct {
		open func(resolver.Target) (discover.Source, error)
		want string
	}{
		{func(resolver.Target) (discover.Source, error) { return nil, errors.New("no such registry") },
			"opening the source of belfry:///orders: no such registry"},
		{func(resolver.Target) (discover.Source, error) { return nil, nil }, "the source is nil"},
	} {
		b, err := discover.NewBuilder("belfry", tt.open)
		if err != nil {
			t.Fatal(err)
		}
		_, err = b.Build(target("belfry:///orders"), &fakeConn{}, resolver.BuildOptions{})
		wantError(t, err, tt.want)
	}
}

func TestRegisterRejectsWhatIsThereAlready(t *testing.T) {
	err := discover.Register("passthrough", open)
	wantError(t, err, `scheme "passthrough": has a resolver already`)
	err = discover.Register("Bad", open)
	wantError(t, err, "lower-case")
}

func TestOpString(t *testing.T) {
	var got []string
	for op := range discover.Op(8) {
		got = append(got, op.String())
	}
	if got, want := strings.Join(got, " "), "Op(0) Insert Remove Synced Final ServiceConfig Batch Op(7)"; got != want {
		t.Errorf("ops = %q, want %q", got, want)
	}
}
