// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maxage

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Reopen opens a stream again whenever it has ended. The zero value is the default.
type Reopen struct {
	// Initial is the back-off after the first failure. It doubles with each in a row, up to
	// Max. 0 or less is the default, 100 ms.
	Initial time.Duration
	// Max is the longest back-off. Less than Initial is the default, 10 s or Initial if that
	// is longer.
	Max time.Duration
}

// Run calls session until it returns nil, or an error after which it makes no sense to
// begin again, which Run returns. session opens a stream, continues where the one before
// has ended, and returns the stream's error.
//
// After an [Ended] Run calls session again at once. After UNAVAILABLE, or a session that
// was Ended when it had not lasted for Initial, it waits: a random part of the back-off,
// which is Initial again after a session that has lasted for Max. Other errors are the
// caller's to judge: to begin again after one, session wraps it with the code UNAVAILABLE.
//
// If ctx ends Run returns the error of the last session, or ctx's if that was none. Run
// may be called concurrently.
func (r Reopen) Run(ctx context.Context, session func(context.Context) error) error {
	first := r.Initial
	if first <= 0 {
		first = 100 * time.Millisecond
	}
	most := r.Max
	if most < first {
		most = max(10*time.Second, first)
	}
	backoff := first
	for ctx.Err() == nil {
		began := time.Now()
		err := session(ctx)
		lasted := time.Since(began)
		ended := errors.As(err, new(*Ended))
		if err == nil || !ended && status.Code(err) != codes.Unavailable || ctx.Err() != nil {
			return err
		}
		if lasted >= most {
			backoff = first
		}
		if ended && lasted >= first {
			continue
		}
		t := time.NewTimer(time.Duration(rand.Float64() * float64(backoff)))
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
		backoff = min(2*backoff, most)
	}
	return status.FromContextError(ctx.Err()).Err()
}
