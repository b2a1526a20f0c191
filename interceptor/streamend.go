// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package interceptor

import "context"

// A StreamEnd ends a stream for the layers outside the one that made it. A layer
// that cuts streams short on its own account, such as an idle timeout, needs it:
// nobody may be reading from the stream any more, and then the layers outside
// would not hear that it is over, and would keep what they hold for it.
type StreamEnd struct{ scope *scope }

// StreamEnd returns what ends the stream that c is about to open. A layer calls
// it in the call path, before it calls next.
func (c *Call) StreamEnd() StreamEnd { return StreamEnd{c.scope} }

// End releases what the layers outside hold for the stream, as if RecvMsg had
// returned err to them, up to the nearest that may open another one. The layer
// has cancelled the stream's context by then, with a [*Refusal] as the cause. It
// may be called from any goroutine; if the stream has ended it does nothing.
func (e StreamEnd) End(err error) {
	if e.scope != nil {
		e.scope.end(err, false)
	}
}

// cutShort reports whether a layer has ended ctx, with its refusal as the cause.
func cutShort(ctx context.Context) bool {
	_, ok := AsRefusal(context.Cause(ctx))
	return ok
}
