// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package dnsclient

import "golang.org/x/net/dns/dnsmessage"

// ParseForTest parses a message as the answer to a question.
func ParseForTest(msg []byte, q dnsmessage.Question) (Answer, error) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil {
		return Answer{}, err
	}
	return parse(msg, h, q)
}
