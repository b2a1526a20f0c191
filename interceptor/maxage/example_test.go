// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package maxage_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/maxage"
)

// A session receives events until its stream ends, and the next continues after the last
// event that was received.
func ExampleReopen() {
	events := []string{"created", "paid", "sent"}
	last := 0
	session := func(context.Context) error { // takes the role of a stream
		for range 2 {
			if last == len(events) {
				return nil
			}
			fmt.Println(events[last])
			last++
		}
		return &interceptor.Refusal{Layer: "maxage", Reason: maxage.Reason, Err: &maxage.Ended{}}
	}
	err := maxage.Reopen{}.Run(context.Background(), func(ctx context.Context) error {
		err := session(ctx)
		if errors.As(err, new(*maxage.Ended)) {
			fmt.Println("again")
		}
		return err
	})
	fmt.Println(err)
	// Output:
	// created
	// paid
	// again
	// sent
	// <nil>
}
