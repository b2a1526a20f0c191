// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package discover

import "github.com/belfry-go/belfry/internal/dnsclient"

// SetDNSConfig takes the place of /etc/resolv.conf until restore is called.
func SetDNSConfig(c dnsclient.Config, err error) (restore func()) {
	old := readDNSConfig
	readDNSConfig = func() (dnsclient.Config, error) { return c, err }
	return func() { readDNSConfig = old }
}
