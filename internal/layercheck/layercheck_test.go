// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package layercheck_test

import (
	"testing"
	"time"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/check"
	"github.com/belfry-go/belfry/internal/layercheck"
)

func TestKeys(t *testing.T) {
	method, tenant := interceptor.KeyBy{Method: true}, interceptor.KeyBy{Metadata: "tenant"}
	for _, test := range []struct {
		by   interceptor.KeyBy
		old  *interceptor.KeyBy
		most int
		idle time.Duration
		err  string
	}{
		{by: method},
		{by: tenant, old: &tenant, most: 1, idle: time.Second},
		{by: interceptor.KeyBy{Method: true, Metadata: "tenant"},
			err: `x: KeyBy is Method and Metadata "tenant", must have at most one of Method, Metadata and Func`},
		{by: method, old: &tenant, err: `x: KeyBy is Method, must stay Metadata "tenant": make a new layer`},
		{most: -1, err: "x: MaxKeys is -1, must be from 1 to 1000000, or 0 for 10000"},
		{idle: time.Millisecond, err: "x: KeyIdle is 1ms, must be at least 1s, or 0 for 10m"},
	} {
		e := check.Of("x")
		layercheck.Keys(e, test.by, test.old, &test.most, &test.idle)
		err := ""
		if e := e.Err(); e != nil {
			err = e.Error()
		}
		if err != test.err {
			t.Errorf("KeyBy %v after %v: error %q, want %q", test.by, test.old, err, test.err)
		}
		if test.most < 1 || test.idle < time.Second {
			t.Errorf("KeyBy %v: MaxKeys %d, KeyIdle %v, want the defaults", test.by, test.most, test.idle)
		}
	}
}
