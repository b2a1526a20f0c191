// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package signaltest tests how a program ends when it is interrupted. A test of package
// main uses it in two places:
//
//	func TestMain(m *testing.M) {
//		signaltest.Main(main)
//		leaktest.Main(m)
//	}
//
//	func TestSignals(t *testing.T) { signaltest.Run(t, "a line", "-flag") }
package signaltest

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

const variable = "BELFRY_SIGNALTEST"

// Main runs the program and exits if this process was started by [Run].
func Main(program func()) {
	if os.Getenv(variable) != "" {
		program()
		os.Exit(0)
	}
}

// Run starts the program with args, and once with each of SIGINT and SIGTERM interrupts
// it when its output has a line that contains line. It has to end by itself then, with
// exit code 1 and an error.
func Run(t *testing.T, line string, args ...string) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
			cmd.Env = append(os.Environ(), variable+"=1")
			var stderr strings.Builder
			cmd.Stderr = &stderr
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			var out strings.Builder
			signalled := false
			for s := bufio.NewScanner(stdout); s.Scan(); {
				out.WriteString(s.Text() + "\n")
				if !signalled && strings.Contains(s.Text(), line) {
					signalled = true
					if err := cmd.Process.Signal(sig); err != nil {
						t.Error(err)
					}
				}
			}
			err = cmd.Wait()
			if code := cmd.ProcessState.ExitCode(); !signalled || code != 1 || stderr.Len() == 0 {
				t.Errorf("signalled %t, ended with %v, want exit code 1 and an error; stderr:\n%sstdout:\n%s", signalled, err, &stderr, &out)
			}
		})
	}
}
