// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package acceptance

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/belfry-go/belfry/balancer/p2c"
	testingv1 "github.com/belfry-go/belfry/proto/belfry/testing/v1"
)

const serverName = "orders.example"

// configs returns what a server of serverName has for TLS, and what a client that trusts it.
func configs(t *testing.T) (server, client *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		DNSNames:     []string{serverName},
		NotBefore:    time.Now().Add(-time.Hour),
		NotAfter:     time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}},
		&tls.Config{RootCAs: pool, ServerName: serverName}
}

// token is a credential that goes over encrypted connections only.
type token struct{ asked *atomic.Int32 }

func (c token) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	c.asked.Add(1)
	return map[string]string{"authorization": "Bearer token"}, nil
}

func (token) RequireTransportSecurity() bool { return true }

// bundle is credentials of the connection and of the calls in one.
type bundle struct {
	transport credentials.TransportCredentials
	call      token
}

func (b bundle) TransportCredentials() credentials.TransportCredentials { return b.transport }
func (b bundle) PerRPCCredentials() credentials.PerRPCCredentials       { return b.call }
func (b bundle) NewWithMode(string) (credentials.Bundle, error)         { return b, nil }

// The policy reads how many streams a server allows from what comes out of the encryption,
// whatever the credentials of the channel are.
func TestConnectionsOverTLS(t *testing.T) {
	asked := new(atomic.Int32)
	for name, dial := range map[string]func(credentials.TransportCredentials) []grpc.DialOption{
		"transport_credentials": func(c credentials.TransportCredentials) []grpc.DialOption {
			return []grpc.DialOption{grpc.WithTransportCredentials(c)}
		},
		"bundle": func(c credentials.TransportCredentials) []grpc.DialOption {
			return []grpc.DialOption{grpc.WithTransportCredentials(nil), grpc.WithCredentialsBundle(bundle{c, token{asked}}), grpc.WithAuthority(serverName)}
		},
	} {
		t.Run(name, func(t *testing.T) {
			over := func(t *testing.T) (credentials.TransportCredentials, []grpc.DialOption) {
				server, client := configs(t)
				return credentials.NewTLS(server), dial(credentials.NewTLS(client))
			}
			withBoundedOver(t, over, `{"maxConnectionsPerSubchannel":10}`, []uint32{3, 3}, func(t *testing.T, b *bounded) {
				b.streams(20)
				s := p2c.SnapshotsOf(b.conn)[0].Endpoints
				if n := s[0].Connections + s[1].Connections; n < 7 || n > 8 {
					t.Errorf("%d connections for 20 streams, 3 on each, want 7 or 8", n)
				}
				var p peer.Peer
				if _, err := b.client.Unary(b.ctx, &testingv1.UnaryRequest{}, grpc.Peer(&p)); err != nil {
					t.Fatal(err)
				}
				if info, ok := p.AuthInfo.(credentials.TLSInfo); !ok || info.State.ServerName != serverName {
					t.Errorf("the peer's AuthInfo is %+v, want TLS with %s", p.AuthInfo, serverName)
				}
				if n := asked.Load(); name == "bundle" && n != 21 {
					t.Errorf("the bundle's credential was asked %d times, want once for each of 21 calls", n)
				}
			})
		})
	}
}
