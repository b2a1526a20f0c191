// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package dnstest is a DNS server for tests.
package dnstest

import (
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"

	"golang.org/x/net/dns/dnsmessage"
)

// A Server answers on UDP and TCP, on one port of 127.0.0.1, from the records it
// has. It is safe for concurrent use.
type Server struct {
	Addr string

	mu        sync.Mutex // guards all below
	records   map[string][]dnsmessage.Resource
	glue      map[string][]dnsmessage.Resource
	override  func(q dnsmessage.Question, network string) *Reply
	questions []string
}

// A Reply is what a server says to a question.
type Reply struct {
	dnsmessage.Header
	Answers, Additionals []dnsmessage.Resource
	Silent               bool   // says nothing
	Raw                  []byte // says this, whatever it means
}

// New starts a server that knows no names. It stops when the test ends.
func New(t testing.TB) *Server {
	s := &Server{records: make(map[string][]dnsmessage.Resource), glue: make(map[string][]dnsmessage.Resource)}
	var udp net.PacketConn
	var tcp net.Listener
	for i := 0; ; i++ {
		var err error
		if udp, err = net.ListenPacket("udp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		if tcp, err = net.Listen("tcp", udp.LocalAddr().String()); err == nil {
			break
		}
		_ = udp.Close()
		if i == 100 {
			t.Fatalf("no port that is free for both UDP and TCP: %v", err)
		}
	}
	s.Addr = udp.LocalAddr().String()
	var wg sync.WaitGroup
	wg.Go(func() { s.serveUDP(udp) })
	wg.Go(func() { s.serveTCP(tcp, &wg) })
	t.Cleanup(func() {
		_ = udp.Close()
		tcp.Close()
		wg.Wait()
	})
	return s
}

// Set gives a name its records, in place of those it has. Without any the name
// exists no longer.
func (s *Server) Set(name string, ttl uint32, bodies ...dnsmessage.ResourceBody) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, name)
	for _, body := range bodies {
		s.records[name] = append(s.records[name], Record(name, ttl, body))
	}
}

// Glue sets what comes with the answers for a name, in the additional section.
func (s *Server) Glue(name string, records ...dnsmessage.Resource) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.glue[name] = records
}

// Override makes the server say what f returns. A nil reply is that of the
// records, and a nil f ends it.
func (s *Server) Override(f func(q dnsmessage.Question, network string) *Reply) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.override = f
}

// Questions returns the questions so far, as "network type name", and forgets
// them.
func (s *Server) Questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.questions
	s.questions = nil
	return q
}

// Record returns a record for Glue or a Reply.
func Record(name string, ttl uint32, body dnsmessage.ResourceBody) dnsmessage.Resource {
	typ := dnsmessage.TypeA
	switch body.(type) {
	case *dnsmessage.AAAAResource:
		typ = dnsmessage.TypeAAAA
	case *dnsmessage.SRVResource:
		typ = dnsmessage.TypeSRV
	case *dnsmessage.CNAMEResource:
		typ = dnsmessage.TypeCNAME
	}
	return dnsmessage.Resource{
		Header: dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Type: typ, Class: dnsmessage.ClassINET, TTL: ttl},
		Body:   body,
	}
}

// Addr returns an A or AAAA record.
func Addr(ip string) dnsmessage.ResourceBody {
	a := netip.MustParseAddr(ip)
	if a.Is4() {
		return &dnsmessage.AResource{A: a.As4()}
	}
	return &dnsmessage.AAAAResource{AAAA: a.As16()}
}

// SRV returns an SRV record.
func SRV(target string, port, priority, weight uint16) dnsmessage.ResourceBody {
	return &dnsmessage.SRVResource{Target: dnsmessage.MustNewName(target), Port: port, Priority: priority, Weight: weight}
}

// CNAME returns a CNAME record.
func CNAME(target string) dnsmessage.ResourceBody {
	return &dnsmessage.CNAMEResource{CNAME: dnsmessage.MustNewName(target)}
}

func (s *Server) serveUDP(conn net.PacketConn) {
	buf := make([]byte, 1<<16)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		if reply := s.reply(buf[:n], "udp"); reply != nil {
			_, _ = conn.WriteTo(reply, from)
		}
	}
}

func (s *Server) serveTCP(l net.Listener, wg *sync.WaitGroup) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer conn.Close()
			size := make([]byte, 2)
			if _, err := io.ReadFull(conn, size); err != nil {
				return
			}
			query := make([]byte, binary.BigEndian.Uint16(size))
			if _, err := io.ReadFull(conn, query); err != nil {
				return
			}
			if reply := s.reply(query, "tcp"); reply != nil {
				_, _ = conn.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(reply))), reply...))
			}
		})
	}
}

// maxUDP is the size of answers without EDNS.
const maxUDP = 512

func (s *Server) reply(query []byte, network string) []byte {
	var m dnsmessage.Message
	if m.Unpack(query) != nil || len(m.Questions) != 1 {
		return nil
	}
	q := m.Questions[0]
	size := maxUDP
	for _, r := range m.Additionals {
		if r.Header.Type == dnsmessage.TypeOPT {
			size = int(r.Header.Class)
		}
	}
	r := s.say(q, network)
	if r.Silent {
		return nil
	}
	if r.Raw != nil {
		return r.Raw
	}
	r.Header.ID += m.ID // What an override sets is an error on purpose.
	r.Header.Response = true
	reply := dnsmessage.Message{Header: r.Header, Questions: m.Questions, Answers: r.Answers, Additionals: r.Additionals}
	packed, err := reply.Pack()
	if err != nil {
		panic(err)
	}
	if network == "udp" && len(packed) > size {
		reply.Truncated, reply.Answers, reply.Additionals = true, nil, nil
		packed, _ = reply.Pack()
	}
	return packed
}

func (s *Server) say(q dnsmessage.Question, network string) *Reply {
	s.mu.Lock()
	defer s.mu.Unlock()
	name := strings.ToLower(q.Name.String())
	s.questions = append(s.questions, network+" "+strings.TrimPrefix(q.Type.String(), "Type")+" "+name)
	if s.override != nil {
		if r := s.override(q, network); r != nil {
			return r
		}
	}
	r := &Reply{Header: dnsmessage.Header{Authoritative: true, RCode: dnsmessage.RCodeNameError}}
	for range 10 { // A circle of aliases ends too.
		records, ok := s.records[name]
		if !ok {
			break
		}
		r.RCode = dnsmessage.RCodeSuccess
		next := ""
		for _, rec := range records {
			alias, isAlias := rec.Body.(*dnsmessage.CNAMEResource)
			if rec.Header.Type == q.Type || isAlias {
				r.Answers = append(r.Answers, rec)
			}
			if isAlias {
				next = strings.ToLower(alias.CNAME.String())
			}
		}
		if name = next; name == "" {
			break
		}
	}
	r.Additionals = s.glue[strings.ToLower(q.Name.String())]
	return r
}
