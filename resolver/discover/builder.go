// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import (
	"errors"
	"fmt"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/internal/isnil"
)

// Scheme is the URL scheme of the targets that [WithSource] serves.
const Scheme = "belfry"

const defaultSyncTimeout = 15 * time.Second

// An Option changes how a source is bridged to gRPC channels.
type Option interface{ apply(*config) error }

type option func(*config) error

func (o option) apply(c *config) error { return o(c) }

// config holds what the options set. The channels of a builder share it. It is
// immutable once built.
type config struct {
	backoff     backoff.Config
	syncTimeout time.Duration
	keepOnEmpty bool
	addresses   bool
	home        string
	authority   func(resolver.Target) string
}

func newConfig(opts []Option) (*config, error) {
	c := &config{backoff: backoff.DefaultConfig, syncTimeout: defaultSyncTimeout, authority: DefaultAuthority}
	for i, opt := range opts {
		if opt == nil {
			return nil, fmt.Errorf("discover: option %d is nil", i)
		}
		if err := opt.apply(c); err != nil {
			return nil, fmt.Errorf("discover: %w", err)
		}
	}
	return c, nil
}

// WithBackoff sets how long to wait before a failed watch is started again:
// BaseDelay after the first failure, times Multiplier after each further one,
// up to MaxDelay. Each delay is then varied by plus or minus up to the fraction
// Jitter. After a watch that was synced, or that lasted as long as MaxDelay, the
// next delay is BaseDelay again. The zero fields of c have no defaults, so start
// from backoff.DefaultConfig. The backoff also applies to the sources of a [Merge],
// and to the failures of [Poll] and [DNS].
//
// By default it is gRPC's backoff for connections, backoff.DefaultConfig:
// BaseDelay 1 s, Multiplier 1.6, MaxDelay 120 s, Jitter 0.2. BaseDelay must be
// positive, MaxDelay at least BaseDelay, Multiplier from 1 to 1e6, Jitter from 0
// to 1.
func WithBackoff(c backoff.Config) Option {
	return option(func(cfg *config) error {
		switch {
		case c.BaseDelay <= 0:
			return fmt.Errorf("WithBackoff: BaseDelay %v: must be positive", c.BaseDelay)
		case c.MaxDelay < c.BaseDelay:
			return fmt.Errorf("WithBackoff: MaxDelay %v: must be at least BaseDelay, %v", c.MaxDelay, c.BaseDelay)
		case !(c.Multiplier >= 1 && c.Multiplier <= 1e6):
			return fmt.Errorf("WithBackoff: Multiplier %v: must be from 1 to 1e6", c.Multiplier)
		case !(c.Jitter >= 0 && c.Jitter <= 1):
			return fmt.Errorf("WithBackoff: Jitter %v: must be from 0 to 1", c.Jitter)
		}
		cfg.backoff = c
		return nil
	})
}

// WithSyncTimeout sets how long a watch may take to say [Synced].
//
// If there is no set yet when the time is over, the endpoints that the watch has
// inserted by then become the set. If it has inserted none, an error is reported
// to the channel, so that calls fail instead of hanging (calls that wait for ready
// still wait), and the time starts again.
//
// Once there is a complete set, no timeout replaces it. If a watch that was
// started after a failure is late, that is reported, and the set stays until the
// watch says Synced.
//
// By default 15 s. It must be positive. Wrap a source that never says Synced in
// [Settle].
func WithSyncTimeout(d time.Duration) Option {
	return option(func(cfg *config) error {
		if d <= 0 {
			return fmt.Errorf("WithSyncTimeout: %v: must be positive", d)
		}
		cfg.syncTimeout = d
		return nil
	})
}

// WithKeepOnEmpty keeps the last set when the source says that the set has
// become empty, until it has endpoints again. It protects against a discovery
// system that loses all its data at once. The price is that calls may go to
// servers that are gone. The first set is published even if it is empty.
//
// By default an empty set is published, and calls fail.
func WithKeepOnEmpty() Option {
	return option(func(cfg *config) error {
		cfg.keepOnEmpty = true
		return nil
	})
}

// WithAddresses also publishes the endpoints as the flat list of addresses
// that balancing policies built on google.golang.org/grpc/balancer/base read.
// Such a policy treats each address as a separate server.
//
// By default only endpoints are published. gRPC's own policies and belfry's use
// those.
func WithAddresses() Option {
	return option(func(cfg *config) error {
		cfg.addresses = true
		return nil
	})
}

// WithZone says in which zone the caller is. The names are those that [Zone] gives to
// endpoints. The policy belfry.p2c prefers endpoints in that zone if its field zones says
// so. A zone that this field names, or takes from the environment, has precedence over
// this one. The name must not be empty.
//
// By default the caller's zone is not known.
func WithZone(name string) Option {
	return option(func(cfg *config) error {
		if name == "" {
			return errors.New("WithZone: the name is empty: leave the option out if the zone is not known")
		}
		cfg.home = name
		return nil
	})
}

// WithAuthority sets the function that makes the authority out of the target.
// gRPC sends the authority in the ":authority" header and checks the server's
// certificate against it. Channels with grpc.WithAuthority, or with a server name
// in their credentials, do not use the function. The result must be a valid
// authority (RFC 3986, section 3.2). The function is called once per channel, and
// must not block.
//
// By default it is [DefaultAuthority].
func WithAuthority(f func(resolver.Target) string) Option {
	return option(func(cfg *config) error {
		if f == nil {
			return errors.New("WithAuthority: the function is nil")
		}
		cfg.authority = f
		return nil
	})
}

// WithSource makes a channel find its endpoints through src. The target's scheme
// is "belfry". Its path is the name of the service, for the authority (see
// [DefaultAuthority]) and for logs.
//
//	grpc.NewClient("belfry:///orders", discover.WithSource(src))
//
// A target with another scheme, or none, is resolved as if WithSource were not
// there, usually by DNS. The option affects no other channel. It may be used for
// several channels, each of which then watches src for itself.
//
// grpc.NewClient cannot refuse an option. The channel fails as soon as it connects
// if src is nil, an option is bad, or the channel is given two sources, or none
// for a target of this scheme. Then every call fails with UNAVAILABLE, and
// belfry.WaitReady returns an error. Both messages say what to write. Use
// [NewBuilder] to get the error of a bad option at once.
func WithSource(src Source, opts ...Option) grpc.DialOption {
	b := &builder{scheme: Scheme, only: true, cfg: &config{authority: DefaultAuthority}}
	cfg, err := newConfig(opts)
	switch {
	case err != nil:
		b.err = err
	case isnil.Value(src):
		b.err = errors.New("discover: WithSource: the source is nil: give it what List, Poll, Channel or another constructor has returned, and check its error")
	default:
		b.cfg, b.open = cfg, func(resolver.Target) (Source, error) { return src, nil }
	}
	return grpc.WithResolvers(b)
}

// init registers a builder that fails with what to do, for channels that were given no
// source.
func init() {
	resolver.Register(&builder{
		scheme: Scheme,
		cfg:    &config{authority: DefaultAuthority},
		err:    errors.New("discover: no source for a target of the scheme \"belfry\": add discover.WithSource(src) to the options of grpc.NewClient"),
	})
}

// NewBuilder returns a resolver builder for grpc.WithResolvers that serves
// targets of the given scheme with the sources that open returns for them.
// open is called each time a channel leaves idle, and may return the same
// source each time. It must not block, and must be safe for concurrent use. If it
// returns an error, calls on that channel fail with it.
//
// NewBuilder returns an error if the scheme is not a lower-case URL scheme
// (RFC 3986, section 3.1; gRPC finds no other schemes), open is nil, or an option
// is bad.
func NewBuilder(scheme string, open func(target resolver.Target) (Source, error), opts ...Option) (resolver.Builder, error) {
	if err := checkScheme(scheme); err != nil {
		return nil, err
	}
	if open == nil {
		return nil, fmt.Errorf("discover: scheme %q: the function that opens the source is nil", scheme)
	}
	cfg, err := newConfig(opts)
	if err != nil {
		return nil, err
	}
	return &builder{scheme: scheme, open: open, cfg: cfg}, nil
}

// Register serves targets of the given scheme, in all channels of the program,
// with the sources that open returns for them; see [NewBuilder]. open can read the
// target's authority in target.URL.Host, its path in target.Endpoint(), and
// options in target.URL.Query().
//
// Register returns the errors of NewBuilder, and an error if the scheme already
// has a resolver. Like resolver.Register it must be called while the program
// initialises (from an init function or early in main), before channels are
// created.
func Register(scheme string, open func(target resolver.Target) (Source, error), opts ...Option) error {
	b, err := NewBuilder(scheme, open, opts...)
	if err != nil {
		return err
	}
	if resolver.Get(scheme) != nil {
		return fmt.Errorf("discover: scheme %q: has a resolver already", scheme)
	}
	resolver.Register(b)
	return nil
}

func checkScheme(scheme string) error {
	for i, c := range []byte(scheme) {
		if 'a' <= c && c <= 'z' || i > 0 && ('0' <= c && c <= '9' || c == '+' || c == '-' || c == '.') {
			continue
		}
		return fmt.Errorf("discover: scheme %q: must be a lower-case letter, then lower-case letters, digits, '+', '-' or '.'", scheme)
	}
	if scheme == "" {
		return errors.New("discover: scheme is empty")
	}
	return nil
}

// builder is immutable.
type builder struct {
	scheme string
	only   bool // a channel may have no other for the scheme
	open   func(resolver.Target) (Source, error)
	cfg    *config
	err    error // why it cannot work; open is nil then
}

var _ resolver.AuthorityOverrider = (*builder)(nil)

// Scheme implements resolver.Builder.
func (b *builder) Scheme() string { return b.scheme }

// OverrideAuthority implements resolver.AuthorityOverrider.
func (b *builder) OverrideAuthority(target resolver.Target) string { return b.cfg.authority(target) }

// Build implements resolver.Builder. It starts to watch and does not wait.
func (b *builder) Build(target resolver.Target, cc resolver.ClientConn, opts resolver.BuildOptions) (resolver.Resolver, error) {
	if b.err != nil {
		return nil, b.err
	}
	if n := builders(cc, b.scheme); b.only && n > 1 {
		return nil, fmt.Errorf("discover: %s has %d sources: use WithSource once, and discover.Merge to combine sources", target, n)
	}
	src, err := b.openSafely(target)
	if err != nil {
		return nil, fmt.Errorf("discover: opening the source of %s: %w", target, err)
	}
	return newBridge(src, target, cc, opts, b.cfg), nil
}

func (b *builder) openSafely(target resolver.Target) (src Source, err error) {
	defer func() {
		if v := recover(); v != nil {
			logger.Errorf("%s: opening the source panicked: %v\n%s", target, v, debug.Stack())
			err = fmt.Errorf("panic: %v", v)
		}
	}()
	if src, err = b.open(target); err == nil && isnil.Value(src) {
		err = errors.New("the source is nil")
	}
	return src, err
}

// builders returns how many builders of this package a channel was given for a
// scheme, or 0 if it cannot find out. gRPC uses the first and silently ignores
// the others, so this reads unexported fields of the channel.
func builders(cc resolver.ClientConn, scheme string) (n int) {
	defer func() {
		if recover() != nil { // The fields are others now.
			n = 0
		}
	}()
	v := reflect.ValueOf(cc)
	if isDelegating(cc) {
		v = v.Elem().FieldByName("parent").Elem().FieldByName("cc").Elem()
	}
	given := v.Elem().FieldByName("cc").Elem().FieldByName("dopts").FieldByName("resolvers")
	for i := range given.Len() {
		b := given.Index(i).Elem()
		if b.Type() == reflect.TypeFor[*builder]() && b.Elem().FieldByName("scheme").String() == scheme {
			n++
		}
	}
	return n
}

// DefaultAuthority returns the authority of a target unless [WithAuthority]
// sets another function. It is the target's path as a DNS name, with the last
// element first: "belfry:///prod/payments" has the authority "payments.prod". A
// certificate can contain that name, but not gRPC's own default,
// "prod%2Fpayments". A port after the last element goes to the end. A path without
// a slash stays as it is, except that characters which an authority may not
// contain are escaped. A path that is empty gives the target's host. As in gRPC's
// default, a missing host becomes "localhost".
func DefaultAuthority(target resolver.Target) string {
	elems := strings.FieldsFunc(target.Endpoint(), func(r rune) bool { return r == '/' })
	port := ""
	if n := len(elems); n > 1 {
		if i := strings.LastIndexByte(elems[n-1], ':'); i >= 0 {
			elems[n-1], port = elems[n-1][:i], elems[n-1][i:]
		}
	}
	slices.Reverse(elems)
	name := strings.Join(elems, ".") + port
	if name == "" {
		name = target.URL.Host
	}
	if name == "" || name[0] == ':' {
		name = "localhost" + name
	}
	return escapeAuthority(name)
}

// escapeAuthority escapes the characters that RFC 3986, section 3.2, does not
// allow in an authority.
func escapeAuthority(s string) string {
	const allowed = "-_.~!$&'()*+,;=:[]@"
	var b strings.Builder
	for _, c := range []byte(s) {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || strings.IndexByte(allowed, c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
