// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package aperture

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"

	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/internal/childpolicy"
	"github.com/belfry-go/belfry/internal/jsonfault"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// Ranges and defaults of the fields of belfry.config.v1.Aperture.
const (
	maxPeers     = 1_000_000
	defaultLeast = 12 // as in Finagle
	maxLeast     = 10_000
)

// config is the checked form of belfry.config.v1.Aperture. Immutable.
type config struct {
	serviceconfig.LoadBalancingConfig

	message *configv1.Aperture // as it was given
	subset  subset
	child   childpolicy.Policy
}

// MarshalJSON returns the config as it was given, for parents that marshal the parsed
// config of their child and parse it again.
func (c *config) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.message) }

func parseConfig(js json.RawMessage) (*config, error) {
	m := &configv1.Aperture{}
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(js, m); err != nil {
		ignore := func(string, protoreflect.MessageDescriptor) error { return nil }
		if f := jsonfault.Find(js, m.ProtoReflect().Descriptor(), ignore); f != nil && f.Path != "" {
			return nil, fmt.Errorf("%s: %s: %w", Name, f.Path, f.Err)
		}
		return nil, fmt.Errorf("%s: cannot parse config %s: %w", Name, js, err)
	}
	c := &config{message: m, subset: subset{least: defaultLeast}}
	ordinal, err := number("ordinal", m.Ordinal, m.GetOrdinalEnv())
	if err != nil {
		return nil, err
	}
	peers, err := number("peers", m.Peers, m.GetPeersEnv())
	if err != nil {
		return nil, err
	}
	if peers < 1 || peers > maxPeers {
		return nil, configError("peers", peers, fmt.Sprintf("between 1 and %d", maxPeers))
	}
	c.subset.ordinal, c.subset.peers = ordinal, peers
	if m.MinEndpoints != nil {
		if v := m.GetMinEndpoints(); v < 1 || v > maxLeast {
			return nil, configError("minEndpoints", v, fmt.Sprintf("between 1 and %d", maxLeast))
		}
		c.subset.least = int(m.GetMinEndpoints())
	}
	if c.child, err = childpolicy.Parse(m.GetChildPolicy(), p2c.Name); err != nil {
		return nil, fmt.Errorf("%s: %w", Name, err)
	}
	return c, nil
}

// number returns the value of a field, or that of the environment variable that another
// field names.
func number(field string, v *uint32, env string) (int, error) {
	switch {
	case v != nil:
		return int(*v), nil
	case env == "":
		return 0, fmt.Errorf("%s: %s: not set, must be set, or %sEnv", Name, field, field)
	}
	text := os.Getenv(env)
	digits := text[len(strings.TrimRight(text, "0123456789")):]
	n, err := strconv.ParseUint(digits, 10, 31)
	if err != nil || field == "peers" && digits != text {
		rule := "a number"
		if field == "ordinal" {
			rule = "a number, or a name that ends in one"
		}
		return 0, fmt.Errorf("%s: %sEnv: the environment variable %s is %q, must be %s", Name, field, env, text, rule)
	}
	return int(n), nil
}

func configError(field string, value any, rule string) error {
	return fmt.Errorf("%s: %s: %v, must be %s", Name, field, value, rule)
}
