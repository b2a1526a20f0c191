// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package otelobserver_test

import (
	"fmt"
	"log"

	"go.opentelemetry.io/otel/metric/noop"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/interceptor/otelobserver"
)

func Example() {
	obs, err := otelobserver.New(noop.NewMeterProvider()) // In a program: otel.GetMeterProvider().
	if err != nil {
		log.Fatal(err)
	}
	stack, err := interceptor.NewStack(interceptor.Observe(obs))
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack)
	// Output: [observe]
}
