// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package stackfile

import (
	"bytes"
	"encoding/json"
	"flag"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/belfry-go/belfry/balancer/aperture"
	"github.com/belfry-go/belfry/balancer/p2c"
	"github.com/belfry-go/belfry/balancer/priority"
	configv1 "github.com/belfry-go/belfry/proto/belfry/config/v1"
	"github.com/belfry-go/belfry/resolver/file/internal/follow"
)

var update = flag.Bool("update", false, "write schema.json")

const (
	root       = "../../.." // of the repository
	schemaFile = "schema.json"
)

// schema.json allows what the messages allow. Its descriptions are what the .proto files
// and the Configs said when it was written, which go generate does. A comment may change
// in between.
func TestSchema(t *testing.T) {
	g := generator{t: t, comments: protoComments(t), goDocs: map[string]map[string]string{}, definitions: object{}}
	want := indent(t, g.schema())
	if *update {
		if err := os.WriteFile(schemaFile, want, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(withoutDescriptions(t, got), withoutDescriptions(t, want)) {
		t.Error("schema.json is not what the messages say: run go generate ./... in resolver/file")
	}
}

func indent(t *testing.T, v any) []byte {
	t.Helper()
	js, err := json.MarshalIndent(v, "", " ")
	if err != nil {
		t.Fatal(err)
	}
	return append(js, '\n')
}

func withoutDescriptions(t *testing.T, schema []byte) []byte {
	t.Helper()
	var v any
	if err := json.Unmarshal(schema, &v); err != nil {
		t.Fatal(err)
	}
	var strip func(v any)
	strip = func(v any) {
		switch v := v.(type) {
		case object:
			if _, ok := v["description"].(string); ok { // A property of this name is an object.
				delete(v, "description")
			}
			for _, part := range v {
				strip(part)
			}
		case []any:
			for _, part := range v {
				strip(part)
			}
		}
	}
	strip(v)
	return indent(t, v)
}

// TestSchemaAccepts: what the schema says of documents.
func TestSchemaAccepts(t *testing.T) {
	text, err := os.ReadFile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource(schemaFile, parsed); err != nil {
		t.Fatal(err)
	}
	schema, err := c.Compile(schemaFile)
	if err != nil {
		t.Fatal(err)
	}
	check := func(text string) error {
		t.Helper()
		js, err := follow.JSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(js))
		if err != nil {
			t.Fatal(err)
		}
		return schema.Validate(doc)
	}
	for _, good := range []string{
		"{}", limited[:strings.Index(limited, "concurrency")] + "concurrency: {}}",
		`
loadBalancingConfig:
- belfry.priority: {minHealthy: 0.5, childPolicy: [{belfry.aperture: {ordinal: 1, peers: 2, childPolicy: [{belfry.p2c: {choiceCount: 4, load: {peakEwma: {decay: 10s}}}}]}}]}
- round_robin: {}
stack:
  budget: {ratio: 0.1}
  budgets: {few: {ttl: 1.5s}}
  sharedLayers: {all: {concurrency: {aimd: {initial: 10}, dropCodes: [UNAVAILABLE], perMethod: true}}}
  methodConfig:
  - name: [{service: a.B, method: C}, {}]
    layers: [{shared: all}, {provided: mine}, {retry: {methods: [/a.B/], budget: few, backoff: {jitter: JITTER_FULL}}}, {loadShed: {}}]
`,
	} {
		if err := check(good); err != nil {
			t.Errorf("refuses what is right: %v\n%s", err, good)
		}
		// What the schema accepts is accepted, as far as it is not about values.
		if _, err := parse([]byte(good)); err != nil {
			t.Errorf("parse refuses what the schema accepts: %v\n%s", err, good)
		}
	}
	for _, wrong := range []string{
		"[]", "null", "methodConfig: []", "Stack: {}", "stack: []", "loadBalancingConfig: {}", "loadBalancingConfig: []",
		"loadBalancingConfig: [{belfry.p2c: {}, round_robin: {}}]", "loadBalancingConfig: [{belfry.p2c: }]",
		"loadBalancingConfig: [{belfry.p2c: {choices: 1}}]", "loadBalancingConfig: [{belfry.p2c: {choiceCount: -1}}]",
		"loadBalancingConfig: [{belfry.priority: {childPolicy: [{belfry.p2c: {choices: 1}}]}}]",
		"stack: {methodConfg: []}",
		"stack: {methodConfig: [{name: [{}], layers: [{}]}]}",                                                    // no kind
		"stack: {methodConfig: [{name: [{}], layers: [{loadShed: {}, retry: {}}]}]}",                             // two kinds
		"stack: {methodConfig: [{name: [{}], layers: [{timeout: {call: 10}}]}]}",                                 // no unit
		"stack: {methodConfig: [{name: [{}], layers: [{timeout: {call: 10ms}}]}]}",                               // seconds only
		"stack: {methodConfig: [{name: [{}], layers: [{concurrency: {limit: 1, auto: {}}}]}]}",                   // two of a oneof
		"stack: {methodConfig: [{name: [{}], layers: [{concurrency: {limit: many}}]}]}",                          // not a number
		"stack: {methodConfig: [{name: [{}], layers: [{retry: {codes: [OK]}}]}]}",                                // no failure
		"stack: {methodConfig: [{name: [{}], layers: [{rateLimit: {algorithm: SMOOTH}}]}]}",                      // not the name
		"stack: {sharedLayers: {all: {concurrency: {limit: 1, perMethod: true, keyFunc: f}}}, methodConfig: []}", // two keys
		"stack: {budgets: {few: {ratio: '0.1'}}}",                                                                // not a number
	} {
		if check(wrong) == nil {
			t.Errorf("accepts %s", wrong)
		}
	}
}

type object = map[string]any

// generator makes a JSON schema of messages. It is of draft 7, which editors know best.
type generator struct {
	t           *testing.T
	comments    map[string]string            // of messages, oneofs and fields in the .proto files, by their names, such as Layer.retry
	goDocs      map[string]map[string]string // of the fields of Configs, by the Config and the name in lower case
	definitions object
}

func (g generator) schema() object {
	policies := object{}
	for name, m := range map[string]protoreflect.ProtoMessage{
		p2c.Name: &configv1.P2C{}, aperture.Name: &configv1.Aperture{}, priority.Name: &configv1.Priority{},
	} {
		policies[name] = g.message(m.ProtoReflect().Descriptor())
	}
	g.definitions["policies"] = object{
		"description": "Load balancing policies, of which the first that the program has is used.",
		"type":        "array", "minItems": 1,
		"items": object{
			"type": "object", "minProperties": 1, "maxProperties": 1,
			"properties": policies, "additionalProperties": object{"type": "object"},
		},
	}
	return object{
		"$schema":     "http://json-schema.org/draft-07/schema#",
		"title":       "belfry: a stack and a balancing config",
		"description": "What package github.com/belfry-go/belfry/resolver/file/stackfile reads.",
		"type":        "object", "additionalProperties": false,
		"properties": object{
			"loadBalancingConfig": described("The load balancing policies, as in a service config: the first that the program has is used. By default belfry.p2c.", object{"$ref": "#/definitions/policies"}),
			"stack":               g.message((&configv1.Stack{}).ProtoReflect().Descriptor()),
		},
		"definitions": g.definitions,
	}
}

// described adds a description. Draft 7 ignores what is beside a $ref.
func described(description string, s object) object {
	if description == "" {
		return s
	}
	if _, ok := s["$ref"]; ok {
		return object{"description": description, "allOf": []any{s}}
	}
	s["description"] = description
	return s
}

// message returns a reference to the definition of a message, which it makes the first
// time.
func (g generator) message(md protoreflect.MessageDescriptor) object {
	name := string(md.Name())
	ref := object{"$ref": "#/definitions/" + name}
	if g.definitions[name] != nil {
		return ref
	}
	properties := object{}
	def := object{"type": "object", "additionalProperties": false, "properties": properties}
	g.definitions[name] = def
	comment := g.comments[name]
	described(comment, def)
	docs := g.config(comment)
	for i := range md.Fields().Len() {
		fd := md.Fields().Get(i)
		properties[fd.JSONName()] = described(g.describe(name, fd, docs), g.field(fd))
	}
	var all []any
	for i := range md.Oneofs().Len() {
		if o := md.Oneofs().Get(i); !o.IsSynthetic() {
			all = append(all, oneOf(o, name == "Layer"))
		}
	}
	if all != nil {
		def["allOf"] = all
	}
	return ref
}

// oneOf says that at most one field is set, or exactly one.
func oneOf(o protoreflect.OneofDescriptor, exactly bool) object {
	var each []any
	for i := range o.Fields().Len() {
		each = append(each, object{"required": []string{o.Fields().Get(i).JSONName()}})
	}
	if exactly {
		return object{"oneOf": each}
	}
	return object{"oneOf": append(slices.Clone(each), object{"not": object{"anyOf": each}})}
}

func (g generator) field(fd protoreflect.FieldDescriptor) object {
	switch {
	case fd.IsMap():
		return object{"type": "object", "additionalProperties": g.one(fd.MapValue())}
	case fd.IsList() && fd.Name() == "child_policy":
		return object{"$ref": "#/definitions/policies"}
	case fd.IsList():
		return object{"type": "array", "items": g.one(fd)}
	}
	return g.one(fd)
}

func (g generator) one(fd protoreflect.FieldDescriptor) object {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return object{"type": "boolean"}
	case protoreflect.StringKind:
		if strings.HasSuffix(string(fd.Name()), "codes") || fd.Name() == "non_fatal" {
			return object{"enum": codeNames()}
		}
		return object{"type": "string"}
	case protoreflect.DoubleKind:
		return object{"type": "number"}
	case protoreflect.Uint32Kind:
		return object{"type": "integer", "minimum": 0}
	case protoreflect.Int64Kind:
		return object{"type": "integer"}
	case protoreflect.EnumKind:
		var names []string
		for i := range fd.Enum().Values().Len() - 1 { // The first means unset.
			names = append(names, string(fd.Enum().Values().Get(i+1).Name()))
		}
		return object{"enum": names}
	case protoreflect.MessageKind:
		switch fd.Message().FullName() {
		case "google.protobuf.Duration":
			return object{"type": "string", "pattern": `^[0-9]+(\.[0-9]{1,9})?s$`}
		case "google.protobuf.Struct":
			return object{"type": "object"}
		}
		return g.message(fd.Message())
	}
	g.t.Fatalf("%s has a kind that has no schema yet: %v", fd.FullName(), fd.Kind())
	return nil
}

// codeNames are the names of the status codes but OK.
func codeNames() []string {
	var names []string
	for c := codes.Canceled; c <= codes.Unauthenticated; c++ {
		var words strings.Builder
		for i, r := range c.String() {
			if i > 0 && 'A' <= r && r <= 'Z' {
				words.WriteByte('_')
			}
			words.WriteRune(r)
		}
		name := strings.ToUpper(words.String())
		if c == codes.Canceled {
			name = "CANCELLED"
		}
		names = append(names, name)
	}
	return names
}

// describe returns what the .proto file and the Config say of a field.
func (g generator) describe(message string, fd protoreflect.FieldDescriptor, docs map[string]string) string {
	comment := g.comments[message+"."+string(fd.Name())]
	of := docs[strings.ToLower(fd.JSONName())]
	if o := fd.ContainingOneof(); comment == "" && o != nil && !o.IsSynthetic() {
		comment = g.comments[message+"."+string(o.Name())]
	}
	if m := regexp.MustCompile(`^Config\.(\w+)\.$`).FindStringSubmatch(comment); m != nil {
		comment, of = "", docs[strings.ToLower(m[1])]
	}
	parts := slices.DeleteFunc([]string{of, comment}, func(s string) bool { return s == "" })
	if len(parts) == 0 {
		g.t.Errorf("%s.%s is described neither in the .proto file nor in a Config", message, fd.Name())
	}
	return strings.Join(parts, "\n\n")
}

// protoComments returns the comments before the messages, oneofs and fields of the
// schemas. The generated code does not have them.
func protoComments(t *testing.T) map[string]string {
	t.Helper()
	comments := map[string]string{}
	block := regexp.MustCompile(`^(message|oneof|enum) (\w+) \{(\})?`)
	field := regexp.MustCompile(`^(?:repeated |optional )?[\w.]+(?:<.*>)? (\w+) = \d+`)
	files, err := filepath.Glob(root + "/proto/belfry/config/v1/*.proto")
	if err != nil || len(files) == 0 {
		t.Fatalf("no schemas: %v", err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		var message string
		var open []string // kinds of the blocks around
		var comment []string
		for line := range strings.Lines(string(text)) {
			line = strings.TrimSpace(line)
			if c, ok := strings.CutPrefix(line, "//"); ok {
				comment = append(comment, strings.TrimPrefix(c, " "))
				continue
			}
			said := prose(strings.Join(comment, "\n"))
			comment = nil
			if m := block.FindStringSubmatch(line); m != nil {
				switch m[1] {
				case "message":
					message = m[2] // None is inside another.
					comments[message] = said
				case "oneof":
					comments[message+"."+m[2]] = said
				}
				if m[3] == "" {
					open = append(open, m[1])
				}
			} else if line == "}" {
				open = open[:len(open)-1]
			} else if m := field.FindStringSubmatch(line); m != nil && open[len(open)-1] != "enum" {
				comments[message+"."+m[1]] = said
			}
		}
	}
	return comments
}

// prose joins the lines of a paragraph, but for those of an example.
func prose(comment string) string {
	lines := regexp.MustCompile(`([^\n])\n([^\n ])`)
	return strings.TrimSpace(lines.ReplaceAllString(comment, "$1 $2"))
}

// config returns the documentation of the fields of the Config that the comment of a
// message names, by the names in lower case.
func (g generator) config(comment string) map[string]string {
	m := regexp.MustCompile(`is ((?:interceptor/)?\w+)\.(\w+)\.`).FindStringSubmatch(comment)
	if m == nil {
		return nil
	}
	if docs := g.goDocs[m[0]]; docs != nil {
		return docs
	}
	docs := map[string]string{}
	g.goDocs[m[0]] = docs
	found := false
	files, err := filepath.Glob(root + "/" + m[1] + "/*.go")
	if err != nil {
		g.t.Fatal(err)
	}
	for _, f := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.ParseComments)
		if err != nil {
			g.t.Fatal(err)
		}
		ast.Inspect(parsed, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok || spec.Name.Name != m[2] {
				return true
			}
			if s, ok := spec.Type.(*ast.StructType); ok {
				found = true
				said := ""
				for _, field := range s.Fields.List {
					if field.Doc != nil { // One without is of the group of the one before.
						said = prose(field.Doc.Text())
					}
					for _, name := range field.Names {
						docs[strings.ToLower(name.Name)] = said
					}
				}
			}
			return false
		})
	}
	if !found {
		g.t.Errorf("%s: there is no such struct", m[0])
	}
	return docs
}
