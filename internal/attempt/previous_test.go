// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

// token is a credential of the caller.
type token struct {
	md     map[string]string
	err    error
	secure bool
}

func (c *token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return c.md, c.err
}
func (c *token) RequireTransportSecurity() bool { return c.secure }

// wrapped is what a stack in front makes of the credentials of its streams.
type wrapped struct{ credentials.PerRPCCredentials }

func TestWithPrevious(t *testing.T) {
	own := &token{md: map[string]string{"authorization": "x"}, secure: true}
	withHeader := metadata.AppendToOutgoingContext(t.Context(), previousKey, "3", "key", "value")
	for name, tc := range map[string]struct {
		ctx    context.Context
		opts   []grpc.CallOption
		want   map[string]string
		secure bool
	}{
		"alone":                    {t.Context(), nil, map[string]string{previousKey: "2"}, false},
		"with the caller's":        {t.Context(), []grpc.CallOption{grpc.PerRPCCredentials(own)}, map[string]string{previousKey: "2", "authorization": "x"}, true},
		"with nothing of his":      {t.Context(), []grpc.CallOption{grpc.PerRPCCredentials(&token{})}, map[string]string{previousKey: "2"}, false},
		"after a stack in front":   {t.Context(), []grpc.CallOption{grpc.PerRPCCredentials(&previous{n: 5, own: own})}, map[string]string{previousKey: "7", "authorization": "x"}, true},
		"after another's in front": {t.Context(), []grpc.CallOption{&grpc.PerRPCCredsCallOption{Creds: &wrapped{&previous{n: 5, own: own}}}}, map[string]string{previousKey: "7", "authorization": "x"}, true},
		"after the caller's tale":  {withHeader, nil, map[string]string{previousKey: "5"}, false},
	} {
		ctx, opts := WithPrevious(tc.ctx, tc.opts, 2)
		c := CredentialsOf(opts)
		got, err := c.GetRequestMetadata(ctx)
		if err != nil || !maps.Equal(got, tc.want) || c.RequireTransportSecurity() != tc.secure {
			t.Errorf("%s: %v, %v, secure=%v; want %v and secure=%v", name, got, err, c.RequireTransportSecurity(), tc.want, tc.secure)
		}
		if md, _ := metadata.FromOutgoingContext(ctx); len(md.Get(previousKey)) > 0 {
			t.Errorf("%s: the context has %v as well, so the header would be sent twice", name, md)
		}
	}
	if len(own.md) != 1 {
		t.Errorf("the caller's own map was changed: %v", own.md)
	}
	refused := errors.New("no token")
	_, opts := WithPrevious(t.Context(), []grpc.CallOption{grpc.PerRPCCredentials(&token{err: refused})}, 2)
	if _, err := CredentialsOf(opts).GetRequestMetadata(t.Context()); err != refused {
		t.Errorf("the error of the caller's credential became %v", err)
	}
}

func TestWithPreviousMetadata(t *testing.T) {
	outer := metadata.AppendToOutgoingContext(t.Context(), "key", "value")
	ctx := WithPreviousMetadata(WithPreviousMetadata(outer, 1), 2) // The second by a stack behind.
	md, _ := metadata.FromOutgoingContext(ctx)
	if got := md.Get(previousKey); !slices.Equal(got, []string{"3"}) || !slices.Equal(md.Get("key"), []string{"value"}) {
		t.Errorf("metadata %v, want %s: 3 and the caller's key", md, previousKey)
	}
	if md, _ := metadata.FromOutgoingContext(outer); len(md.Get(previousKey)) != 0 {
		t.Errorf("the caller's metadata was changed: %v", md)
	}
	if md, _ := metadata.FromOutgoingContext(WithoutPrevious(ctx, outer)); len(md.Get(previousKey)) != 0 || len(md.Get("key")) != 1 {
		t.Errorf("WithoutPrevious left %v", md)
	}
	for _, v := range []string{"-1", "x", "", "70000"} {
		ctx := WithPreviousMetadata(metadata.AppendToOutgoingContext(t.Context(), previousKey, v), 2)
		if md, _ := metadata.FromOutgoingContext(ctx); !slices.Equal(md.Get(previousKey), []string{"2"}) {
			t.Errorf("after the caller's %q: %v, want 2", v, md)
		}
	}
}
