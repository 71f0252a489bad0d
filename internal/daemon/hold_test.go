package daemon

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
)

// held makes a daemon that can do no more than have things held, by a guardian that says yes to all.
func held(t *testing.T) *Daemon {
	t.Helper()
	conn, theirs, err := ipc.Pair()
	if err != nil {
		t.Fatal(err)
	}
	end := ipc.NewLink(conn, &ipc.LinkOptions{Handler: func(context.Context, *ipc.Message) (ipc.Reply, error) { return ipc.Reply{}, nil }})
	d := &Daemon{log: slog.New(slog.DiscardHandler)}
	d.guardian, err = guardian.NewClient(theirs, func() {}, acceptsState, d.log)
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.guardian.Close(); end.Close() })
	return d
}

// TestWireRuns holds the runs against one count for each page, and against what is read back of them.
func TestWireRuns(t *testing.T) {
	const pages = 24
	var runs []wireRun
	var counts [pages]int64
	for range 3000 {
		a := rand.Int64N(pages)
		n, by := 1+rand.Int64N(pages-a), 1-2*rand.Int64N(2)
		old := slices.Clone(runs)
		next := addWires(runs, a<<12, n<<12, by)
		if !slices.Equal(runs, old) {
			t.Fatal("the runs before were changed")
		}
		runs = next
		for p := a; p < a+n; p++ {
			counts[p] += by
		}
		var got [pages]int64
		for i, r := range runs {
			if i > 0 {
				if p := runs[i-1]; p.off+p.size > r.off || p.off+p.size == r.off && p.count == r.count {
					t.Fatalf("runs %v", runs)
				}
			}
			for p := r.off; p < r.off+r.size; p += 1 << 12 {
				got[p>>12] += r.count
			}
		}
		if got != counts {
			t.Fatalf("%v are %v, want %v", runs, got, counts)
		}
		seqs := []uint32{rand.Uint32(), 0, 1<<32 - 1}[:rand.IntN(4)]
		back, s, err := decodeWires(encodeWires(runs, seqs))
		if err != nil || !slices.Equal(back, runs) || !slices.Equal(s, seqs) {
			t.Fatalf("%v, %v is read back as %v, %v, %v", runs, seqs, back, s, err)
		}
	}
}

func FuzzWires(f *testing.F) {
	f.Add(encodeWires([]wireRun{{0, 4096, 1}, {8192, 4096, -3}}, []uint32{7}))
	f.Fuzz(func(t *testing.T, b []byte) {
		runs, _, err := decodeWires(b)
		end := int64(0)
		for _, r := range runs {
			if err == nil && (r.off < end || r.size <= 0 || r.count == 0 || r.off+r.size > vm.MaxObjectSize) {
				t.Fatalf("%x is read as %v", b, runs)
			}
			end = r.off + r.size
		}
	})
}

// TestNumbers: none comes twice, and the guardian knows a bound before any is used.
func TestNumbers(t *testing.T) {
	d := held(t)
	last := uint64(0)
	for range 3 * numberStep {
		n, err := d.number()
		if err != nil || n <= last || n > d.numbers.limit {
			t.Fatalf("%d after %d, %v", n, last, err)
		}
		last = n
	}
}
