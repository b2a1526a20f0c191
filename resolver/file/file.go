// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package file

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc/grpclog"
	"google.golang.org/grpc/resolver"
	"sigs.k8s.io/yaml"

	"github.com/belfry-go/belfry/resolver/discover"
)

var logger = grpclog.Component("belfry-file")

// readEvery is how often the file is read where no change of it is reported. It
// is shorter in tests.
var readEvery = 5 * time.Second

const (
	// quiet is how long the directory must be quiet before the file is read, so
	// that a writer who writes in place may finish. quietMax bounds it.
	quiet    = 100 * time.Millisecond
	quietMax = time.Second

	// maxSize is the largest file that is read, in bytes: a million endpoints.
	maxSize = 64 << 20
)

// New returns a source of the endpoints that are listed in the file at path, in
// the form that the package documentation says. The file need not exist yet: it
// is read when a channel watches.
//
// New returns an error if path is empty. The source may be used by any number of
// channels, each of which follows the file for itself.
func New(path string) (discover.Source, error) {
	if path == "" {
		return nil, errors.New("file: the path is empty")
	}
	// The working directory may be another later.
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	return discover.FullSets(func(ctx context.Context) iter.Seq2[[]resolver.Endpoint, error] { return follow(ctx, path) })
}

// follow yields the set in the file, and again after every change.
func follow(ctx context.Context, path string) iter.Seq2[[]resolver.Endpoint, error] {
	return func(yield func([]resolver.Endpoint, error) bool) {
		dir := filepath.Dir(path)
		var changes chan fsnotify.Event // nil: nobody reports any
		var lost chan error
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			logger.Warningf("%s: changes are seen within %v only: %v", path, readEvery, err)
		} else {
			defer watcher.Close()
			changes, lost = watcher.Events, watcher.Errors
		}
		read := time.NewTicker(readEvery)
		defer read.Stop()
		settled := time.NewTimer(0)
		defer settled.Stop()
		settled.Stop()
		var busySince time.Time // of changes that the file has not been read after; zero: none

		var last []byte
		var lastErr string
		for {
			if watcher != nil {
				// Each time: the directory may be another by now. It is watched, not
				// the file, because a file that is renamed over it is another file.
				_ = watcher.Add(dir)
			}
			if text, err := readFile(path); err != nil {
				last = nil
				if err.Error() != lastErr {
					lastErr = err.Error()
					if !yield(nil, err) {
						return
					}
				}
			} else if last == nil || !bytes.Equal(text, last) {
				last, lastErr = text, ""
				if !yield(parse(path, text)) {
					return
				}
			}
			busySince = time.Time{}
		wait:
			for {
				select {
				case <-ctx.Done():
					return
				case <-changes:
				case <-lost: // Too many changes to report.
				case <-read.C:
					if busySince.IsZero() {
						break wait
					}
					continue
				case <-settled.C:
					break wait
				}
				now := time.Now()
				if busySince.IsZero() {
					busySince = now
				}
				settled.Reset(min(quiet, busySince.Add(quietMax).Sub(now)))
			}
		}
	}
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("file: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("file: %w", err)
	case len(text) > maxSize:
		return nil, fmt.Errorf("file: %s is larger than %d bytes", path, maxSize)
	case len(bytes.TrimSpace(text)) == 0:
		return nil, fmt.Errorf("file: %s is empty: write [] if there are no endpoints", path)
	}
	return text, nil
}

// entry is an entry of the list that is not a string.
type entry struct {
	Address    string   `json:"address"`
	Addresses  []string `json:"addresses"`
	Key        *string  `json:"key"`
	Weight     *uint32  `json:"weight"`
	Zone       *string  `json:"zone"`
	Draining   bool     `json:"draining"`
	ServerName *string  `json:"serverName"`
}

// parse returns the endpoints in a text. The path is for the errors.
func parse(path string, text []byte) ([]resolver.Endpoint, error) {
	data, err := yaml.YAMLToJSONStrict(text)
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
	if e.Draining {
		opts = append(opts, discover.Draining())
	}
	if e.ServerName != nil {
		opts = append(opts, discover.ServerName(*e.ServerName))
	}
	return discover.Endpoint(e.Addresses[0], opts...)
}
