// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"path/filepath"

	"google.golang.org/grpc/resolver"

	"github.com/belfry-go/belfry/resolver/discover"
	"github.com/belfry-go/belfry/resolver/file/internal/follow"
)

// New returns a source of the endpoints that are listed in the file at path, in
// the form that the package documentation shows. The file need not exist yet,
// because it is first read when a channel watches.
//
// New returns an error if path is empty. The source may be used by any number of
// channels, each of which follows the file separately.
func New(path string) (discover.Source, error) {
	if path == "" {
		return nil, errors.New("file: the path is empty")
	}
	// The working directory may change.
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	return discover.FullSets(func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] { return sets(ctx, path) })
}

// sets yields the set in the file, and again after every change.
func sets(ctx context.Context, path string) iter.Seq2[[]resolver.Endpoint, error] {
	return func(yield func([]resolver.Endpoint, error) bool) {
		for text, err := range follow.Texts(ctx, path) {
			var set []resolver.Endpoint
			if err != nil {
				err = fmt.Errorf("file: %w", err)
			} else {
				set, err = parse(path, text)
			}
			if !yield(set, err) {
				return
			}
		}
	}
}

// entry is an entry of the list that has fields.
type entry struct {
	Address    string   `json:"address"`
	Addresses  []string `json:"addresses"`
	Key        *string  `json:"key"`
	Weight     *uint32  `json:"weight"`
	Zone       *string  `json:"zone"`
	Group      uint32   `json:"group"`
	Draining   bool     `json:"draining"`
	ServerName *string  `json:"serverName"`
}

// parse returns the endpoints in a text. The path is used only in errors.
func parse(path string, text []byte) ([]resolver.Endpoint, error) {
	if len(bytes.TrimSpace(text)) == 0 {
		return nil, fmt.Errorf("file: %s is empty: write [] if there are no endpoints", path)
	}
	data, err := follow.JSON(text)
	if err != nil {
		return nil, fmt.Errorf("file: %s: %w", path, err)
	}
	var list []json.RawMessage
	if err := json.Unmarshal(data, &list); err != nil || list == nil {
		return nil, fmt.Errorf("file: %s: must be a list of endpoints", path)
	}
	endpoints := make([]resolver.Endpoint, len(list))
	for i, raw := range list {
		if endpoints[i], err = parseEntry(raw); err != nil {
			return nil, fmt.Errorf("file: %s: entry %d: %w", path, i, err)
		}
	}
	return endpoints, nil
}

func parseEntry(raw json.RawMessage) (resolver.Endpoint, error) {
	var address string
	if json.Unmarshal(raw, &address) == nil && raw[0] == '"' {
		return discover.Endpoint(address)
	}
	var e entry
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if raw[0] != '{' {
		return resolver.Endpoint{}, fmt.Errorf("%s: must be an address, or have the field address", raw)
	}
	if err := d.Decode(&e); err != nil {
		return resolver.Endpoint{}, err
	}
	switch {
	case (e.Address == "") == (len(e.Addresses) == 0):
		return resolver.Endpoint{}, errors.New("must have either the field address or the field addresses")
	case e.Address != "":
		e.Addresses = []string{e.Address}
	}
	var opts []discover.EndpointOption
	for _, a := range e.Addresses[1:] {
		opts = append(opts, discover.Address(a))
	}
	if e.Key != nil {
		opts = append(opts, discover.Key(*e.Key))
	}
	if e.Weight != nil {
		opts = append(opts, discover.Weight(*e.Weight))
	}
	if e.Zone != nil {
		opts = append(opts, discover.Zone(*e.Zone))
	}
	if e.Group != 0 {
		opts = append(opts, discover.Group(e.Group))
	}
	if e.Draining {
		opts = append(opts, discover.Draining())
	}
	if e.ServerName != nil {
		opts = append(opts, discover.ServerName(*e.ServerName))
	}
	return discover.Endpoint(e.Addresses[0], opts...)
}
