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

// config is what the options set. It is shared by the channels of a builder and
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
// up to MaxDelay, each delay varied by up to the fraction Jitter to both
// sides. After a watch that was synced, or that lasted as long as MaxDelay, it
// starts over with BaseDelay. The zero fields of c are taken as they stand, so begin with
// backoff.DefaultConfig. It holds for the sources of a [Merge] too.
//
// By default it is gRPC's backoff for connections, backoff.DefaultConfig: 1 s,
// 1.6, 120 s, 0.2. BaseDelay must be positive, MaxDelay at least BaseDelay,
// Multiplier at least 1 and finite, Jitter from 0 to 1.
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
// As long as there is no set at all, what the watch has inserted after that time
// is taken for the set. If it has inserted nothing, an error is reported to the
// channel, so that calls fail instead of hanging (those that wait for ready still
// wait), and the source gets as long again.
//
// Once there is a complete set, no timeout replaces it: a watch that was started
// after a failure and is late is reported, and the set stays until it says
// Synced.
//
// By default 15 s. It must be positive. A source that never says Synced must be
// wrapped in [Settle].
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
// become empty, until it has endpoints again. It guards against a discovery
// system that forgets everything at once, at the price of calls to servers
// that may be gone. The first set is published even if it is empty.
//
// By default an empty set is published as such, and calls fail.
func WithKeepOnEmpty() Option {
	return option(func(cfg *config) error {
		cfg.keepOnEmpty = true
		return nil
	})
}

// WithAddresses also publishes the endpoints as the flat list of addresses
// that balancing policies built on google.golang.org/grpc/balancer/base read.
// Such a policy takes each address for a server of its own.
//
// By default only endpoints are published, which gRPC's own policies and
// belfry's use.
func WithAddresses() Option {
	return option(func(cfg *config) error {
		cfg.addresses = true
		return nil
	})
}

// WithZone says in which zone the caller is, by the name that [Zone] gives to the zone of
// an endpoint. The policy belfry.p2c prefers endpoints in that zone if its field zones
// says so, and takes a name in its config or in the environment before this one. The name
// must not be empty.
func WithZone(name string) Option {
	return option(func(cfg *config) error {
		if name == "" {
			return errors.New("WithZone: the name is empty: leave the option out if the zone is not known")
		}
		cfg.home = name
		return nil
	})
}

// WithAuthority sets what becomes of the target in the ":authority" header and
// in the check of the server's certificate, for channels that have neither
// grpc.WithAuthority nor a server name in their credentials. The result must be
// a valid authority (RFC 3986, section 3.2). The function is called once per
// channel, and must not block.
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

// WithSource makes a channel find its endpoints through src: the target's
// scheme is "belfry", its path the name of the service, for the authority (see
// [DefaultAuthority]) and for logs.
//
//	grpc.NewClient("belfry:///orders", discover.WithSource(src))
//
// A target with another scheme, or none, is resolved as if WithSource were not
// there, by DNS as a rule. The option affects no other channel; it may be used
// for several, each of which then watches src for itself.
//
// grpc.NewClient cannot refuse an option. If src is nil, an option is bad, a
// channel is given two sources, or none for a target of this scheme, the channel
// fails as soon as it connects: every call fails with UNAVAILABLE, and
// belfry.WaitReady returns, with a message that says what to write. Use
// [NewBuilder] to learn of bad options at once.
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

// init serves the targets of channels that were given no source.
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
// source each time; it must not block, and must be safe for concurrent use. Its
// error fails the calls on that channel.
//
// NewBuilder returns an error if the scheme is not a lower-case URL scheme
// (RFC 3986, section 3.1: gRPC finds no other), open is nil, or an option is
// bad.
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
// with the sources that open returns for them; see [NewBuilder]. What open needs
// to know stands in the target: its authority in target.URL.Host, its path in
// target.Endpoint(), options in target.URL.Query().
//
// Register returns the errors of NewBuilder, and one if the scheme has a
// resolver already. Like resolver.Register it may only be called while the
// program initialises (from an init function or early in main), not while
// channels are made.
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

// Build implements resolver.Builder: it begins to watch and does not wait.
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
// scheme, or 0 if that cannot be seen. gRPC uses the first and says nothing of
// the others, so this looks into the channel.
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
// says otherwise: its path as a DNS name, the last element first, so that
// "belfry:///prod/payments" has the authority "payments.prod", which a
// certificate can name. (gRPC's own default would be "prod%2Fpayments", which
// none can.) A port after the last element goes to the end. Names without a
// slash stand as they are, what an authority may not contain is escaped, and as
// in gRPC's default a missing host is "localhost".
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

// escapeAuthority escapes what RFC 3986, section 3.2, does not allow in an
// authority.
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
