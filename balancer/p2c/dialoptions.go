// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"reflect"
	"unsafe"

	"google.golang.org/grpc"
)

// DialOptions selects the policy belfry.p2c for a channel, and shows the policy what a picker
// cannot see.
//
// The options select the policy, with its default config, by a default service config. Any
// other service config replaces this one as a whole: one that the resolver delivers, or a
// [grpc.WithDefaultServiceConfig] before or after these options. Without a
// loadBalancingConfig gRPC uses pick_first, so name the policy in such a config too. If
// another policy balances the calls, a warning is logged once.
//
// A picker cannot see whether a call is a stream, when its first response arrives, and its
// true end. The policy works without that, but then
//
//   - the latency of a stream is its whole duration, and an open stream looks like
//     one without an answer;
//   - a call that the server rejects before it has read the request may look like
//     a fast success, because gRPC tells the balancer no error then;
//   - a retry by gRPC's own retryPolicy may go to the endpoint that just failed.
//
// To see it, the options have two chained interceptors. Give the options to grpc.NewClient
// after other interceptors. Then they see each attempt of an interceptor that repeats calls.
// They cost a unary call one allocation, and gRPC one more if there is another interceptor.
func DialOptions() []grpc.DialOption {
	i := &interceptors{}
	return []grpc.DialOption{
		ifUnset(grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"`+Name+`":{}}]}`), "defaultServiceConfigRawJSON"),
		grpc.WithChainUnaryInterceptor(i.unary),
		grpc.WithChainStreamInterceptor(i.stream),
	}
}

// ifUnset changes an option of gRPC so that it applies only if a field of gRPC's options is
// nil. gRPC has no such option: of two default service configs it takes the last. So
// DialOptions would replace the config that a program gives before it.
//
// The option holds a function. ifUnset replaces it by one that looks at the field first. If a
// version of gRPC has other options inside, ifUnset changes nothing, and the last config
// counts.
func ifUnset(option grpc.DialOption, field string) grpc.DialOption {
	v := reflect.ValueOf(option)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		return option
	}
	f := v.Elem().FieldByName("f")
	if !f.IsValid() || f.Kind() != reflect.Func || f.Type().NumIn() != 1 || f.Type().NumOut() != 0 {
		return option
	}
	options := f.Type().In(0)
	if options.Kind() != reflect.Pointer || options.Elem().Kind() != reflect.Struct {
		return option
	}
	set, ok := options.Elem().FieldByName(field)
	if !ok || set.Type.Kind() != reflect.Pointer {
		return option
	}
	// The field is not exported, so it can be set only by its address.
	f = reflect.NewAt(f.Type(), unsafe.Pointer(f.UnsafeAddr())).Elem()
	apply := reflect.ValueOf(f.Interface())
	f.Set(reflect.MakeFunc(f.Type(), func(args []reflect.Value) []reflect.Value {
		if args[0].Elem().FieldByIndex(set.Index).IsNil() {
			apply.Call(args)
		}
		return nil
	}))
	return option
}
