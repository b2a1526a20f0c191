// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"strings"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Declared reports whether the method, such as "/pkg.Service/Method", is declared
// idempotent in its .proto file: option idempotency_level is NO_SIDE_EFFECTS or
// IDEMPOTENT. known is false for a method whose file is not linked in.
func Declared(method string) (yes, known bool) {
	service, name, ok := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !ok {
		return false, false
	}
	// Look up the service and then the method, because one name for both would have to be
	// allocated.
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return false, false
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		return false, false
	}
	md := sd.Methods().ByName(protoreflect.Name(name))
	if md == nil {
		return false, false
	}
	opts, ok := md.Options().(*descriptorpb.MethodOptions)
	return ok && opts.GetIdempotencyLevel() != descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN, true
}
