// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"reflect"
	"unsafe"

	"google.golang.org/grpc"
)

// DialOptions makes a channel balance by belfry.p2c, and lets the policy see what a picker
// does not.
//
// The policy is chosen by a default service config, with the default config of the policy,
// for a channel that has no other: a service config that the resolver delivers replaces it,
// and so does a [grpc.WithDefaultServiceConfig], before or after these options. It replaces
// all of it: without a loadBalancingConfig gRPC takes pick_first, so name the policy there
// too. If calls are balanced by another policy the first of them is logged as a warning.
//
// What a picker does not see is whether a call is a stream, when its first response arrives,
// and its true end. The policy works without it, but then
//
//   - the latency of a stream is its whole life, and a stream that goes on looks
//     like one that is not answered;
//   - a call that the server rejects before it has read the request may look like
//     a fast success, because grpc tells the balancer no error then;
//   - a retry by grpc's own retryPolicy may go to the endpoint that just failed.
//
// For that the options have a pair of chained interceptors. Give them to grpc.NewClient
// after other interceptors, so that they see each attempt by itself where
// another interceptor repeats calls. It costs a unary call one
// allocation, and one more of grpc's if there is another interceptor.
func DialOptions() []grpc.DialOption {
	i := &interceptors{}
	return []grpc.DialOption{
		ifUnset(grpc.WithDefaultServiceConfig(`{"loadBalancingConfig":[{"`+Name+`":{}}]}`), "defaultServiceConfigRawJSON"),
		grpc.WithChainUnaryInterceptor(i.unary),
		grpc.WithChainStreamInterceptor(i.stream),
	}
}

// ifUnset makes an option of gRPC's that is applied only where a field of gRPC's options is
// nil. gRPC has no such thing: of two default service configs it takes the last, so that the
// one of a program would be lost, outlier detection and all, if it came before DialOptions.
// The option holds a function, which is replaced by one that looks first. Should gRPC change
// what is behind its options, the option is what it was: then the last one counts.
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
