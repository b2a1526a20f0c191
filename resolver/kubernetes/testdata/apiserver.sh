#!/usr/bin/env bash
# Builds Kubernetes' API server and the etcd that it needs into a directory, for the
# tests that use them if they are in PATH:
#
#	resolver/kubernetes/testdata/apiserver.sh ~/bin
#
# It takes some 12 minutes of a processor, and 700 MB of modules and build cache.
set -euo pipefail
out=$(realpath "$1")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export GOWORK=off GOFLAGS="-modfile=testdata/apiserver.mod -trimpath -ldflags=-s"
go build -o "$out/kube-apiserver" k8s.io/kubernetes/cmd/kube-apiserver
go build -o "$out/etcd" go.etcd.io/etcd/server/v3
