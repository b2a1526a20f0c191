// Copyright 2026 The belfry Authors
// SPDX-License-Identifier: Apache-2.0

package p2c

import (
	"encoding/json"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/balancer"
	_ "google.golang.org/grpc/balancer/randomsubsetting" // registers the parent
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/belfry-go/belfry/load"
)

func TestConfigDefaults(t *testing.T) {
	expected := expectedLatency{load.DefaultExpectedLatencyConfig()}
	reporting := expected
	reporting.Reports = load.DefaultReportsConfig()
	for _, test := range []struct {
		json            string
		choices, memory int
		metric          metricConfig
	}{
		{`{}`, 8, 2, expected},
		{`{"load":{}}`, 8, 2, expected},
		{`{"load":{"expectedLatency":{}}}`, 8, 2, expected},
		{`{"load":{"expectedLatency":{"reports":{}}}}`, 12, 8, reporting},
		{`{"load":{"peakEwma":{}}}`, 2, 0, peakEWMA{load.DefaultPeakEWMAConfig()}},
		{`{"load":{"pendingRequests":{}}}`, 2, 0, pendingRequests{}},
		{`{"load":{"constant":{}}}`, 2, 0, constant{1}},
	} {
		c, err := parseConfig(json.RawMessage(test.json))
		if err != nil {
			t.Errorf("%s: %v", test.json, err)
			continue
		}
		if c.choices != test.choices || c.memory != test.memory {
			t.Errorf("%s: %d choices and memory %d, want %d and %d", test.json, c.choices, c.memory, test.choices, test.memory)
		}
		if c.metric != test.metric {
			t.Errorf("%s: metric is %+v, want %+v", test.json, c.metric, test.metric)
		}
		if c.failures != defaultFailures {
			t.Errorf("%s: failure codes are %b, want the default %b", test.json, c.failures, defaultFailures)
		}
	}
}

func TestConfigSetsEveryField(t *testing.T) {
	for _, test := range []struct {
		json string
		want metricConfig
	}{
		{`{"expectedLatency":{"priorSamples":0.5,"queueExponent":0,"keepSamples":7,"forgetRounds":9.5,"forgetAfter":"1.5s","failurePenalty":2,"ageLimit":3,
			"spreadPrior":0,"minSpread":0.125,"firstFailure":"0.25s","sampleLimit":4,"streamAgeLimit":0,"slowMethod":8,"maxMethods":0}}`,
			expectedLatency{load.ExpectedLatencyConfig{PriorSamples: 0.5, MinSpread: 0.125, QueueExponent: 0, KeepSamples: 7, ForgetRounds: 9.5,
				ForgetAfter: 1500 * time.Millisecond, FailurePenalty: 2, FirstFailure: 250 * time.Millisecond, SampleLimit: 4,
				AgeLimit: 3, SlowMethod: 8}}},
		{`{"peakEwma":{"decay":"0.000000001s","defaultRtt":"3600s","failurePenalty":1}}`,
			peakEWMA{load.PeakEWMAConfig{Decay: 1, DefaultRTT: time.Hour, FailurePenalty: 1}}},
		{`{"constant":{"load":0}}`, constant{0}},
		{`{"constant":{"load":2.5}}`, constant{2.5}},
	} {
		c, err := parseConfig(json.RawMessage(`{"choiceCount":3,"memory":1,"failureCodes":["ABORTED","UNAVAILABLE"],
			"equalAtRest":0,"equalUnderLoad":1.5,"equalTime":"3s","exploreEvery":7,"exploreAfter":"2s","load":` + test.json + `}`))
		if err != nil {
			t.Errorf("%s: %v", test.json, err)
			continue
		}
		if c.choices != 3 || c.memory != 1 {
			t.Errorf("%s: %d choices and memory %d, want 3 and 1", test.json, c.choices, c.memory)
		}
		if c.equalAtRest != 0 || c.equalUnderLoad != 1.5 || c.exploreEvery != 7 || c.exploreAfter != 2*time.Second {
			t.Errorf("%s: got %v, %v, %v and %v, want 0, 1.5, 7 and 2s", test.json, c.equalAtRest, c.equalUnderLoad, c.exploreEvery, c.exploreAfter)
		}
		if _, times := c.metric.(expectedLatency); times != (c.equalTime == 3e9) || !times && c.equalTime != 0 {
			t.Errorf("%s: equalTime is %v ns, want 3s, and 0 for a metric whose costs have no errors", test.json, c.equalTime)
		}
		if want := setOf(codes.Aborted, codes.Unavailable); c.failures != want {
			t.Errorf("%s: failure codes are %b, want %b", test.json, c.failures, want)
		}
		if c.metric != test.want {
			t.Errorf("%s: metric is %+v, want %+v", test.json, c.metric, test.want)
		}
	}
}

func TestConfigRejectsWithFieldValueAndRule(t *testing.T) {
	for _, test := range []struct{ json, field, value, rule string }{
		{`{"choiceCount":0}`, "choiceCount", "0", "between 2 and 16"},
		{`{"choiceCount":1}`, "choiceCount", "1", "between 2 and 16"},
		{`{"choiceCount":17}`, "choiceCount", "17", "between 2 and 16"},
		{`{"failureAccrual":{"failures":1000001}}`, "failureAccrual.failures", "1000001", "between 0 and 1000000"},
		{`{"failureAccrual":{"successRate":1.5}}`, "failureAccrual.successRate", "1.5", "between 0 and 1"},
		{`{"failureAccrual":{"successRate":"NaN"}}`, "failureAccrual.successRate", "NaN", "between 0 and 1"},
		{`{"failureAccrual":{"minAttempts":0}}`, "failureAccrual.minAttempts", "0", "between 1 and 1000000"},
		{`{"failureAccrual":{"window":"0.01s"}}`, "failureAccrual.window", "10ms", "between 100ms and 1h0m0s"},
		{`{"failureAccrual":{"baseTime":"0s"}}`, "failureAccrual.baseTime", "0s", "above 0s"},
		{`{"failureAccrual":{"baseTime":"2s","maxTime":"1s"}}`, "failureAccrual.maxTime", "1s", "at least 2s"},
		{`{"failureAccrual":{"maxAside":-0.1}}`, "failureAccrual.maxAside", "-0.1", "between 0 and 1"},
		{`{"failureAccrual":{"slow":1.5}}`, "failureAccrual.slow", "1.5", "0, or between 2 and 1000000"},
		{`{"slowStart":{"window":"7200s"}}`, "slowStart.window", "2h0m0s", "between 100ms and 1h0m0s"},
		{`{"slowStart":{"floor":0}}`, "slowStart.floor", "0", "between 0.01 and 1"},
		{`{"memory":9}`, "memory", "9", "between 0 and 8"},
		{`{"failureCodes":["NOPE"]}`, "failureCodes[0]", "NOPE", "the name of a status code"},
		{`{"failureCodes":["ABORTED","OK"]}`, "failureCodes[1]", "OK", "other than OK"},
		{`{"failureCodes":["ABORTED","ABORTED"]}`, "failureCodes[1]", "ABORTED", "named only once"},
		{`{"failureCodes":[""]}`, "failureCodes[0]", "", "the name of a status code"},
		{`{"failureCodes":["unavailable"]}`, "failureCodes[0]", "unavailable", "the name of a status code"},
		{`{"failureCodes":["14"]}`, "failureCodes[0]", "14", "the name of a status code"},
		{`{"load":{"peakEwma":{"decay":"0s"}}}`, "load.peakEwma.decay", "0s", "above 0s"},
		{`{"load":{"peakEwma":{"decay":"-1s"}}}`, "load.peakEwma.decay", "-1s", "above 0s"},
		{`{"load":{"peakEwma":{"defaultRtt":"0s"}}}`, "load.peakEwma.defaultRtt", "0s", "above 0s"},
		{`{"load":{"peakEwma":{"failurePenalty":0}}}`, "load.peakEwma.failurePenalty", "0", "between 1 and 1e+06"},
		{`{"load":{"peakEwma":{"failurePenalty":"NaN"}}}`, "load.peakEwma.failurePenalty", "NaN", "between 1 and 1e+06"},
		{`{"load":{"constant":{"load":-1}}}`, "load.constant.load", "-1", "finite and at least 0"},
		{`{"load":{"constant":{"load":"Infinity"}}}`, "load.constant.load", "+Inf", "finite and at least 0"},
		{`{"load":{"expectedLatency":{"priorSamples":0}}}`, "load.expectedLatency.priorSamples", "0", "above 0 and at most 1000"},
		{`{"load":{"expectedLatency":{"queueExponent":1.5}}}`, "load.expectedLatency.queueExponent", "1.5", "between 0 and 1"},
		{`{"load":{"expectedLatency":{"keepSamples":0.5}}}`, "load.expectedLatency.keepSamples", "0.5", "between 1 and 1e+06"},
		{`{"load":{"expectedLatency":{"forgetRounds":-2}}}`, "load.expectedLatency.forgetRounds", "-2", "above 0"},
		{`{"load":{"expectedLatency":{"forgetAfter":"0s"}}}`, "load.expectedLatency.forgetAfter", "0s", "above 0s"},
		{`{"load":{"expectedLatency":{"failurePenalty":0.5}}}`, "load.expectedLatency.failurePenalty", "0.5", "between 1 and 1e+06"},
		{`{"equalAtRest":-0.1}`, "equalAtRest", "-0.1", "between 0 and 10"},
		{`{"load":{"expectedLatency":{"reports":{"keepSamples":0.5}}}}`, "load.expectedLatency.reports.keepSamples", "0.5", "between 1 and 1e+06"},
		{`{"equalTime":"-1s"}`, "equalTime", "-1s", "at least 0s"},
		{`{"equalUnderLoad":"NaN"}`, "equalUnderLoad", "NaN", "between 0 and 10"},
		{`{"exploreEvery":1000001}`, "exploreEvery", "1000001", "between 0 and 1000000"},
		{`{"exploreAfter":"0s"}`, "exploreAfter", "0s", "above 0s"},
		{`{"load":{"expectedLatency":{"slowMethod":0}}}`, "load.expectedLatency.slowMethod", "0", "between 1 and 1e+06"},
		{`{"load":{"expectedLatency":{"maxMethods":10001}}}`, "load.expectedLatency.maxMethods", "10001", "between 0 and 10000"},
		{`{"load":{"expectedLatency":{"ageLimit":0}}}`, "load.expectedLatency.ageLimit", "0", "between 1 and 1e+06"},
	} {
		t.Run(test.json, func(t *testing.T) {
			_, err := parseConfig(json.RawMessage(test.json))
			if err == nil {
				t.Fatal("got no error")
			}
			if want := "belfry.p2c: " + test.field + ": " + test.value + ", must be "; !strings.HasPrefix(err.Error(), want) {
				t.Errorf("error is %q, want it to begin with %q", err, want)
			}
			if !strings.Contains(err.Error(), test.rule) {
				t.Errorf("error is %q, want it to state the rule %q", err, test.rule)
			}
		})
	}
}

func TestConfigRejectsWhatIsNotTheMessage(t *testing.T) {
	for _, js := range []string{
		``, `[]`, `"x"`, `1`, `{`, `{"choiceCount":"two"}`, `{"choiceCount":-1}`, `{"choiceCount":2.5}`, `{"choiceCount":1e20}`,
		`{"load":"peakEwma"}`, `{"load":{"peakEwma":{"decay":"10"}}}`, `{"load":{"peakEwma":{"decay":10}}}`, `{"load":{"peakEwma":{"decay":"1h"}}}`,
		`{"load":{"peakEwma":{},"constant":{}}}`, `{"failureCodes":"UNAVAILABLE"}`, `{"failureCodes":[14]}`,
		`{"memory":1,"memory":2}`,
	} {
		c, err := parseConfig(json.RawMessage(js))
		if err == nil {
			t.Errorf("%s: got %+v, want an error", js, c.message)
		} else if !strings.HasPrefix(err.Error(), "belfry.p2c: ") {
			t.Errorf("%s: error is %q, want it to begin with the name of the policy", js, err)
		}
	}
}

func TestConfigIgnoresUnknownFields(t *testing.T) {
	c, err := parseConfig(json.RawMessage(`{"future":{"a":[1]},"choiceCount":4,"load":{"peakEwma":{"decay":"2s","shape":"round"}}}`))
	if err != nil {
		t.Fatal(err)
	}
	if c.choices != 4 || c.metric.(peakEWMA).Decay != 2*time.Second {
		t.Errorf("%d choices and decay %v, want 4 and 2s", c.choices, c.metric.(peakEWMA).Decay)
	}
}

// A metric that is not known is not silently another one.
func TestConfigOfAnUnknownMetricListsTheKnownOnes(t *testing.T) {
	for _, js := range []string{`{"load":{"clairvoyance":{}}}`, `{"load":{"clairvoyance":{},"peakEwma":null}}`, `{"load":{"peakewma":{"decay":"1s"}}}`} {
		_, err := parseConfig(json.RawMessage(js))
		if err == nil || !strings.Contains(err.Error(), "expectedLatency, peakEwma, pendingRequests, constant") {
			t.Errorf("%s: error is %v, want one that lists the metrics", js, err)
		}
	}
}

func TestConfigExplainsWhatDoesNotFit(t *testing.T) {
	for _, test := range []struct{ json, want string }{
		{`{"load":{"peakEwma":{"decay":10}}}`, `load.peakEwma.decay: 10, must be a duration in seconds, such as "1.5s"`},
		{`{"load":{"peakEwma":{"decay":"500ms"}}}`, `load.peakEwma.decay: "500ms", must be a duration in seconds, such as "1.5s"`},
		{`{"load":"peakEwma"}`, `load: "peakEwma", must be an object`},
		{`{"choiceCount":"two"}`, `choiceCount: "two", must be an integer of at least 0`},
		{`{"failureCodes":[14]}`, `failureCodes[0]: 14, must be a string`},
		{`{"load":{"peakEwma":{},"constant":{}}}`, `load.peakEwma: set beside constant, must be set alone`},
		{`{"load":{"custom":{"name":"x","config":1}}}`, `load.custom.config: 1, must be an object`},
		{`{"choiceCount":3,}`, `at byte 18`},
		{`[]`, `[], must be an object`},
	} {
		_, err := parseConfig(json.RawMessage(test.json))
		if err == nil || !strings.HasPrefix(err.Error(), "belfry.p2c: ") || !strings.HasSuffix(err.Error(), test.want) {
			t.Errorf("%s: error is %v, want %s", test.json, err, test.want)
		}
	}
}

func TestConfigLogsAnUnknownFieldOnce(t *testing.T) {
	for range 2 {
		for _, js := range []string{`{"logged1":1,"load":{"peakEwma":{"logged2":2}}}`, `{"load":{"peakEwma":{"logged2":3,"decay":"1s"},"logged3":{}}}`} {
			if _, err := parseConfig(json.RawMessage(js)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, path := range []string{" logged1 ", " load.peakEwma.logged2 ", " load.logged3 "} {
		if got := logs.with(path); len(got) != 1 {
			t.Errorf("field %s was logged as %q, want once", path, got)
		}
	}
}

// Through xDS numbers arrive as JSON doubles.
func TestConfigTakesIntegersWrittenAsFloats(t *testing.T) {
	for _, js := range []string{`{"choiceCount":4.0,"memory":3.0}`, `{"choiceCount":4e0,"memory":0.3e1}`, `{"choice_count":4,"memory":3}`, `{"choiceCount":"4","memory":"3"}`} {
		c, err := parseConfig(json.RawMessage(js))
		if err != nil {
			t.Errorf("%s: %v", js, err)
			continue
		}
		if c.choices != 4 || c.memory != 3 {
			t.Errorf("%s: %d choices and memory %d, want 4 and 3", js, c.choices, c.memory)
		}
	}
}

var configs = []string{
	`{}`,
	`{"memory":0}`,
	`{"choiceCount":2,"memory":0,"load":{"peakEwma":{"decay":"1.5s","defaultRtt":"0.000000001s"}}}`,
	`{"choiceCount":16,"memory":8,"failureCodes":["ABORTED"],"load":{"expectedLatency":{"queueExponent":0,"forgetAfter":"315576000000s"}}}`,
	`{"load":{"pendingRequests":{}}}`,
	`{"load":{"constant":{"load":0}}}`,
	`{"load":{"constant":{}},"unknown":1}`,
}

func TestConfigSurvivesMarshalAndParse(t *testing.T) {
	for _, js := range configs {
		c, err := parseConfig(json.RawMessage(js))
		if err != nil {
			t.Errorf("%s: %v", js, err)
			continue
		}
		checkRoundTrip(t, js, c)
	}
}

func checkRoundTrip(t *testing.T, js string, c *config) {
	t.Helper()
	out, err := json.Marshal(c)
	if err != nil {
		t.Errorf("%s: marshal: %v", js, err)
		return
	}
	again, err := parseConfig(out)
	if err != nil {
		t.Errorf("%s, marshalled as %s: parse: %v", js, out, err)
		return
	}
	if again.choices != c.choices || again.memory != c.memory || again.failures != c.failures ||
		!reflect.DeepEqual(again.metric, c.metric) || !proto.Equal(again.message, c.message) {
		t.Errorf("%s, marshalled as %s: got %+v, want %+v", js, out, again, c)
	}
}

// The default of memory is 2, so a 0 that is lost on the way would show.
func TestConfigMemoryZeroSurvivesRandomSubsetting(t *testing.T) {
	js := `{"subsetSize":3,"childPolicy":[{"belfry.p2c":{"memory":0,"choiceCount":2}}]}`
	subsetting := balancer.Get("random_subsetting_experimental")
	parsed, err := subsetting.(balancer.ConfigParser).ParseConfig(json.RawMessage(js))
	if err != nil {
		t.Fatal(err)
	}
	// What random_subsetting does with the parsed config of its child.
	child := reflect.ValueOf(parsed).Elem().FieldByName("ChildPolicy").Elem()
	marshalled, err := json.Marshal(child.FieldByName("Config").Interface())
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseConfig(marshalled)
	if err != nil {
		t.Fatal(err)
	}
	if c.memory != 0 || c.choices != 2 {
		t.Errorf("%d choices and memory %d after the round trip, want 2 and 0", c.choices, c.memory)
	}
}

func TestConfigOfAnotherTypeIsRefused(t *testing.T) {
	w := newWorld(t)
	err := w.b.UpdateClientConnState(balancer.ClientConnState{})
	if err == nil || !strings.Contains(err.Error(), "<nil>") {
		t.Errorf("error for a missing config is %v, want one that names its type, <nil>", err)
	}
}

func FuzzParseConfig(f *testing.F) {
	for _, js := range configs {
		f.Add([]byte(js))
	}
	f.Add([]byte(`{"choiceCount":1e0,"failureCodes":["DATA_LOSS","UNKNOWN"]}`))
	f.Add([]byte(`{"load":{"expectedLatency":{"priorSamples":1e-300,"keepSamples":"Infinity"}}}`))
	f.Fuzz(func(t *testing.T, js []byte) {
		c, err := parseConfig(js)
		if err != nil {
			if !strings.HasPrefix(err.Error(), Name+": ") {
				t.Errorf("error is %q, want it to begin with the name of the policy", err)
			}
			return
		}
		if c.choices < minChoices || c.choices > maxChoices || c.memory < 0 || c.memory > maxMemory {
			t.Errorf("%d choices and memory %d accepted", c.choices, c.memory)
		}
		m, err := c.metric.build()
		if err != nil {
			t.Fatalf("the metric of an accepted config: %v", err)
		}
		if l := m.NewMeter(load.Endpoint{}).Load(load.Query{Weight: 1}).Cost; !(l >= 0 && l <= math.MaxFloat64) {
			t.Errorf("load of a new endpoint is %v, want finite and at least 0", l)
		}
		checkRoundTrip(t, string(js), c)
	})
}

func init() {
	load.Register("test", func(config json.RawMessage) (load.Metric, error) {
		var c struct{ Load float64 }
		if err := json.Unmarshal(config, &c); err != nil {
			return nil, err
		}
		return load.NewConstant(c.Load)
	})
}

func TestConfigOfARegisteredMetric(t *testing.T) {
	c, err := parseConfig([]byte(`{"load":{"custom":{"name":"test","config":{"load":7,"x":[1]}}}}`))
	if err != nil {
		t.Fatal(err)
	}
	m := must(c.metric.build())
	if got := m.NewMeter(load.Endpoint{}).Load(load.Query{Weight: 1}).Cost; got != 7 {
		t.Errorf("load of an endpoint is %v, want 7 as configured", got)
	}
	same := must(parseConfig([]byte(`{"load":{"custom":{"config":{"x":[1],"load":7e0},"name":"test"}}}`)))
	if !same.metric.adopt(m) {
		t.Error("the metric was not kept under the same config")
	}
	for _, js := range []string{`{"load":{"custom":{"name":"test"}}}`, `{"load":{"constant":{"load":7}}}`} {
		if must(parseConfig([]byte(js))).metric.adopt(m) {
			t.Errorf("the metric was kept under %s", js)
		}
	}
	for js, want := range map[string]string{
		`{"load":{"custom":{"name":"tset"}}}`:                         `load.custom.name: tset, must be one of the registered metrics ["test"]`,
		`{"load":{"custom":{"name":"test","config":{"load":-1}}}}`:    "load.custom.load: -1, must be finite and at least 0",
		`{"load":{"custom":{"name":"test","config":{"load":"one"}}}}`: "load.custom: ",
	} {
		if _, err := parseConfig([]byte(js)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error for %s is %v, want it to contain %q", js, err, want)
		}
	}
}
