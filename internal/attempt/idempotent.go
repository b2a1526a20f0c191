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
// IDEMPOTENT. known is false for a method whose file is not linked in.
func Declared(method string) (yes, known bool) {
	md := methodOf(method)
	if md == nil {
		return false, false
	}
	opts, ok := md.Options().(*descriptorpb.MethodOptions)
	return ok && opts.GetIdempotencyLevel() != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN, true
}

// Streams reports whether the method, such as "/pkg.Service/Method", is known to have a
// stream of requests or responses.
func Streams(method string) bool {
	md := methodOf(method)
	return md != nil && (md.IsStreamingClient() || md.IsStreamingServer())
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
