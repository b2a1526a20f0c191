// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

//go:build unix

package kubernetes

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/client-go/rest"

	"github.com/belfry-go/belfry/internal/test/enginetest"
)

// A realServer is Kubernetes' API server, and its etcd.
type realServer struct {
	t                 *testing.T
	dir               string
	apiPort, etcdPort string
	etcdPeer          string
	apiserver, etcd   *exec.Cmd // nil: not running
	config            *rest.Config
	client            rest.Interface
}

// startReal starts the programs that testdata/apiserver.sh builds. It skips the test where
// they are not in PATH.
func startReal(t *testing.T) *realServer {
	t.Helper()
	for _, program := range []string{"kube-apiserver", "etcd"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("%s is not in PATH; resolver/kubernetes/testdata/apiserver.sh builds it", program)
		}
	}
	s := &realServer{t: t, dir: t.TempDir(), apiPort: freePort(t), etcdPort: freePort(t), etcdPeer: freePort(t)}
	key, err := exec.Command("openssl", "genrsa", "2048").Output()
	if err != nil {
		t.Skipf("openssl is needed to make a key: %v", err)
	}
	for name, text := range map[string]string{"key": string(key), "tokens": "secret,admin,admin,system:masters\n"} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.config = &rest.Config{
		Host: "https://127.0.0.1:" + s.apiPort, BearerToken: "secret",
		TLSClientConfig: rest.TLSClientConfig{Insecure: true},
	}
	unlimited := rest.CopyConfig(s.config)
	unlimited.QPS = -1
	if s.client, err = newClient(unlimited); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		kill(&s.apiserver)
		kill(&s.etcd)
	})
	s.startEtcd()
	s.startAPI()
	return s
}

// freePort returns a port that is free now.
func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	return port
}

func (s *realServer) run(program string, args ...string) *exec.Cmd {
	s.t.Helper()
	log, err := os.OpenFile(filepath.Join(s.dir, program+".log"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	return cmd
}

// kill ends a program as if the machine had lost its power.
func kill(cmd **exec.Cmd) {
	if c := *cmd; c != nil {
		*cmd = nil
		_ = c.Process.Kill()
		_ = c.Wait()
	}
}

func (s *realServer) startEtcd() {
	client, peer := "http://127.0.0.1:"+s.etcdPort, "http://127.0.0.1:"+s.etcdPeer
	s.etcd = s.run("etcd", "--data-dir=data", "--listen-client-urls="+client, "--advertise-client-urls="+client,
		"--listen-peer-urls="+peer, "--initial-advertise-peer-urls="+peer, "--initial-cluster=default="+peer)
}

// startAPI starts the API server and waits until it answers.
func (s *realServer) startAPI() {
	s.t.Helper()
	s.apiserver = s.run("kube-apiserver", "--etcd-servers=http://127.0.0.1:"+s.etcdPort,
		"--secure-port="+s.apiPort, "--bind-address=127.0.0.1", "--cert-dir=certs", "--token-auth-file=tokens",
		"--service-account-issuer=https://localhost", "--service-account-key-file=key", "--service-account-signing-key-file=key",
		"--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount,NamespaceLifecycle")
	s.retry("listing", func(ctx context.Context) error {
		return s.client.Get().Namespace("prod").Resource("endpointslices").Do(ctx).Error()
	})
}

// retry calls f until it succeeds.
func (s *realServer) retry(what string, f func(context.Context) error) {
	s.t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := f(ctx)
		cancel()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			log, _ := os.ReadFile(filepath.Join(s.dir, "kube-apiserver.log"))
			s.t.Fatalf("%s: %v\n%s", what, err, log[max(0, len(log)-4000):])
		}
	}
}

// put implements store.
func (s *realServer) put(slices ...*discoveryv1.EndpointSlice) {
	for _, slice := range slices {
		s.retry("putting "+slice.Name, func(ctx context.Context) error {
			err := s.client.Put().Namespace("prod").Resource("endpointslices").Name(slice.Name).Body(slice).Do(ctx).Error()
			if apierrors.IsNotFound(err) {
				err = s.client.Post().Namespace("prod").Resource("endpointslices").Body(slice).Do(ctx).Error()
			}
			return err
		})
	}
}

// remove implements store.
func (s *realServer) remove(name string) {
	s.retry("removing "+name, func(ctx context.Context) error {
		err := s.client.Delete().Namespace("prod").Resource("endpointslices").Name(name).Do(ctx).Error()
		if apierrors.IsNotFound(err) {
			return nil
		}
		return err
	})
}

// On Kubernetes' own API server: 1,000 random changes under load, a new pod's share, and
// an API server that is killed, stopped, slow, without its etcd, or restarted with it. The
// flag -outage says how long each lasts.
func TestRealAPIServer(t *testing.T) {
	api := startReal(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	// The API server takes no address of loopback for a pod's, so the dialer makes it one.
	servers := enginetest.Serve(t, 10)
	addrs := make([]string, len(servers))
	for i, addr := range servers {
		addrs[i] = strings.Replace(addr, "127.0.0.1", ipv4(i+1), 1)
	}
	dialer := grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) {
		_, port, err := net.SplitHostPort(addr)
		if err != nil {
			return nil, err
		}
		return new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort("127.0.0.1", port))
	})
	proxy := enginetest.NewProxy(t)
	target := func() string { return "127.0.0.1:" + api.apiPort }
	proxy.ForwardTo(target())
	cfg := rest.CopyConfig(api.config)
	cfg.Host = "https://" + proxy.Addr()

	model := set{}
	change := func(i int) { randomPod(rng, api, i, addrs[i], model) }
	for i := range addrs {
		change(i)
	}
	channel := enginetest.Dial(t, newSource(t, api.config, "prod/orders:grpc"), dialer)
	proxied := enginetest.Dial(t, newSource(t, cfg, "prod/orders:grpc"), dialer)
	for _, c := range []*enginetest.Channel{channel, proxied} {
		c.WaitSet(t, model)
		c.Load(2)
	}
	for range 1000 {
		change(rng.IntN(len(addrs)))
	}
	channel.WaitSet(t, model)
	proxied.WaitSet(t, model)

	addPod9(t, api, channel, model, change, addrs[9], servers[9])

	round := 0
	next := func() set {
		round++
		key := fmt.Sprint("extra-", round)
		host, port, _ := strings.Cut(addrs[1+round%9], ":")
		var number int32
		fmt.Sscan(port, &number)
		// What is one address is one endpoint, that of the smallest key.
		api.put(sliceWith("extra", map[string]int32{"grpc": number}, pod(key, strings.Replace(host, "10.0.", "10.9.", 1), "")))
		for k := range model {
			if strings.HasPrefix(k, "extra-") {
				delete(model, k)
			}
		}
		model[key] = strings.Replace(addrs[1+round%9], "10.0.", "10.9.", 1) + "*1@"
		return model
	}
	const refused = "connection refused"
	channel.Survive(t, next,
		enginetest.Disturbance{Name: "killed", Told: refused, Begin: func() { kill(&api.apiserver) }, End: api.startAPI},
		enginetest.Disturbance{
			Name: "killed with its etcd", Told: refused,
			Begin: func() { kill(&api.apiserver); kill(&api.etcd) },
			End:   func() { api.startEtcd(); api.startAPI() },
		},
		enginetest.Disturbance{
			Name:  "stopped",
			Begin: func() { _ = api.apiserver.Process.Signal(syscall.SIGSTOP) },
			End:   func() { _ = api.apiserver.Process.Signal(syscall.SIGCONT) },
		},
		enginetest.Disturbance{
			Name:  "without its etcd",
			Begin: func() { kill(&api.etcd) },
			End:   api.startEtcd,
		},
	)
	proxied.WaitSet(t, model)
	proxied.Survive(t, next, proxy.Disturb(target)...)
	channel.WaitSet(t, model)
}
