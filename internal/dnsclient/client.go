// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package dnsclient asks DNS servers for addresses and services. Unlike net's
// resolver it tells how long an answer holds, and tells a name that does not
// exist from a server that does not answer.
package dnsclient

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"
)

// ErrNoRecords is the error of a name that exists not, or not with the type: a
// server has said so.
var ErrNoRecords = errors.New("no such records")

// An Answer is what is known of a name.
type Answer struct {
	Addrs []netip.Addr // of a question for A or AAAA
	SRV   []SRV        // of a question for SRV
	TTL   time.Duration
}

// An SRV is a server of a service (RFC 2782).
type SRV struct {
	Target                 string // absolute, in lower case
	Port, Priority, Weight uint16
	Addrs                  []netip.Addr // that came with the answer, which may be none
}

// Lookup asks for the records of a type (A, AAAA or SRV) of an absolute name.
// Servers are asked one after the other until one knows. Its error wraps
// ErrNoRecords if one knows that there are none.
func (c *Config) Lookup(ctx context.Context, name string, typ dnsmessage.Type) (Answer, error) {
	qname, err := dnsmessage.NewName(name)
	if err != nil || !validName(name) {
		return Answer{}, fmt.Errorf("%q is not a DNS name", name)
	}
	q := dnsmessage.Question{Name: qname, Type: typ, Class: dnsmessage.ClassINET}
	start := 0
	if c.Rotate {
		start = rand.IntN(len(c.Servers))
	}
	var last error
	for range c.Attempts {
		for i := range c.Servers {
			server := c.Servers[(start+i)%len(c.Servers)]
			a, err := c.ask(ctx, server, q)
			if err == nil || errors.Is(err, ErrNoRecords) {
				return a, err
			}
			// A network's error repeats the server, and has a local port that is another each time.
			if op := (*net.OpError)(nil); errors.As(err, &op) {
				err = op.Err
			}
			last = fmt.Errorf("%s of %s from %s: %w", strings.TrimPrefix(typ.String(), "Type"), name, server, err)
			if ctx.Err() != nil {
				return Answer{}, last
			}
		}
	}
	return Answer{}, last
}

// validName reports whether all labels are from 1 to 63 bytes long.
func validName(name string) bool {
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		if len(label) < 1 || len(label) > 63 {
			return false
		}
	}
	return true
}

// ask asks one server.
func (c *Config) ask(ctx context.Context, server string, q dnsmessage.Question) (Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	network := "udp"
	if c.TCP {
		network = "tcp"
	}
	edns := true
	for {
		msg, header, err := exchange(ctx, network, server, q, edns)
		switch {
		case err != nil:
			return Answer{}, err
		case header.Truncated && network == "udp":
			network = "tcp"
		case (header.RCode == dnsmessage.RCodeFormatError || header.RCode == dnsmessage.RCodeNotImplemented) && edns:
			edns = false // A server from before EDNS.
		default:
			return parse(msg, header, q)
		}
	}
}

// maxUDP is the size of an answer that passes everywhere without being
// fragmented (https://www.dnsflagday.net/2020/).
const maxUDP = 1232

// exchange sends a question and waits for its answer.
func exchange(ctx context.Context, network, server string, q dnsmessage.Question, edns bool) (msg []byte, h dnsmessage.Header, err error) {
	id := uint16(rand.Uint32())
	query, err := pack(id, q, edns)
	if err != nil {
		return nil, h, err
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, server) // Each time from another port.
	if err != nil {
		return nil, h, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline)
	}
	if network == "tcp" {
		query = append(binary.BigEndian.AppendUint16(nil, uint16(len(query))), query...)
	}
	if _, err := conn.Write(query); err != nil {
		return nil, h, err
	}
	buf := make([]byte, 1<<16)
	for {
		n, err := read(conn, network, buf)
		if err != nil {
			return nil, h, err
		}
		// What does not belong to the question may have been sent by anybody.
		var p dnsmessage.Parser
		h, err := p.Start(buf[:n])
		if err == nil && h.ID == id && h.Response {
			got, err := p.Question()
			if err == nil && got.Type == q.Type && got.Class == q.Class && strings.EqualFold(got.Name.String(), q.Name.String()) {
				return buf[:n], h, nil
			}
			if err == dnsmessage.ErrSectionDone && h.RCode != dnsmessage.RCodeSuccess {
				return buf[:n], h, nil // Some servers leave the question out of their refusals.
			}
		}
		if network == "tcp" {
			return nil, h, errors.New("the answer is not one to the question")
		}
	}
}

func pack(id uint16, q dnsmessage.Question, edns bool) ([]byte, error) {
	b := dnsmessage.NewBuilder(make([]byte, 0, 512), dnsmessage.Header{ID: id, RecursionDesired: true})
	if err := b.StartQuestions(); err != nil {
		return nil, err
	}
	if err := b.Question(q); err != nil {
		return nil, err
	}
	if edns {
		if err := b.StartAdditionals(); err != nil {
			return nil, err
		}
		var h dnsmessage.ResourceHeader
		if err := h.SetEDNS0(maxUDP, dnsmessage.RCodeSuccess, false); err != nil {
			return nil, err
		}
		if err := b.OPTResource(h, dnsmessage.OPTResource{}); err != nil {
			return nil, err
		}
	}
	return b.Finish()
}

// read reads one message.
func read(conn net.Conn, network string, buf []byte) (int, error) {
	if network != "tcp" {
		return conn.Read(buf)
	}
	if _, err := io.ReadFull(conn, buf[:2]); err != nil {
		return 0, err
	}
	return io.ReadFull(conn, buf[:binary.BigEndian.Uint16(buf)])
}

// parse takes from an answer what belongs to the question.
func parse(msg []byte, h dnsmessage.Header, q dnsmessage.Question) (Answer, error) {
	switch h.RCode {
	case dnsmessage.RCodeSuccess:
	case dnsmessage.RCodeNameError:
		return Answer{}, fmt.Errorf("%w: the name does not exist", ErrNoRecords)
	default:
		return Answer{}, fmt.Errorf("the server said %s", strings.TrimPrefix(h.RCode.String(), "RCode"))
	}
	var p dnsmessage.Parser
	if _, err := p.Start(msg); err != nil {
		return Answer{}, err
	}
	if err := p.SkipAllQuestions(); err != nil {
		return Answer{}, err
	}
	answers, err := p.AllAnswers()
	if err != nil {
		return Answer{}, fmt.Errorf("the answer cannot be read: %w", err)
	}

	// The name may be another's alias, which has the records.
	name, ttl := lower(q.Name), ^uint32(0)
	for range answers { // More steps would be a circle.
		for _, r := range answers {
			if alias, ok := r.Body.(*dnsmessage.CNAMEResource); ok && lower(r.Header.Name) == name {
				name, ttl = lower(alias.CNAME), min(ttl, r.Header.TTL)
				break
			}
		}
	}
	var a Answer
	for _, r := range answers {
		if r.Header.Type != q.Type || lower(r.Header.Name) != name {
			continue
		}
		ttl = min(ttl, r.Header.TTL)
		switch body := r.Body.(type) {
		case *dnsmessage.AResource:
			a.Addrs = append(a.Addrs, netip.AddrFrom4(body.A))
		case *dnsmessage.AAAAResource:
			a.Addrs = append(a.Addrs, netip.AddrFrom16(body.AAAA).Unmap())
		case *dnsmessage.SRVResource:
			a.SRV = append(a.SRV, SRV{Target: lower(body.Target), Port: body.Port, Priority: body.Priority, Weight: body.Weight})
		}
	}
	if len(a.Addrs)+len(a.SRV) == 0 {
		if !h.Authoritative && !h.RecursionAvailable && len(answers) == 0 {
			return Answer{}, errors.New("the server does not answer for the name")
		}
		return Answer{}, fmt.Errorf("%w: the name has none of this type", ErrNoRecords)
	}
	if len(a.SRV) > 0 {
		ttl = min(ttl, addGlue(&p, a.SRV))
	}
	// Values with the highest bit set are errors (RFC 2181, section 8).
	if ttl > 1<<31-1 {
		ttl = 0
	}
	a.TTL = time.Duration(ttl) * time.Second
	return a, nil
}

// addGlue adds the addresses that came with an answer. It returns their least TTL.
func addGlue(p *dnsmessage.Parser, srv []SRV) (ttl uint32) {
	ttl = ^uint32(0)
	if p.SkipAllAuthorities() != nil {
		return ttl
	}
	glue, err := p.AllAdditionals()
	if err != nil {
		return ttl // It is not needed.
	}
	for i := range srv {
		for _, r := range glue {
			if lower(r.Header.Name) != srv[i].Target {
				continue
			}
			switch body := r.Body.(type) {
			case *dnsmessage.AResource:
				srv[i].Addrs = append(srv[i].Addrs, netip.AddrFrom4(body.A))
			case *dnsmessage.AAAAResource:
				srv[i].Addrs = append(srv[i].Addrs, netip.AddrFrom16(body.AAAA).Unmap())
			default:
				continue
			}
			ttl = min(ttl, r.Header.TTL)
		}
	}
	return ttl
}

func lower(n dnsmessage.Name) string { return strings.ToLower(n.String()) }
