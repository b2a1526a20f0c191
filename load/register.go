// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package load

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"sync"
)

// registry is the metrics that can be named in a service config.
var registry struct {
	mu    sync.Mutex // guards parse
	parse map[string]func(json.RawMessage) (Metric, error)
}

// Register makes a Metric of one's own available to the service config of policy
// belfry.p2c under a name:
//
//	{"loadBalancingConfig":[{"belfry.p2c":{"load":{"custom":{"name":"mine","config":{}}}}}]}
//
// parse gets the JSON of config, "{}" if there is none, and returns a new Metric
// for a channel, or an error that says what is wrong with it. It is called when
// the config is parsed, to check it, and by each channel that uses it, and must be
// safe for concurrent use.
//
// Call Register from an init function. It panics if the name is empty or taken.
func Register(name string, parse func(config json.RawMessage) (Metric, error)) {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	if name == "" || parse == nil {
		panic("load: Register needs a name and a function")
	}
	if _, taken := registry.parse[name]; taken {
		panic(fmt.Sprintf("load: metric %q is registered already", name))
	}
	if registry.parse == nil {
		registry.parse = make(map[string]func(json.RawMessage) (Metric, error))
	}
	registry.parse[name] = parse
}

// New returns a new Metric of those that were registered. The error of an unknown
// name lists the known ones.
func New(name string, config json.RawMessage) (Metric, error) {
	registry.mu.Lock()
	parse := registry.parse[name]
	registry.mu.Unlock()
	if parse == nil {
		return nil, &ConfigError{"name", name, fmt.Sprintf("a registered metric, of which there are %q", Registered())}
	}
	if len(config) == 0 {
		config = json.RawMessage("{}")
	}
	m, err := parse(config)
	if err == nil && m == nil {
		err = fmt.Errorf("load: metric %q: neither a metric nor an error was made", name)
	}
	return m, err
}

// Registered returns the names of the registered metrics in order.
func Registered() []string {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	return slices.Sorted(maps.Keys(registry.parse))
}
