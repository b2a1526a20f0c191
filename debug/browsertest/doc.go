// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package browsertest looks at the page of package debug in a browser. It is a module of its
// own, so that nobody who uses belfry gets the browser's driver.
package browsertest
