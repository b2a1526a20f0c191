// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"testing"

	_ "google.golang.org/grpc/balancer/randomsubsetting" // a parent that marshals its child's config
)

func TestUnderRandomSubsettingOnlyTheSubsetGetsCalls(t *testing.T) {
	t.Parallel()
	w := newWire(t, newServers(t, 6), wireConfig{policy: `"memory":0,"choiceCount":2,"load":{"constant":{}}`,
		service: `{"loadBalancingConfig":[{"random_subsetting_experimental":{"subsetSize":2,"childPolicy":[%s]}}]}`})
	w.until("two servers answer", 50, func(m map[string]int) bool { return len(m) == 2 && m[""] == 0 })
	if got := w.counts(200); len(got) != 2 {
		t.Errorf("calls by server are %v, want two servers", got)
	}
	// The config went through marshal and parse on its way.
	p := policiesOf(w.target)[0]
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.picker.config.memory != 0 || p.picker.config.choices != 2 {
		t.Errorf("%d choices and memory %d, want 2 and 0", p.picker.config.choices, p.picker.config.memory)
	}
	if _, ok := p.picker.config.metric.(constant); !ok {
		t.Errorf("metric is %T, want constant", p.picker.config.metric)
	}
}
