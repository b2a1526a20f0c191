// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bufio"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
)

// A machine is where the figures come from.
type machine struct {
	cpu     string
	cores   int
	kernel  string
	system  string
	goes    string // version of Go
	load    string // load averages before the run
	modules []module
}

// A module is one that the program is built with.
type module struct{ path, version string }

// compared are the modules whose versions the page shows, before all others.
var compared = []string{
	"google.golang.org/grpc",
	"github.com/zeromicro/go-zero",
	"github.com/go-kratos/kratos/v2",
	"github.com/go-kratos/aegis",
	"github.com/failsafe-go/failsafe-go",
	"github.com/grpc-ecosystem/go-grpc-middleware/v2",
	"github.com/sony/gobreaker/v2",
	"golang.org/x/time",
	"golang.org/x/sync",
}

// thisMachine looks at the machine and at the program.
func thisMachine() machine {
	m := machine{
		cpu:    field("/proc/cpuinfo", "model name"),
		cores:  runtime.NumCPU(),
		kernel: firstLine("/proc/sys/kernel/osrelease"),
		system: runtime.GOOS + "/" + runtime.GOARCH,
		goes:   runtime.Version(),
		load:   firstLine("/proc/loadavg"),
	}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, d := range info.Deps {
			version := d.Version
			if d.Replace != nil {
				version = "from " + d.Replace.Path
			}
			m.modules = append(m.modules, module{d.Path, version})
		}
	}
	slices.SortStableFunc(m.modules, func(a, b module) int { return rank(a.path) - rank(b.path) })
	return m
}

func rank(path string) int {
	if i := slices.Index(compared, path); i >= 0 {
		return i
	}
	return len(compared)
}

// firstLine returns the first line of a file, "unknown" if it cannot be read.
func firstLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(string(b), "\n")
	return line
}

// field returns the first value of a name in a file of lines "name: value".
func field(path, name string) string {
	f, err := os.Open(path)
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if k, v, ok := strings.Cut(lines.Text(), ":"); ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
