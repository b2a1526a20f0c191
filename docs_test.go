// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package belfry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/interceptor/stackconfig"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
)

const module = "github.com/belfry-go/belfry"

// markdown returns the paths of all pages.
func markdown(t *testing.T) []string {
	t.Helper()
	var pages []string
	err := filepath.WalkDir(".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && p != ".":
			return filepath.SkipDir
		case strings.HasSuffix(p, ".md"):
			pages = append(pages, p)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(pages) == 0 {
		t.Fatal("there are no pages")
	}
	return pages
}

// A block is code in a page.
type block struct {
	line int // of the page, where the code begins
	text string
}

// blocks returns the blocks of code of a page whose fence says language, and no more.
func blocks(t *testing.T, page, language string) []block {
	t.Helper()
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	var found []block
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllSubmatchIndex(text, -1) {
		found = append(found, block{bytes.Count(text[:m[2]], []byte("\n")) + 1, string(text[m[2]:m[3]])})
	}
	return found
}

// TestPages/go: every block of Go compiles. A block is declarations, or statements of a
// function that returns an error; both may leave out imports, and use what given.go has.
// Statements run, and so does a function that dials, so that stacks and configs that are
// wrong are found. A block whose fence says more than "go" is left out: it needs modules
// that this one does not.
func TestPages(t *testing.T) {
	t.Run("go", func(t *testing.T) {
		if _, err := exec.LookPath("go"); err != nil {
			t.Skipf("it needs the go command in PATH: %v", err)
		}
		compileAndRun(t, pagesAsPackages(t))
	})

	t.Run("json", func(t *testing.T) {
		parser := balancer.Get(p2c.Name).(balancer.ConfigParser)
		for _, page := range markdown(t) {
			for _, b := range blocks(t, page, "json") {
				block := b.text
				var err error
				switch {
				case strings.Contains(block, `"layers"`):
					if config, e := stackconfig.Parse([]byte(block)); e != nil {
						err = e
					} else {
						_, err = stackconfig.NewStackFromConfig(config)
					}
				case strings.Contains(block, "loadBalancingConfig") || strings.Contains(block, "retryPolicy"):
					var conn *grpc.ClientConn
					conn, err = grpc.NewClient("passthrough:///orders", grpc.WithDefaultServiceConfig(block), grpc.WithTransportCredentials(insecure.NewCredentials()))
					if err == nil {
						conn.Close()
					}
				default:
					// The policy ignores fields that it does not know.
					if err = protojson.Unmarshal([]byte(block), new(configv1.P2C)); err == nil {
						_, err = parser.ParseConfig(json.RawMessage(block))
					}
				}
				if err != nil {
					t.Errorf("%s:%d: %v", page, b.line, err)
				}
			}
		}
	})

	t.Run("links", func(t *testing.T) {
		code := regexp.MustCompile("(?ms)^```.*?^```$")
		link := regexp.MustCompile(`\]\(([^)\s#]*)(#[^)\s]*)?\)`)
		prose := func(page string) string {
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			return code.ReplaceAllString(string(text), "")
		}
		for _, page := range markdown(t) {
			for _, m := range link.FindAllStringSubmatch(prose(page), -1) {
				to, anchor := m[1], m[2]
				if strings.Contains(to, ":") {
					continue
				}
				target := page
				if to != "" {
					target = filepath.Join(filepath.Dir(page), filepath.FromSlash(to))
				}
				if _, err := os.Stat(target); err != nil {
					t.Errorf("%s has a link to %s: %v", page, to, err)
				} else if anchor != "" && !slices.Contains(anchors(prose(target)), anchor) {
					t.Errorf("%s has a link to %s%s, which has no such heading", page, to, anchor)
				}
			}
		}
	})

	// The packages and the tests that commands name exist.
	t.Run("commands", func(t *testing.T) {
		directory := regexp.MustCompile(`go (?:run|test|generate|vet)\b[^#` + "`" + `\n]*`)
		for _, page := range markdown(t) {
			text, err := os.ReadFile(page)
			if err != nil {
				t.Fatal(err)
			}
			for _, command := range directory.FindAllString(string(text), -1) {
				for _, word := range strings.Fields(command) {
					if p, ok := strings.CutPrefix(word, "./"); ok && p != "..." && !strings.HasPrefix(p, "its/") {
						if info, err := os.Stat(filepath.FromSlash(strings.TrimSuffix(p, "/..."))); err != nil || !info.IsDir() {
							t.Errorf("%s: %q: there is no package %s", page, command, word)
						}
					}
				}
			}
		}
	})
}

// anchors returns the anchors of the headings of a page, as GitHub makes them.
func anchors(text string) []string {
	var found []string
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		kept := strings.Map(func(r rune) rune {
			switch {
			case r == ' ' || r == '-':
				return '-'
			case r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
				return unicode.ToLower(r)
			}
			return -1
		}, m[1])
		found = append(found, "#"+kept)
	}
	return found
}

// given declares what blocks may use without a declaration.
const given = `
import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"

	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"

	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

var (
	meterProvider metric.MeterProvider = noop.NewMeterProvider()
	creds   credentials.TransportCredentials = insecure.NewCredentials()
	conn, _                                  = grpc.NewClient("passthrough:///orders", grpc.WithTransportCredentials(creds))
	client                                   = testingv1.NewTestServiceClient(conn)
	req                                      = &testingv1.UnaryRequest{}
	// Calls end at once.
	ctx, cancel = context.WithCancel(context.Background())
)

func init() { cancel() }
`

// pagesAsPackages returns the files of a program that has a package for each page, by
// their paths.
func pagesAsPackages(t *testing.T) map[string]string {
	t.Helper()
	const root = "internal/pages"
	files := make(map[string]string)
	var imports, calls strings.Builder
	for n, page := range markdown(t) {
		code := blocks(t, page, "go")
		if len(code) == 0 {
			continue
		}
		name := fmt.Sprintf("page%d", n)
		var runs strings.Builder
		for i, b := range code {
			file, run, err := complete(name, fmt.Sprintf("block%d", i), fmt.Sprintf("//line %s:%d\n%s", page, b.line, b.text))
			if err != nil {
				t.Errorf("%s:%d: %v", page, b.line, err)
				continue
			}
			files[path.Join(root, name, fmt.Sprintf("block%d.go", i))] = file
			for _, f := range run {
				fmt.Fprintf(&runs, "\tif err := %s; err != nil {\n\t\treturn err\n\t}\n", f)
			}
		}
		files[path.Join(root, name, "given.go")] = "package " + name + "\n" + given + "\n" + `
func dialed(conn *grpc.ClientConn, err error) error {
	if err != nil {
		return err
	}
	return conn.Close()
}

// Run runs the blocks.
func Run() error {
` + runs.String() + "\treturn nil\n}\n"
		fmt.Fprintf(&imports, "\t%q\n", module+"/"+path.Join(root, name))
		fmt.Fprintf(&calls, "\tif err := %s.Run(); err != nil {\n\t\tpanic(fmt.Errorf(\"%s: %%w\", err))\n\t}\n", name, page)
	}
	files[path.Join(root, "main.go")] = "package main\n\nimport (\n\t\"fmt\"\n" + imports.String() + ")\n\nfunc main() {\n" + calls.String() + "}\n"
	return files
}

// compileAndRun runs the program of these files, which exist in an overlay only.
func compileAndRun(t *testing.T, files map[string]string) {
	t.Helper()
	root, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := make(map[string]string)
	for i, p := range slices.Sorted(maps.Keys(files)) {
		real := filepath.Join(dir, fmt.Sprintf("%d.go", i))
		if err := os.WriteFile(real, []byte(files[p]), 0o666); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, filepath.FromSlash(p))] = real
	}
	overlay := filepath.Join(dir, "overlay.json")
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, text, 0o666); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "run", "-overlay", overlay, "./internal/pages").CombinedOutput(); err != nil {
		t.Errorf("%v:\n%s", err, out)
	}
}

// complete makes a file of a block, and returns it with the calls that run it.
func complete(pkg, name, block string) (file string, run []string, err error) {
	fset := token.NewFileSet()
	text := block
	f, err := parser.ParseFile(fset, "", "package "+pkg+"\n"+text, parser.SkipObjectResolution)
	if err != nil {
		text = "func " + name + "() error {\n" + block + "\n\treturn nil\n}\n"
		f, err = parser.ParseFile(fset, "", "package "+pkg+"\n"+text, parser.SkipObjectResolution)
		if err != nil {
			return "", nil, err
		}
		// Variables that the block itself does not use.
		body := f.Decls[0].(*ast.FuncDecl).Body
		var use strings.Builder
		for _, s := range body.List {
			if a, ok := s.(*ast.AssignStmt); ok && a.Tok == token.DEFINE {
				for _, l := range a.Lhs {
					if id := l.(*ast.Ident); id.Name != "_" {
						fmt.Fprintf(&use, "\t_ = %s\n", id.Name)
					}
				}
			}
		}
		text = "func " + name + "() error {\n" + block + "\n" + use.String() + "\treturn nil\n}\n"
		run = append(run, name+"()")
	}
	imported := make(map[string]bool)
	for _, i := range f.Imports {
		p := strings.Trim(i.Path.Value, `"`)
		imported[path.Base(p)] = true
		if i.Name != nil {
			imported[i.Name.Name] = true
		}
	}
	missing := make(map[string]string)
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if id, ok := s.X.(*ast.Ident); ok && !imported[id.Name] {
				if p := packageNamed(id.Name); p != "" {
					missing[id.Name] = p
				}
			}
		}
		return true
	})
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Recv == nil && strings.HasPrefix(fn.Name.Name, "dial") {
			if fields := fn.Type.Params.List; len(fields) == 1 && len(fields[0].Names) == 1 && fields[0].Names[0].Name == "creds" {
				run = append(run, "dialed("+fn.Name.Name+"(creds))")
			}
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "package %s\n\n", pkg)
	for _, n := range slices.Sorted(maps.Keys(missing)) {
		fmt.Fprintf(&b, "import %s %q\n", n, missing[n])
	}
	return b.String() + "\n" + text, run, nil
}

// packageNamed returns the path of the package that blocks mean by a name, and "" if it
// is not one.
func packageNamed(name string) string {
	switch name {
	case "context", "errors", "fmt", "iter", "log", "strings", "time":
		return name
	case "http":
		return "net/http"
	case "rand":
		return "math/rand/v2"
	case "grpc", "codes", "status", "keepalive", "metadata", "credentials", "peer":
		return strings.TrimSuffix("google.golang.org/grpc/"+name, "/grpc")
	case "insecure":
		return "google.golang.org/grpc/credentials/insecure"
	case "resolver":
		return "google.golang.org/grpc/resolver"
	case "belfry":
		return module
	case "p2c", "discover", "load", "limit", "orca", "debug":
		return module + map[string]string{"p2c": "/balancer/p2c", "discover": "/resolver/discover", "load": "/load", "limit": "/limit", "orca": "/orca", "debug": "/debug"}[name]
	case "interceptor":
		return module + "/interceptor"
	}
	if info, err := os.Stat(filepath.Join("interceptor", name)); err == nil && info.IsDir() {
		return module + "/interceptor/" + name
	}
	return ""
}
