// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"strings"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// methodOf returns the descriptor of the method, such as "/pkg.Service/Method". It is nil
// if the .proto file of the method is not linked in.
func methodOf(method string) protoreflect.MethodDescriptor {
	service, name, ok := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !ok {
		return nil
	}
	// Look up the service and then the method, because one name for both would have to be
	// allocated.
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil
	}
	return sd.Methods().ByName(protoreflect.Name(name))
}

// Declared reports whether the method, such as "/pkg.Service/Method", is declared
// idempotent in its .proto file: option idempotency_level is NO_SIDE_EFFECTS or
// IDEMPOTENT. It is false for a method whose file is not linked in.
func Declared(method string) bool {
	md := methodOf(method)
	if md == nil {
		return false
	}
	opts, ok := md.Options().(*descriptorpb.MethodOptions)
	if !ok {
		return false
	}
	switch opts.GetIdempotencyLevel() {
	case descriptorpb.MethodOptions_NO_SIDE_EFFECTS, descriptorpb.MethodOptions_IDEMPOTENT:
		return true
	}
	return false
}

// Reply returns a new response of the method, such as "/pkg.Service/Method". It is nil if
// the generated code of the method is not linked in.
func Reply(method string) proto.Message {
	md := methodOf(method)
	if md == nil {
		return nil
	}
	t, err := protoregistry.GlobalTypes.FindMessageByName(md.Output().FullName())
	if err != nil {
		return nil
	}
	return t.New().Interface()
}

// May reports whether calls of the method may be sent more than once, for a layer
// that is restricted to methods that are declared idempotent, or to those for which
// idempotent returns true, or to both together. idempotent may be nil.
func May(declared bool, idempotent func(method string) bool, method string) bool {
	if idempotent == nil && !declared {
		return true
	}
	return idempotent != nil && idempotent(method) || declared && Declared(method)
}
