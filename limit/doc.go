// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package limit has the algorithms that find out how many calls a server should work on
// at a time. They only find the number: package interceptor/concurrency enforces it for a
// whole client, and the balancer belfry.p2c for each endpoint.
//
// Which algorithm suits which server is said in package interceptor/concurrency.
package limit
