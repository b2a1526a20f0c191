// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import (
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// ServerSpoke reports whether the server answered with a trailer alone, which is how
// it says that a call failed: gRPC keeps its content-type in the metadata. The
// errors that the client makes itself come without.
func ServerSpoke(trailer metadata.MD) bool { return len(trailer["content-type"]) > 0 }

// The errors of a message that gRPC could not send or take, by the beginnings of
// their texts: gRPC gives them codes that servers use as well, and no other mark.
// They are looked for only where the server has not spoken.
var (
	sendErrors = map[codes.Code][]string{
		codes.ResourceExhausted: {"trying to send message larger than max", "grpc: message too large"},
		codes.Internal:          {"grpc: error while marshaling", "grpc: error while compressing"},
	}
	receiveErrors = map[codes.Code][]string{
		codes.ResourceExhausted: {"grpc: received message larger than max", "grpc: message after decompression larger than max", "grpc: received message after decompression larger than max"},
		codes.Internal:          {"grpc: failed to unmarshal the received message", "grpc: failed to decompress", "grpc: Decompressor is not installed"},
	}
)

// IsSendError reports whether err looks like that of a message that gRPC could not
// send: too large, or not marshallable.
func IsSendError(err error) bool { return hasText(err, sendErrors) }

// IsReceiveError reports whether err looks like that of an answer that gRPC could not
// take: too large, not unmarshallable, or not decompressed.
func IsReceiveError(err error) bool { return hasText(err, receiveErrors) }

func hasText(err error, texts map[codes.Code][]string) bool {
	st, ok := status.FromError(err)
	if !ok {
		return false
	}
	for _, text := range texts[st.Code()] {
		if strings.HasPrefix(st.Message(), text) {
			return true
		}
	}
	return false
}
