// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackfile

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/grpclog"

	_ "github.com/belfry-go/belfry/balancer/aperture" // belfry.aperture
	"github.com/belfry-go/belfry/balancer/p2c"
	_ "github.com/belfry-go/belfry/balancer/priority" // belfry.priority
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	"github.com/belfry-go/belfry/internal/check"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file/internal/follow"
)

var logger = grpclog.Component("belfry-stackfile")

// An Option changes what [Open] makes.
type Option func(*options)

type options struct {
	errs     *check.Errors
	stack    []stackconfig.Option
	onReload func(Reload)
}

// WithStackOptions supplies what a file cannot contain: observers, functions, and layers
// that the program defines. See [stackconfig.NewStackFromConfig]. If it is given more
// than once, the options add up. By default there are none.
func WithStackOptions(opts ...stackconfig.Option) Option {
	return func(o *options) { o.stack = append(o.stack, opts...) }
}

// A Reload says what a change of the file has done.
type Reload struct {
	// Changes are the layers and budgets whose state started or ended.
	Changes stackconfig.Changes
	// Err is why nothing has changed, or nil if the file is in use. A fault in a field is
	// a [*stackconfig.Error].
	Err error
}

// WithOnReload calls f after each change of the file, even if the file cannot be used,
// and when a file that could not be read can be read again. Calls do not overlap. The
// next change waits for f. So does [File.Close], so f must not call it.
//
// By default changes are only logged: errors as warnings, others as information.
func WithOnReload(f func(Reload)) Option {
	return func(o *options) {
		o.errs.NotNil(f == nil, "WithOnReload", "a function")
		o.onReload = f
	}
}

// File is a stack and a balancing config that follow a file. Its methods are safe for
// concurrent use.
type File struct {
	path     string
	onReload func(Reload) // nil if there is none
	stack    *stackconfig.Stack
	cancel   context.CancelFunc
	done     chan struct{} // closed when the file is not followed any more

	mu            sync.Mutex    // guards what is below
	serviceConfig string        // JSON
	changed       chan struct{} // closed when serviceConfig changes
}

// Open reads the file at path, makes a stack of it, and follows the file until Close.
// It returns an error if the file cannot be read or has a fault, and an
// [*interceptor.ConfigError] if an option is not valid or the path is empty.
//
// [*interceptor.ConfigError]: https://pkg.go.dev/github.com/belfry-go/belfry/interceptor#ConfigError
func Open(path string, opts ...Option) (*File, error) {
	o := options{errs: check.Of("stackfile")}
	check.Options(o.errs, &o, opts)
	o.errs.Require(path != "", "path", path, "must not be empty")
	if err := o.errs.Err(); err != nil {
		return nil, err
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("stackfile: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	f := &File{path: path, onReload: o.onReload, cancel: cancel, done: make(chan struct{}), changed: make(chan struct{})}
	next, stop := iter.Pull2(follow.Texts(ctx, path))
	if err := f.begin(next, o.stack); err != nil {
		cancel()
		stop()
		return nil, fmt.Errorf("stackfile: %w", err)
	}
	go func() {
		defer close(f.done)
		defer stop()
		for {
			text, err, ok := next()
			if !ok {
				return
			}
			f.reload(text, err)
		}
	}()
	return f, nil
}

// begin makes the stack of the first text.
func (f *File) begin(next func() ([]byte, error, bool), opts []stackconfig.Option) error {
	text, err, _ := next()
	if err != nil {
		return err
	}
	d, err := parse(text)
	if err == nil {
		f.serviceConfig = d.serviceConfig
		f.stack, err = stackconfig.NewStackFromConfig(d.stack, opts...)
		err = below(err)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	return nil
}

// reload applies a text, if it is valid, and reports the result. err is the error of
// reading the file.
func (f *File) reload(text []byte, err error) {
	var r Reload
	if err == nil {
		if r.Changes, err = f.apply(text); err != nil {
			err = fmt.Errorf("%s: %w", f.path, err)
		}
	}
	if err != nil {
		r.Err = fmt.Errorf("stackfile: %w", err)
		logger.Warningf("nothing has changed: %v", r.Err)
	} else {
		logger.Infof("%s: reloaded; state that started: %q, that ended: %q", f.path, r.Changes.Began, r.Changes.Ended)
	}
	if f.onReload != nil {
		f.onReload(r)
	}
}

func (f *File) apply(text []byte) (stackconfig.Changes, error) {
	d, err := parse(text)
	if err != nil {
		return stackconfig.Changes{}, err
	}
	changes, err := f.stack.Update(d.stack)
	if err != nil {
		return stackconfig.Changes{}, below(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.serviceConfig != d.serviceConfig {
		f.serviceConfig = d.serviceConfig
		close(f.changed)
		f.changed = make(chan struct{})
	}
	return changes, nil
}

// Stack returns the stack, which is the same for the life of the File. If the program
// calls its Update, that holds until the file changes.
func (f *File) Stack() *stackconfig.Stack { return f.stack }

// Source returns a source of the endpoints of src that also gives channels the balancing
// config of the file. It replaces any service config of src and the program's default
// service config. Do not dial the channels with grpc.WithDisableServiceConfig, which
// ignores it. The keys of the endpoints are those that [discover.Merge] makes.
//
// Source returns an error if src is nil. The source may be used by as many channels as
// src may, and keeps the last balancing config after Close.
func (f *File) Source(src discover.Source) (discover.Source, error) {
	return discover.Merge(balancing{f}, src)
}

// Close stops following the file, and waits for a reload that is in progress. The stack
// stays as it is and can still be used. Close may be called more than once.
func (f *File) Close() {
	f.cancel()
	<-f.done
}

// balancing is a source that has no endpoints, only the service config of a file.
type balancing struct{ file *File }

// Watch implements [discover.Source].
func (b balancing) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) {
		for {
			b.file.mu.Lock()
			config, changed := b.file.serviceConfig, b.file.changed
			b.file.mu.Unlock()
			if !yield(discover.Batch(discover.ServiceConfig(config), discover.Synced()), nil) {
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}
}

// document is the parsed content of a file.
type document struct {
	stack         *configv1.Stack
	serviceConfig string // JSON
}

// defaultPolicies is the loadBalancingConfig of a file that has none.
const defaultPolicies = `[{"` + p2c.Name + `":{}}]`

// parse parses a document. It checks everything except the values in the stack.
func parse(text []byte) (document, error) {
	js, err := follow.JSON(text)
	if err != nil {
		return document{}, err
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(js, &fields); err != nil || fields == nil {
		return document{}, errors.New("must have the fields loadBalancingConfig and stack, or {}")
	}
	stack, policies := []byte(`{}`), []byte(defaultPolicies)
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		switch name {
		case "stack":
			stack = fields[name]
		case "loadBalancingConfig":
			policies = fields[name]
		default:
			return document{}, wrong(name, errors.New("unknown field, must be one of loadBalancingConfig, stack"))
		}
	}
	if err := checkPolicies(policies); err != nil {
		return document{}, wrong("loadBalancingConfig", err)
	}
	config, err := stackconfig.Parse(stack)
	if err != nil {
		return document{}, below(err)
	}
	return document{config, `{"loadBalancingConfig":` + string(policies) + `}`}, nil
}

// checkPolicies parses a loadBalancingConfig as gRPC does: the first known policy is
// used. It ignores the configs of the others.
func checkPolicies(js []byte) error {
	var policies []map[string]json.RawMessage
	if err := json.Unmarshal(js, &policies); err != nil || policies == nil {
		return errors.New("must be a list of policies, such as [{belfry.p2c: {}}]")
	}
	var names []string
	for i, p := range policies {
		if len(p) != 1 {
			return fmt.Errorf("entry %d has %d fields, must have one: the name of a policy", i, len(p))
		}
		for name, config := range p {
			names = append(names, name)
			b := balancer.Get(name)
			if b == nil {
				continue
			}
			if bytes.Equal(config, []byte("null")) { // YAML has one where nothing is written.
				return fmt.Errorf("entry %d: %s: null, must be an object, such as {}", i, name)
			}
			if parser, ok := b.(balancer.ConfigParser); ok {
				if _, err := parser.ParseConfig(config); err != nil {
					return fmt.Errorf("entry %d: %w", i, err)
				}
			}
			return nil
		}
	}
	return fmt.Errorf("%s: no policy that this program has", strings.Join(names, ", "))
}

func wrong(field string, err error) error { return &stackconfig.Error{Field: field, Err: err} }

// below puts "stack" in front of the field path in an error of package stackconfig.
func below(err error) error {
	var e *stackconfig.Error
	if !errors.As(err, &e) {
		return err
	}
	field := "stack"
	if e.Field != "" {
		field += "." + e.Field
	}
	return wrong(field, e.Err)
}
