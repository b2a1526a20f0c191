// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// A proxy is a program that balances calls outside of the client.
type proxy struct {
	name    string // in the page
	program string
	// config returns the configuration of a proxy that listens on a socket.
	config func(dir, socket string, servers []string) string
	args   func(dir, config string) []string
}

// proxies are Debian's. Clients reach them through a socket of the file system, which costs
// less than loopback.
func proxies() []proxy {
	haproxy := func(balance string) proxy {
		return proxy{
			name:    "haproxy, " + balance,
			program: "haproxy",
			config: func(_, socket string, servers []string) string {
				var b strings.Builder
				fmt.Fprintf(&b, "global\n tune.h2.max-concurrent-streams 10000\ndefaults\n mode http\n timeout connect 5s\n timeout client 60s\n timeout server 60s\nfrontend f\n bind unix@%s proto h2\n default_backend b\nbackend b\n balance %s\n", socket, balance)
				for i, s := range servers {
					fmt.Fprintf(&b, " server s%d %s proto h2\n", i, s)
				}
				return b.String()
			},
			args: func(_, config string) []string { return []string{"-db", "-f", config} },
		}
	}
	return []proxy{
		haproxy("roundrobin"),
		haproxy("leastconn"),
		{
			name:    "nginx, least_conn",
			program: "nginx",
			config: func(dir, socket string, servers []string) string {
				var b strings.Builder
				fmt.Fprintf(&b, "daemon off;\npid %s/pid;\nerror_log stderr error;\nworker_processes 1;\nevents { worker_connections 8192; }\nhttp {\naccess_log off;\n", dir)
				for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
					fmt.Fprintf(&b, "%s_temp_path %s/%s;\n", kind, dir, kind)
				}
				b.WriteString("keepalive_requests 1000000000;\nhttp2_max_concurrent_streams 10000;\nupstream b {\nleast_conn;\n")
				for _, s := range servers {
					fmt.Fprintf(&b, "server %s max_fails=0;\n", s)
				}
				fmt.Fprintf(&b, "keepalive 1024;\n}\nserver { listen unix:%s http2; location / { grpc_pass grpc://b; } }\n}\n", socket)
				return b.String()
			},
			args: func(dir, config string) []string { return []string{"-e", "stderr", "-p", dir, "-c", config} },
		},
	}
}

// installed returns the proxies that are there, and which programs are missing.
func installed() (there []proxy, missing []string) {
	looked := make(map[string]bool)
	for _, p := range proxies() {
		if _, err := exec.LookPath(p.program); err == nil {
			there = append(there, p)
		} else if !looked[p.program] {
			missing = append(missing, fmt.Sprintf("%s is missing: it is not installed (apt-get install %s).", p.program, p.program))
		}
		looked[p.program] = true
	}
	return there, missing
}

// start runs the proxy before servers and returns the target of its clients, once it
// listens. stop ends it.
func (p proxy) start(ctx context.Context, servers []string) (target string, stop func(), err error) {
	dir, err := os.MkdirTemp("", "belfry-bench")
	if err != nil {
		return "", nil, err
	}
	remove := func() { _ = os.RemoveAll(dir) }
	socket, config := filepath.Join(dir, "socket"), filepath.Join(dir, "config")
	if err := os.WriteFile(config, []byte(p.config(dir, socket, servers)), 0o600); err != nil {
		remove()
		return "", nil, err
	}
	cmd := exec.Command(p.program, p.args(dir, config)...)
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr = &output, &output
	if err := cmd.Start(); err != nil {
		remove()
		return "", nil, err
	}
	ended := make(chan struct{})
	var failure error
	go func() {
		defer close(ended)
		failure = cmd.Wait()
	}()
	stop = func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			_ = cmd.Process.Kill()
			<-ended
		}
		remove()
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	for {
		if _, err := os.Stat(socket); err == nil {
			return "unix:" + socket, stop, nil
		}
		select {
		case <-ended:
			err := fmt.Errorf("%s ended: %w: %s", p.program, failure, output.String())
			remove()
			return "", nil, err
		case <-ctx.Done():
			stop()
			return "", nil, fmt.Errorf("%s does not listen: %w", p.program, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}
