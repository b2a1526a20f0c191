// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"maps"
	"strconv"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
)

// previousKey is the header that tells a server how many attempts of the call came
// before (gRFC A6).
const previousKey = "grpc-previous-rpc-attempts"

// WithPrevious returns the context and the options of an attempt that tells the server
// that n attempts of its call came before, besides those that ctx or opts tell of already.
// opts is not changed.
//
// gRPC adds no header that it is not given as metadata, which every call inherits that is
// made with the context, or as a credential, which none does. So it is a credential.
func WithPrevious(ctx context.Context, opts []grpc.CallOption, n int) (context.Context, []grpc.CallOption) {
	ctx, n = takePrevious(ctx, n)
	p := &previous{n: n, own: CredentialsOf(opts)}
	return ctx, append(opts[:len(opts):len(opts)], grpc.PerRPCCredentials(p))
}

// CredentialsOf returns the credentials that the options give a call, nil if they give none.
func CredentialsOf(opts []grpc.CallOption) (c credentials.PerRPCCredentials) {
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.PerRPCCredsCallOption:
			c = o.Creds // The last one counts.
		case *grpc.PerRPCCredsCallOption: // Of a stack outside, which saves an allocation.
			c = o.Creds
		}
	}
	return c
}

// WithPreviousMetadata is WithPrevious for a connection of which it is not known whether
// it has credentials of its own in its default call options, which an option replaces.
func WithPreviousMetadata(ctx context.Context, n int) context.Context {
	md, _ := metadata.FromOutgoingContext(ctx) // A copy.
	if md == nil {
		md = make(metadata.MD, 1)
	}
	md.Set(previousKey, strconv.Itoa(n+toldOf(md)))
	return metadata.NewOutgoingContext(ctx, md)
}

// WithoutPrevious returns ctx with the metadata of outer, the context of the call.
func WithoutPrevious(ctx, outer context.Context) context.Context {
	md, _ := metadata.FromOutgoingContext(outer)
	return metadata.NewOutgoingContext(ctx, md)
}

// takePrevious moves what the metadata of ctx tell of to n.
func takePrevious(ctx context.Context, n int) (context.Context, int) {
	md, _ := metadata.FromOutgoingContext(ctx)
	if len(md[previousKey]) == 0 {
		return ctx, n
	}
	n += toldOf(md)
	delete(md, previousKey)
	return metadata.NewOutgoingContext(ctx, md), n
}

// toldOf returns how many earlier attempts md tells of.
func toldOf(md metadata.MD) int {
	v := md[previousKey]
	if len(v) == 0 {
		return 0
	}
	n, err := strconv.ParseUint(v[len(v)-1], 10, 16)
	if err != nil {
		return 0
	}
	return int(n)
}

// previous is a credential that adds the header to the caller's own, if there is one.
type previous struct {
	n   int
	own credentials.PerRPCCredentials
}

func (p *previous) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	var md map[string]string
	if p.own != nil {
		own, err := p.own.GetRequestMetadata(ctx, uri...)
		if err != nil {
			return nil, err
		}
		md = maps.Clone(own) // It may be the owner's.
	}
	if md == nil {
		md = make(map[string]string, 1)
	}
	n := p.n
	if told, ok := md[previousKey]; ok { // By a stack in front.
		n += toldOf(metadata.MD{previousKey: {told}})
	}
	md[previousKey] = strconv.Itoa(n)
	return md, nil
}

func (p *previous) RequireTransportSecurity() bool {
	return p.own != nil && p.own.RequireTransportSecurity()
}
