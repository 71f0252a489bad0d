package vm

import "testing"

func TestShare(t *testing.T) {
	for _, c := range []struct {
		have   []int64
		frames int64
		want   int64
	}{
		{nil, 100, 0},
		{[]int64{200}, 100, 100},         // alone: it has more than its share, and nobody is spared
		{[]int64{10, 190}, 100, 90},      // a small one is
		{[]int64{190, 10}, 100, 90},      // in whatever order
		{[]int64{100, 100}, 100, 50},     // two that want more: neither is
		{[]int64{10, 20, 170}, 100, 70},  // two of three
		{[]int64{1, 1, 1, 197}, 100, 97}, // many that do nothing take little from the share of others
		{[]int64{10, 60, 130}, 100, 45},
		{[]int64{3, 3}, 100, 3}, // all have what they want
	} {
		if got := share(c.have, c.frames); got != c.want {
			t.Errorf("%v of %d: %d, want %d", c.have, c.frames, got, c.want)
		}
	}
}
