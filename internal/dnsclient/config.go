// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package dnsclient

import (
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"time"
)

// A Config says whom to ask, and how, as resolv.conf(5) does.
type Config struct {
	Servers  []string      // host:port, in the order in which they are asked
	Search   []string      // domains that are tried after a relative name, absolute
	Ndots    int           // a name with so many dots is tried as it stands first
	Timeout  time.Duration // of one question to one server
	Attempts int           // rounds through all servers
	Rotate   bool          // begin with a server at random
	TCP      bool          // never use UDP
}

// defaultConfig is that of resolv.conf(5) for a file that is empty.
func defaultConfig() Config {
	return Config{Ndots: 1, Timeout: 5 * time.Second, Attempts: 2}
}

// ReadConfig reads a resolv.conf file.
func ReadConfig(path string) (Config, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Config{}, err
	}
	return parseConfig(string(text)), nil
}

// ForServer is the Config of a single server, without a search list.
func ForServer(server string) Config {
	c := defaultConfig()
	c.Servers = []string{server}
	return c
}

// parseConfig ignores what it does not know, as other resolvers do.
func parseConfig(text string) Config {
	c := defaultConfig()
	for line := range strings.Lines(text) {
		if i := strings.IndexAny(line, "#;"); i >= 0 {
			line = line[:i]
		}
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		switch args := fields[1:]; fields[0] {
		case "nameserver":
			if ip, err := netip.ParseAddr(args[0]); err == nil && len(c.Servers) < 3 {
				c.Servers = append(c.Servers, net.JoinHostPort(ip.String(), "53"))
			}
		case "domain":
			c.Search = []string{absolute(args[0])}
		case "search":
			c.Search = nil
			for _, domain := range args {
				c.Search = append(c.Search, absolute(domain))
			}
		case "options":
			for _, option := range args {
				c.option(option)
			}
		}
	}
	if len(c.Servers) == 0 {
		c.Servers = []string{"127.0.0.1:53", "[::1]:53"}
	}
	return c
}

func (c *Config) option(option string) {
	name, value, _ := strings.Cut(option, ":")
	n, err := strconv.Atoi(value)
	number := err == nil && n >= 0
	switch {
	case name == "ndots" && number:
		c.Ndots = min(n, 15)
	case name == "timeout" && number:
		c.Timeout = time.Duration(min(max(n, 1), 30)) * time.Second
	case name == "attempts" && number:
		c.Attempts = min(max(n, 1), 5)
	case name == "rotate":
		c.Rotate = true
	case name == "use-vc", name == "usevc", name == "tcp":
		c.TCP = true
	}
}

// Names returns the absolute names that a name may stand for, in the order in
// which they are to be tried.
func (c *Config) Names(name string) []string {
	if strings.HasSuffix(name, ".") {
		return []string{name}
	}
	asIs := absolute(name)
	names := make([]string, 0, len(c.Search)+1)
	first := strings.Count(name, ".") >= c.Ndots
	if first {
		names = append(names, asIs)
	}
	for _, domain := range c.Search {
		if domain == "." {
			domain = ""
		}
		names = append(names, asIs+domain)
	}
	if !first {
		names = append(names, asIs)
	}
	return names
}

func absolute(name string) string {
	if strings.HasSuffix(name, ".") {
		return name
	}
	return name + "."
}
