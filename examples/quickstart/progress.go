// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// progress draws a bar for the run that is on, on one line that it redraws in
// place. On anything but a terminal it is silent.
type progress struct {
	out    io.Writer // nil: silent
	calls  int64     // of one run
	starts chan start
	ended  chan struct{} // closed when the drawing goroutine has returned
}

// newProgress starts a progress bar. Whoever does must stop it.
func newProgress(out io.Writer, w workload) *progress {
	p := &progress{out: out, calls: int64(w.calls), starts: make(chan start), ended: make(chan struct{})}
	go p.draw()
	return p
}

// begin is called when a run begins.
func (p *progress) begin(s start) { p.starts <- s }

// stop clears the line.
func (p *progress) stop() {
	close(p.starts)
	<-p.ended
}

// Ten times a second looks smooth and costs nothing beside the calls.
const redraw = 100 * time.Millisecond

func (p *progress) draw() {
	defer close(p.ended)
	ticker := time.NewTicker(redraw)
	defer ticker.Stop()
	var current start
	drawn := false
	for {
		select {
		case s, ok := <-p.starts:
			if !ok {
				if drawn {
					fmt.Fprint(p.out, "\r\x1b[K")
				}
				return
			}
			current = s
		case <-ticker.C:
		}
		if p.out != nil && current.done != nil {
			fmt.Fprint(p.out, "\r\x1b[K"+bar(current, p.calls))
			drawn = true
		}
	}
}

// bar returns the line for a run, less than 80 columns if the name is no longer
// than grpc's.
func bar(s start, calls int64) string {
	const width = 30
	done := s.done.Load()
	full := int(done * width / max(calls, 1))
	return fmt.Sprintf("%-26s %s%s %3d %% of %d calls", s.policy.name,
		strings.Repeat("█", full), strings.Repeat("░", width-full), done*100/max(calls, 1), calls)
}

// isTerminal reports whether f is a terminal that can redraw a line.
func isTerminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("TERM") != "dumb"
}
