// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

// Package monitoring has a dashboard for Grafana (dashboard.json) and alert rules for
// Prometheus (alerts.yaml) over the metrics of package otelobserver. Its test makes the
// incidents happen that they are for. It is a module of its own for the exporter's sake.
package monitoring
