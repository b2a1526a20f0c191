// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor_test

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/belfry-go/belfry/interceptor"
	"github.com/belfry-go/belfry/internal/test/calltest"
)

type recorder struct {
	interceptor.NopObserver
	log eventLog
}

func (r *recorder) Admitted(m string, k interceptor.Kind, n int) {
	r.log.add("admitted %s %s %d", m, k, n)
}

func (r *recorder) Refused(m, l string, re interceptor.Reason) {
	r.log.add("refused %s %s %s", m, l, re)
}

func (r *recorder) Attempt(m string, n int) { r.log.add("attempt %s %d", m, n) }

func (r *recorder) InFlight(d int) { r.log.add("inflight %+d", d) }

func (r *recorder) Waited(m, l string, d time.Duration) { r.log.add("waited %s %s %v", m, l, d) }

func (r *recorder) Ended(m string, k interceptor.Kind, o interceptor.Outcome, err error) {
	r.log.add("ended %s %s %s %s", m, k, o, status.Code(err))
}

func TestObserver(t *testing.T) {
	t.Run("is_told_what_gates_are", func(t *testing.T) {
		for _, kind := range allKinds {
			synctest.Test(t, func(t *testing.T) {
				obs := &recorder{}
				f := newFixture(t, "pick_first", "dial_options", nil, interceptor.Observe(obs), &gateToy{})
				f.fail(codes.Aborted, "")
				f.call(t, kind)
				f.opts = append(f.opts, grpc.PerRPCCredentials(badCredentials{status.Error(codes.Unavailable, "")}))
				f.call(t, kind)
				var ended []string
				for _, e := range obs.log.take() {
					if strings.HasPrefix(e, "ended") {
						ended = append(ended, e)
					}
				}
				what := "ended " + methodOf[kind] + " " + kind.String()
				if want := []string{what + " failed Aborted", what + " not_sent Unavailable"}; !slices.Equal(ended, want) {
					t.Errorf("observed %q, want %q", ended, want)
				}
			})
		}
	})

	t.Run("sees_admissions_attempts_refusals_and_ends", func(t *testing.T) {
		obs := &recorder{}
		tokens := newTokens(2)
		s := calltest.Stack(t, interceptor.Observe(obs), &retryToy{n: 3}, tokens)
		unavailable := status.Error(codes.Unavailable, "")
		s.Wrap(answers(unavailable, unavailable)).Invoke(context.Background(), "/m", nil, new(wrapperspb.StringValue))
		want := []string{"inflight +1", "admitted /m unary 0", "attempt /m 0", "admitted /m unary 1", "attempt /m 1",
			"refused /m tokens RATE_LIMIT", "ended /m unary failed Unavailable", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
		s.Wrap(answers()).Invoke(context.Background(), "/m", nil, nil)
		want = []string{"inflight +1", "refused /m tokens RATE_LIMIT", "inflight -1"}
		if got := obs.log.take(); !slices.Equal(got, want) {
			t.Errorf("observed %q, want %q", got, want)
		}
	})
}
