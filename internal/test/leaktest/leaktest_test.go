// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package leaktest

import (
	"testing"
	"time"
)

func TestMain(m *testing.M) { Main(m) }

func TestFind(t *testing.T) {
	stop := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		<-stop
	}()
	if err := find(0); err == nil {
		t.Error("find with a goroutine that waits: nil, want an error")
	}
	time.AfterFunc(time.Second, func() { close(stop) }) // Later than goleak waits.
	if err := find(patience); err != nil {
		t.Errorf("find with a goroutine that ends a second later: %v, want nil", err)
	}
	<-ended
}
