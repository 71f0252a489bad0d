//go:build linux

package bench

import (
	"cmp"
	"slices"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// Spread is a figure measured in several rounds.
type Spread struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
}

// spread is that of v, which is not empty.
func spread(v []float64) Spread {
	s := slices.Clone(v)
	slices.Sort(s)
	return Spread{Median: quantile(s, 0.5), Min: s[0], Max: s[len(s)-1]}
}

// quantile of sorted values, which are not empty: the smallest one that at least the fraction q of them does not exceed.
func quantile[T cmp.Ordered](sorted []T, q float64) T {
	i := int(q*float64(len(sorted))+0.9999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// Distribution is that of all samples of all rounds, in ns.
type Distribution struct {
	Count int64 `json:"count"`
	P50   int64 `json:"p50_ns"`
	P90   int64 `json:"p90_ns"`
	P99   int64 `json:"p99_ns"`
	P999  int64 `json:"p99_9_ns"`
	Max   int64 `json:"max_ns"`
}

// longest is the longest time that a histogram can hold, in ns.
const longest = 60e9

func newHistogram() *hdrhistogram.Histogram { return hdrhistogram.New(1, longest, 3) }

func distribution(h *hdrhistogram.Histogram) Distribution {
	return Distribution{
		Count: h.TotalCount(),
		P50:   h.ValueAtPercentile(50),
		P90:   h.ValueAtPercentile(90),
		P99:   h.ValueAtPercentile(99),
		P999:  h.ValueAtPercentile(99.9),
		Max:   h.Max(),
	}
}

// ratios are a[i]/b[i].
func ratios(a, b []float64) []float64 {
	r := make([]float64, min(len(a), len(b)))
	for i := range r {
		r[i] = a[i] / b[i]
	}
	return r
}
