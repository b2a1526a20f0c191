// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackconfig

import (
	"fmt"
	"strings"

	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

// routes has the position of the entry for each pattern: "/service/method" for a
// method, "/service/" for a service and "" for all.
type routes map[string]int

// choose returns the position of the entry for a method, -1 if there is none.
func (r routes) choose(method string) int {
	if i, ok := r[method]; ok {
		return i
	}
	if i, ok := r[method[:strings.LastIndexByte(method, '/')+1]]; ok {
		return i
	}
	if i, ok := r[""]; ok {
		return i
	}
	return -1
}

// patternOf returns the pattern of a name, which is at path.
func patternOf(n *configv1.MethodName, path string) (string, error) {
	service, method := n.GetService(), n.GetMethod()
	switch {
	case service == "" && method != "":
		return "", wrong(path+".service", `"", must be set beside method, %q`, method)
	case strings.ContainsAny(service, "/* "): // A pattern would match nothing.
		return "", wrong(path+".service", `%q, must be the full name of a service without "/" and "*"`, service)
	case strings.ContainsAny(method, "/* "):
		return "", wrong(path+".method", `%q, must be the name of a method without "/" and "*", or unset for all methods of the service`, method)
	case service == "":
		return "", nil
	}
	return "/" + service + "/" + method, nil
}

// shown returns a pattern as it is printed.
func shown(pattern string) string {
	switch {
	case pattern == "":
		return "*"
	case strings.HasSuffix(pattern, "/"):
		return pattern[1:] + "*"
	}
	return pattern[1:]
}

// addNames enters the names of the entry at position i and returns their patterns.
func (r routes) addNames(i int, names []*configv1.MethodName) ([]string, error) {
	path := fmt.Sprintf("methodConfig[%d].name", i)
	if len(names) == 0 {
		return nil, wrong(path, "empty, must hold a name; {} is all methods")
	}
	patterns := make([]string, len(names))
	for j, n := range names {
		path := fmt.Sprintf("%s[%d]", path, j)
		p, err := patternOf(n, path)
		if err != nil {
			return nil, err
		}
		if k, ok := r[p]; ok {
			return nil, wrong(path, "%s, must stand once, and is in methodConfig[%d] already", shown(p), k)
		}
		r[p], patterns[j] = i, p
	}
	return patterns, nil
}
