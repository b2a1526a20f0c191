// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package kubernetes

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"net/url"
	"strings"
	"sync"

	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/validation"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/belfry-go/belfry/internal/told"
	"github.com/belfry-go/belfry/resolver/discover"
)

// An Option changes what [New] makes.
type Option interface{ apply(*source) error }

type option func(*source) error

func (o option) apply(s *source) error { return o(s) }

// Hints makes the source follow the hints of topology aware routing
// (https://kubernetes.io/docs/concepts/services-networking/topology-aware-routing/)
// for a client in the given zone, by the rule of kube-proxy. If all ready endpoints
// have hints, and the hints of at least one name the zone, only the endpoints whose
// hints name it are used. Otherwise all are used. The zone must not be empty.
//
// By default hints are ignored.
func Hints(zone string) Option {
	return option(func(s *source) error {
		if zone == "" {
			return errors.New("Hints: the zone is empty: must be the zone of this client; leave the option out if it is not known")
		}
		s.zone = zone
		return nil
	})
}

// New returns a source of the endpoints of a service. The target is
// "namespace/service:port". The port is the name of a port of the service, or the
// number of its targetPort, which the servers listen on. It may be left out if the
// service has only one port. Ports other than TCP are ignored.
//
// New returns an error if cfg is nil or not valid, if target has another form, or
// if an option is bad. It does not connect. The cfg is copied. The source may be used
// by any number of channels, each of which watches the API server separately.
func New(cfg *rest.Config, target string, opts ...Option) (discover.Source, error) {
	if cfg == nil {
		return nil, errors.New("kubernetes: the config is nil")
	}
	s, err := parseTarget(target)
	if err != nil {
		return nil, fmt.Errorf("kubernetes: target %q: %w", target, err)
	}
	for i, opt := range opts {
		if opt == nil {
			return nil, fmt.Errorf("kubernetes: option %d is nil", i)
		}
		if err := opt.apply(&s); err != nil {
			return nil, fmt.Errorf("kubernetes: %w", err)
		}
	}
	if s.client, err = newClient(cfg); err != nil {
		return nil, fmt.Errorf("kubernetes: %w", err)
	}
	return s, nil
}

func parseTarget(target string) (source, error) {
	var s source
	var ok bool
	s.namespace, s.service, ok = strings.Cut(target, "/")
	if !ok {
		return source{}, errors.New("must be namespace/service:port")
	}
	s.service, s.port, ok = strings.Cut(s.service, ":")
	for what, name := range map[string]string{"namespace": s.namespace, "service": s.service} {
		if problems := validation.IsDNS1123Label(name); len(problems) > 0 {
			return source{}, fmt.Errorf("%s %q: %s", what, name, problems[0])
		}
	}
	if problems := validation.IsDNS1123Label(s.port); ok && len(problems) > 0 {
		return source{}, fmt.Errorf("port %q: must be the name of a port or a number: %s", s.port, problems[0])
	}
	return s, nil
}

// newClient returns a client for EndpointSlices only, because one for all kinds of
// objects makes the program much larger.
func newClient(cfg *rest.Config) (rest.Interface, error) {
	scheme := runtime.NewScheme()
	if err := discoveryv1.AddToScheme(scheme); err != nil {
		return nil, err
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"}) // for errors
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath = "/apis"
	cfg.GroupVersion = &discoveryv1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	if cfg.UserAgent == "" {
		cfg.UserAgent = rest.DefaultKubernetesUserAgent()
	}
	return rest.RESTClientFor(cfg)
}

// source is immutable.
type source struct {
	client             rest.Interface
	namespace, service string
	port               string // "": the only one
	zone               string // of Hints
}

// Watch implements [discover.Source].
func (s source) Watch(ctx context.Context) iter.Seq2[discover.Change, error] {
	return func(yield func(discover.Change, error) bool) {
		ctx, cancel := context.WithCancel(ctx)
		var running sync.WaitGroup
		defer running.Wait()
		defer cancel()

		changed := make(chan struct{}, 1)
		change := func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		}
		failed := make(chan error)
		answered := make(chan struct{}, 1)
		lists := cache.NewFilteredListWatchFromClient(s.client, "endpointslices", s.namespace, func(o *metav1.ListOptions) {
			o.LabelSelector = discoveryv1.LabelServiceName + "=" + s.service
		})
		start := lists.WatchFuncWithContext
		lists.WatchFuncWithContext = func(ctx context.Context, o metav1.ListOptions) (apiwatch.Interface, error) {
			w, err := start(ctx, o)
			switch {
			case err == nil:
				select {
				case answered <- struct{}{}:
				default:
				}
			case utilnet.IsConnectionRefused(err) || apierrors.IsTooManyRequests(err):
				err = &unavailable{err}
			}
			return w, err
		}
		informer := cache.NewSharedIndexInformer(lists, &discoveryv1.EndpointSlice{}, 0, cache.Indexers{})
		err := informer.SetWatchErrorHandlerWithContext(func(_ context.Context, _ *cache.Reflector, err error) {
			// These ends of a watch are normal: the API server ends every watch after
			// some minutes. An EOF that is a failure is wrapped in another error.
			if err == io.EOF || err == io.ErrUnexpectedEOF || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
				return
			}
			select {
			case failed <- err:
			case <-ctx.Done():
			}
		})
		if err == nil {
			_, err = informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
				AddFunc:    func(any) { change() },
				UpdateFunc: func(any, any) { change() },
				DeleteFunc: func(any) { change() },
			})
		}
		if err != nil {
			yield(discover.Change{}, fmt.Errorf("kubernetes: %w", err))
			return
		}
		running.Go(func() { informer.RunWithContext(ctx) })
		running.Go(func() {
			// There is no event if the service has no slices.
			if cache.WaitForCacheSync(ctx.Done(), informer.HasSynced) {
				change()
			}
		})

		w := watch{source: s, yield: yield, stop: cancel}
		for {
			select {
			case <-ctx.Done():
				return
			case err := <-failed:
				w.report(ctx, err)
			case <-answered:
				w.recovered(ctx)
			case <-changed:
				if informer.HasSynced() {
					w.update(ctx, informer.GetStore().List())
				}
			}
		}
	}
}

// watch is one watch of a source. It belongs to one goroutine.
type watch struct {
	source
	yield func(discover.Change, error) bool
	stop  context.CancelFunc

	set map[string]backend // as last yielded; nil before the first

	failing bool // an error was reported, and no set is complete since
	faulty  bool // the slices have an error in them

	told told.Errors // since the API server answered last
}

// unavailable hides from client-go that the API server cannot be reached or is overloaded.
// Otherwise client-go would try again without reporting the error, even after the watch
// has ended.
type unavailable struct{ err error }

func (e *unavailable) Error() string { return e.err.Error() }

// update yields the changes from the last set to the one in the slices.
func (w *watch) update(ctx context.Context, slices []any) {
	next, err := w.backends(slices)
	// If no endpoint can be used, the last set stays, because it may still be good.
	if err == nil || len(next) > 0 {
		var changes []discover.Change
		for key, b := range next {
			if before, ok := w.set[key]; !ok || before != b {
				changes = append(changes, discover.Insert(key, b.endpoint()))
			}
		}
		for key := range w.set {
			if _, ok := next[key]; !ok {
				changes = append(changes, discover.Remove(key))
			}
		}
		// Later sets do not end with Synced, except the first good one after an error.
		// So the resolver waits a moment before it publishes: an endpoint that moves
		// from one slice to another may be in neither for that time.
		if w.set == nil || w.failing && err == nil {
			changes = append(changes, discover.Synced())
			w.failing = false
		}
		w.set = next
		w.tell(ctx, changes)
	}
	if w.faulty = err != nil; err != nil {
		w.report(ctx, err)
	}
}

// recovered is called when the API server has answered. It says that the set is good
// again after an error. If nothing has changed meanwhile, no update says so.
func (w *watch) recovered(ctx context.Context) {
	w.told.Forget()
	if w.failing && !w.faulty && w.set != nil {
		w.failing = false
		w.tell(ctx, []discover.Change{discover.Synced()})
	}
}

func (w *watch) tell(ctx context.Context, changes []discover.Change) {
	if len(changes) > 0 && ctx.Err() == nil && !w.yield(discover.Batch(changes...), nil) {
		w.stop()
	}
}

// report yields an error, unless it was reported already.
func (w *watch) report(ctx context.Context, err error) {
	what, cause := err.Error(), err
	if hidden := (*unavailable)(nil); errors.As(err, &hidden) {
		cause = hidden.err
	}
	// The whole text may contain a port or a timeout that is different each time.
	var request *url.Error
	var operation *net.OpError
	switch {
	case errors.As(cause, &operation):
		what = operation.Op + ": " + operation.Err.Error()
	case errors.As(cause, &request):
		what = request.Err.Error()
	}
	w.failing = true
	if ctx.Err() != nil || !w.told.First(what) {
		return
	}
	if !w.yield(discover.Change{}, fmt.Errorf("kubernetes: %s/%s: %w", w.namespace, w.service, err)) {
		w.stop()
	}
}
