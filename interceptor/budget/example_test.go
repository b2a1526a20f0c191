// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package budget_test

import (
	"fmt"
	"log"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/budget"
)

func Example() {
	b, err := budget.New(budget.Config{Ratio: 0.1, MinPerSecond: budget.None})
	if err != nil {
		log.Fatal(err)
	}
	now := interceptor.Now()
	for range 25 { // Calls, as the gate of a retry counts them.
		b.Deposit(now)
	}
	fmt.Println("balance:", b.Balance())
	for i := range 3 { // Attempts, as a retry or a hedge pays for them.
		fmt.Printf("attempt %d: %v\n", i+1, b.Withdraw(now))
	}
	// Output:
	// balance: 2.5
	// attempt 1: true
	// attempt 2: true
	// attempt 3: false
}
