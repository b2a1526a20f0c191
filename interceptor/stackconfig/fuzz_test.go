// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"errors"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// FuzzParseStack checks that no config panics, that what is wrong is an *Error, and
// that a config that is accepted is the same when it is marshalled and parsed
// again, and makes a stack and an update of one, and of any other an empty one.
func FuzzParseStack(f *testing.F) {
	for _, c := range bad {
		f.Add([]byte(c.js))
	}
	f.Add([]byte(identities))
	f.Add([]byte(`{"methodConfig": [{"name": [{"service": "s.S", "method": "M"}], "layers": [
		{"timeout": {"call": "1s", "adaptive": {"min": "0.1s"}, "idle": "3s"}}, {"hedge": {"budget": "b"}}, {"retry": {"budget": "b", "backoff": {"jitter": "JITTER_EQUAL"}}},
		{"throttle": {"perMethod": true}}, {"breaker": {"slowCall": "1s", "slowCallRatio": 0.5, "perMetadata": "k"}}, {"failFast": {}}, {"loadShed": {}},
		{"buffer": {"size": 3}}, {"rateLimit": {"limit": 3, "perMethod": true}}, {"concurrency": {"gradient2": {}, "discipline": "DISCIPLINE_CODEL"}}]}],
		"budgets": {"b": {"ratio": 0, "minPerSecond": 1.5}}}`))
	f.Fuzz(func(t *testing.T, js []byte) {
		m, err := Parse(js)
		e := (*Error)(nil)
		if err != nil {
			if !errors.As(err, &e) {
				t.Fatalf("Parse: error %v, want an *Error", err)
			}
			return
		}
		s, err := NewStackFromConfig(m)
		if err != nil {
			if !errors.As(err, &e) {
				t.Fatalf("NewStackFromConfig: error %v, want an *Error", err)
			}
			return
		}
		again, err := protojson.Marshal(s.Config())
		if err != nil {
			t.Fatalf("a config that was accepted cannot be marshalled: %v", err)
		}
		n, err := Parse(again)
		if err != nil {
			t.Fatalf("a config that was accepted and marshalled cannot be parsed: %v\n%s", err, again)
		}
		if !proto.Equal(m, n) {
			t.Fatalf("a config that was accepted, marshalled and parsed is\n%v\nwant\n%v", n, m)
		}
		before := s.String()
		for range 2 {
			if _, err := s.Update(n); err != nil {
				t.Fatalf("a config that was accepted does not update its own stack: %v", err)
			}
			if got := s.String(); got != before {
				t.Fatalf("after an update to the same config the stack is %s, want %s", got, before)
			}
		}
		if _, err := s.Update(&configv1.Stack{}); err != nil {
			t.Fatalf("an update to the empty config: %v", err)
		}
	})
}
