// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"google.golang.org/grpc/balancer"

	"github.com/belfry-go/belfry/balancer/p2c"
)

// snippets returns the blocks of README.md in a language.
func snippets(t *testing.T, language string) []string {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllSubmatch(text, -1) {
		found = append(found, string(m[1]))
	}
	if len(found) == 0 {
		t.Fatalf("README.md has no block in %s", language)
	}
	return found
}

func TestGoOfTheReadmeRunsInAMainPackage(t *testing.T) {
	if _, err := exec.LookPath("go"); err != nil {
		t.Skipf("it needs the go command in PATH: %v", err)
	}
	// Each block is a file of its own in a package that exists in the overlay only.
	files := append(snippets(t, "go"), `
import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	creds := insecure.NewCredentials()
	plain, err := dial(creds)
	if err != nil {
		panic(err)
	}
	defer plain.Close()
	stacked, err := dialThroughStack(grpc.WithTransportCredentials(creds))
	if err != nil {
		panic(err)
	}
	defer stacked.Close()
}
`)
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := make(map[string]string)
	for i, code := range files {
		name := fmt.Sprintf("block%d.go", i)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("package main\n\n"+code), 0o666); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, "internal", "readme", name)] = path
	}
	overlay := filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, text, 0o666); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "run", "-overlay", overlay, "./internal/readme").CombinedOutput(); err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}

func TestSettingsOfTheReadmeAreValid(t *testing.T) {
	parser := balancer.Get(p2c.Name).(balancer.ConfigParser)
	for _, block := range snippets(t, "json") {
		if _, err := parser.ParseConfig(json.RawMessage(block)); err != nil {
			t.Errorf("%v, in\n%s", err, block)
		}
	}
}
