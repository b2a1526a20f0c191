// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package follow reads a file, and reads it again after each change. Packages file
// and stackfile use it.
package follow

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc/grpclog"
	"sigs.k8s.io/yaml"
)

var logger = grpclog.Component("belfry-file")

// ReadEvery is how often a file is read again even if no change is reported. Tests
// set it before they follow a file.
var ReadEvery = 5 * time.Second

const (
	// quiet is how long the directory must be without changes before the file is
	// read, so that a program that writes in place can finish. quietMax is the
	// longest time from the first change until the file is read.
	quiet    = 100 * time.Millisecond
	quietMax = time.Second

	// maxSize is the size in bytes of the largest file that is read. It is enough
	// for about a million endpoints.
	maxSize = 64 << 20
)

// Texts yields the text of the file at path, and again after every change, until ctx
// ends. If the file cannot be read it yields the error once, and the text when the
// file can be read again. The path must be absolute, because the working directory
// may change.
func Texts(ctx context.Context, path string) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		dir := filepath.Dir(path)
		var changes chan fsnotify.Event // nil: nobody reports any
		var lost chan error
		watcher, err := fsnotify.NewWatcher()
		if err != nil {
			logger.Warningf("%s: changes are seen within %v only: %v", path, ReadEvery, err)
		} else {
			defer func() { _ = watcher.Close() }()
			changes, lost = watcher.Events, watcher.Errors
		}
		read := time.NewTicker(ReadEvery)
		defer read.Stop()
		settled := time.NewTimer(0)
		defer settled.Stop()
		settled.Stop()
		var busySince time.Time // of changes that the file has not been read after; zero: none

		var last []byte // nil: not read yet, or an error since
		var lastErr string
		for {
			if watcher != nil {
				// The directory is added each time, because it may have been replaced.
				// It is watched instead of the file, because a file that is renamed to
				// path is a different file.
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
				if !yield(text, nil) {
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
		return nil, err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	switch {
	case err != nil:
		return nil, err
	case len(text) > maxSize:
		return nil, fmt.Errorf("%s is larger than %d bytes", path, maxSize)
	}
	return text, nil
}

// JSON converts a text in YAML to JSON. JSON is YAML too. A key that occurs twice is an
// error.
func JSON(text []byte) (json.RawMessage, error) { return yaml.YAMLToJSONStrict(text) }
