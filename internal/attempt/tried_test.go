// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"context"
	"testing"
)

func TestWithTried(t *testing.T) {
	type other struct{}
	base := context.WithValue(NewContext(context.Background(), &Info{Tracker: "tracker"}), other{}, "value")
	ctx, tried := WithTried(base)
	if info := FromContext(ctx); info == nil || info.Tracker != "tracker" || info.Tried != tried {
		t.Fatalf("FromContext(ctx) = %+v, want the tracker and the returned Tried", info)
	}
	if got := ctx.Value(other{}); got != "value" {
		t.Errorf("a value of the context around it = %v, want %q", got, "value")
	}
	if again, same := WithTried(ctx); again != ctx || same != tried {
		t.Errorf("WithTried of its own result made another one")
	}
	if got := testing.AllocsPerRun(100, func() { WithTried(base) }); got > 1 {
		t.Errorf("WithTried allocates %v times, want once", got)
	}
}
