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

// registry holds the metrics that a service config can name.
var registry struct {
	mu    sync.Mutex // guards parse
	parse map[string]func(json.RawMessage) (Metric, error)
}

// Register makes your own Metric available to the service config of policy belfry.p2c
// under a name:
//
//	{"loadBalancingConfig":[{"belfry.p2c":{"load":{"custom":{"name":"mine","config":{}}}}}]}
//
// parse gets the JSON of config, "{}" if there is none. It returns a new Metric for a
// channel, or an error that says what is wrong with the config. It is called to check
// each config, and once more by each channel that uses it. It must be safe for
// concurrent use.
//
// Call Register from an init function. It panics if the name is empty or taken, or if
// parse is nil.
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

// New returns a new Metric of a registered name. For an unknown name the error is a
// *[ConfigError] that lists the registered names; any other is the error of the function
// that was registered. Empty config means "{}". New is safe for concurrent use.
func New(name string, config json.RawMessage) (Metric, error) {
	registry.mu.Lock()
	parse := registry.parse[name]
	registry.mu.Unlock()
	if parse == nil {
		return nil, &ConfigError{"name", name, fmt.Sprintf("one of the registered metrics %q", Registered())}
	}
	if len(config) == 0 {
		config = json.RawMessage("{}")
	}
	m, err := parse(config)
	if err == nil && m == nil {
		err = fmt.Errorf("load: metric %q: its function returned neither a metric nor an error", name)
	}
	return m, err
}

// Registered returns the names of the registered metrics, sorted. It is safe for
// concurrent use.
func Registered() []string {
	registry.mu.Lock()
	defer registry.mu.Unlock()
	return slices.Sorted(maps.Keys(registry.parse))
}
