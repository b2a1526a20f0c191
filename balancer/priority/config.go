// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package priority

import (
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/childpolicy"
	"github.com/belfry-go/belfry/internal/jsonfault"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// Defaults of the fields of belfry.config.v1.Priority.
const (
	defaultMinHealthy     = 0.5
	defaultReturnAfter    = 10 * time.Second
	defaultConnectTimeout = 10 * time.Second
)

// config is the checked form of belfry.config.v1.Priority. Immutable.
type config struct {
	serviceconfig.LoadBalancingConfig

	message        *configv1.Priority // as it was given
	minHealthy     float64
	returnAfter    time.Duration
	connectTimeout time.Duration
	child          childpolicy.Policy
}

// MarshalJSON returns the config as it was given, for parents that marshal the parsed
// config of their child and parse it again.
func (c *config) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.message) }

func parseConfig(js json.RawMessage) (*config, error) {
	m := &configv1.Priority{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(js, m); err != nil {
		ignore := func(string, protoreflect.MessageDescriptor) error { return nil }
		if f := jsonfault.Find(js, m.ProtoReflect().Descriptor(), ignore); f != nil && f.Path != "" {
			return nil, fmt.Errorf("%s: %s: %w", Name, f.Path, f.Err)
		}
		return nil, fmt.Errorf("%s: cannot parse config %s: %w", Name, js, err)
	}
	c := &config{
		message:        m,
		minHealthy:     defaultMinHealthy,
		returnAfter:    defaultReturnAfter,
		connectTimeout: defaultConnectTimeout,
	}
	if m.MinHealthy != nil {
		if c.minHealthy = m.GetMinHealthy(); !(c.minHealthy > 0 && c.minHealthy <= 1) {
			return nil, configError("minHealthy", c.minHealthy, "above 0 and at most 1")
		}
	}
	for _, f := range []struct {
		name  string
		value *durationpb.Duration
		to    *time.Duration
	}{{"returnAfter", m.GetReturnAfter(), &c.returnAfter}, {"connectTimeout", m.GetConnectTimeout(), &c.connectTimeout}} {
		if f.value == nil {
			continue
		}
		if *f.to = f.value.AsDuration(); *f.to < 0 {
			return nil, configError(f.name, *f.to, "at least 0s")
		}
	}
	var err error
	if c.child, err = childpolicy.Parse(m.GetChildPolicy(), p2c.Name); err != nil {
		return nil, fmt.Errorf("%s: %w", Name, err)
	}
	return c, nil
}

func configError(field string, value any, rule string) error {
	return fmt.Errorf("%s: %s: %v, must be %s", Name, field, value, rule)
}
