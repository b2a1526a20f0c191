// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/belfry-go/belfry/interceptor"
)

func TestRefusal(t *testing.T) {
	t.Run("details", func(t *testing.T) {
		r := interceptor.Refuse("rate", interceptor.ReasonRateLimit, "over 5/s").After(200 * time.Millisecond)
		err := fmt.Errorf("outer: %w", r)
		var got *interceptor.Refusal
		if !errors.As(err, &got) || !got.NotSent() || got.Layer != "rate" {
			t.Fatalf("errors.As found %+v", got)
		}
		st := status.Convert(error(r))
		if st.Code() != codes.ResourceExhausted {
			t.Errorf("code %v, want RESOURCE_EXHAUSTED", st.Code())
		}
		var info *errdetails.ErrorInfo
		var retry *errdetails.RetryInfo
		for _, d := range st.Details() {
			switch d := d.(type) {
			case *errdetails.ErrorInfo:
				info = d
			case *errdetails.RetryInfo:
				retry = d
			}
		}
		if info.GetDomain() != "belfry" || info.GetReason() != "RATE_LIMIT" || info.GetMetadata()["layer"] != "rate" {
			t.Errorf("ErrorInfo %v", info)
		}
		if retry.GetRetryDelay().AsDuration() != 200*time.Millisecond {
			t.Errorf("RetryInfo %v, want 200ms", retry)
		}
		server := status.Error(codes.Aborted, "the server's")
		spent := interceptor.RefusedAgain(interceptor.Refuse("retry", interceptor.ReasonBudget, ""), server)
		if st := status.Convert(spent); st.Code() != codes.Aborted || st.Message() != "the server's" || !errors.Is(spent, server) {
			t.Errorf("an exhausted budget is %v, want the server's error", st)
		}
	})
	t.Run("key_that_is_no_text", func(t *testing.T) {
		st := interceptor.Refuse("quota", interceptor.ReasonQuota, "").ForKey("a\xffb").GRPCStatus()
		if len(st.Details()) != 1 || st.Details()[0].(*errdetails.ErrorInfo).GetMetadata()["key"] != "a\uFFFDb" {
			t.Errorf("details %v, want an ErrorInfo with the key", st.Details())
		}
	})
}
