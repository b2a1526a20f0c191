// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package attempt

import "google.golang.org/protobuf/proto"

// frame is what gRPC puts before a message: whether it is compressed, and its length.
const frame = 5

// Size returns how many bytes m takes on the wire with its frame, if that is known without
// encoding it. It includes the frame so that a limit also bounds how many empty messages
// are kept.
func Size(m any) (n int, ok bool) {
	switch m := m.(type) {
	case proto.Message:
		return frame + proto.Size(m), true
	case []byte:
		return frame + len(m), true
	case *[]byte:
		return frame + len(*m), true
	case interface{ Size() int }: // Of third-party generators.
		return frame + m.Size(), true
	}
	return 0, false
}
