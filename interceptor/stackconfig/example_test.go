// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig_test

import (
	"errors"
	"fmt"
	"log"

	"github.com/belfry-go/belfry/interceptor/concurrency"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
)

func Example() {
	config, err := stackconfig.Parse([]byte(`{
		"methodConfig": [
			{"name": [{"service": "shop.Orders", "method": "List"}],
			 "layers": [{"timeout": {"call": "1s"}}, {"hedge": {"methods": ["/shop.Orders/List"]}}, {"shared": "all"}]},
			{"name": [{}],
			 "layers": [{"timeout": {"call": "5s"}}, {"retry": {}}, {"shared": "all"}]}
		],
		"sharedLayers": {"all": {"concurrency": {"limit": 100}}}
	}`))
	if err != nil {
		log.Fatal(err)
	}
	stack, err := stackconfig.NewStackFromConfig(config)
	if err != nil {
		log.Fatal(err)
	}
	// grpc.NewClient(target, append(stack.DialOptions(), …)...)
	fmt.Println(stack)

	limit := stack.Layer("all").(*concurrency.Layer)
	config.SharedLayers["all"].GetConcurrency().MaxWaiters = -1
	_, err = stack.Update(config)
	if wrong := (*stackconfig.Error)(nil); errors.As(err, &wrong) {
		fmt.Println("not changed:", wrong.Field)
	}

	config, err = stackconfig.Parse([]byte(`{
		"methodConfig": [{"name": [{}], "layers": [{"loadShed": {}}, {"shared": "all"}]}],
		"sharedLayers": {"all": {"concurrency": {"limit": 50}}}
	}`))
	if err != nil {
		log.Fatal(err)
	}
	changes, err := stack.Update(config)
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(stack)
	fmt.Println("new:", changes.Began)
	fmt.Println("the same limit, now of", limit.Limit())
	// Output:
	// shop.Orders/List: [timeout > hedge > all]
	// *: [timeout > retry > all]
	// not changed: sharedLayers["all"].concurrency.maxWaiters
	// *: [loadshed > all]
	// new: [methodConfig[0].layers[0]]
	// the same limit, now of 50
}
