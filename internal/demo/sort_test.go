//go:build linux

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// onRow is an output that does something when the row of a step comes.
type onRow struct {
	bytes.Buffer
	row string
	do  func()
}

func (w *onRow) Write(b []byte) (int, error) {
	if w.do != nil && strings.HasPrefix(string(b), w.row) {
		w.do()
		w.do = nil
	}
	return w.Buffer.Write(b)
}

func sortContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestSort(t *testing.T) {
	for _, o := range []SortOptions{
		{Size: 8 << 20, Resident: 1 << 20},
		{Size: 1 << 20, Resident: 64 << 10, Record: 24, Key: 2, Workers: 1}, // several passes, many equal keys
		{Size: 4 << 20, Resident: 1 << 20, Record: 5000, Key: 5000, Workers: 5},
		{Size: 3 << 20, Resident: 512 << 10, Lines: true, Workers: 3},
		{Size: 1000, Resident: 1 << 20},
	} {
		t.Run(fmt.Sprintf("size=%d,resident=%d,record=%d,lines=%v,workers=%d", o.Size, o.Resident, o.Record, o.Lines, o.Workers), func(t *testing.T) {
			var out bytes.Buffer
			o.Out, o.Progress = &out, true
			r, err := Sort(sortContext(t), &o)
			if err != nil {
				t.Fatal(err, out.String())
			}
			if !r.OK || !r.Sorted || r.Plain == nil || !r.Plain.Equal || r.InputSum != r.OutputSum || r.Records == 0 {
				t.Errorf("result %+v", r)
			}
			if r.MaxResident == 0 || r.MaxResident > r.Budget || r.Budget != o.Resident || r.Samples == 0 {
				t.Errorf("resident at most %d of %d, %d samples", r.MaxResident, r.Budget, r.Samples)
			}
			if moved := r.Steps[1].Counts; o.Size > o.Resident && (moved.PagesOut == 0 || int64(moved.PagesIn) < r.Size/4096) {
				t.Errorf("runs were made with %+v", moved)
			}
		})
	}
}

// TestSortFile compares with a sort that shares nothing with ours.
func TestSortFile(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	var lines []string
	for range 60_000 {
		n := rng.IntN(40)
		if rng.IntN(5000) == 0 {
			n = 30_000
		}
		b := make([]byte, n)
		for i := range b {
			b[i] = "\x00ab\xff"[rng.IntN(4)]
		}
		lines = append(lines, string(b))
	}
	lines[len(lines)-1] = "the last one has no newline"
	name := filepath.Join(t.TempDir(), "lines")
	if err := os.WriteFile(name, []byte(strings.Join(lines, "\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	j := &job{o: SortOptions{File: name, Lines: true, Resident: 256 << 10, Workers: 3}, res: &SortResult{}}
	var got []byte
	j.o.Out = &onRow{row: "plain sort runs", do: func() { got = bytes.Clone(j.from.bytes) }} // the sort is over by then
	err := errors.Join(j.prepare(), j.start(t.Context()), j.play(sortContext(t)), j.close())
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(lines)
	if want := strings.Join(lines, "\n") + "\n"; string(got) != want {
		t.Errorf("%d bytes, want %d; they differ", len(got), len(want))
	}
	if j.res.Records != int64(len(lines)) {
		t.Errorf("%d records, want %d", j.res.Records, len(lines))
	}
}

// TestSortNotices: whatever goes wrong with the sorted memory is seen.
func TestSortNotices(t *testing.T) {
	for name, harm := range map[string]struct {
		do      func(b []byte)
		noPlain bool
		sorted  bool // still
		sums    bool // still
	}{
		"a bit of a payload":        {func(b []byte) { b[1_000_099] ^= 1 }, true, true, false},
		"two records":               {func(b []byte) { swap(b[300_000:300_100], b[1_000_000:1_000_100]) }, true, false, true},
		"records of the same place": {func(b []byte) { copy(b[100:200], b[:100]) }, true, true, false},
		"the payloads of two":       {func(b []byte) { swap(b[400_010:400_100], b[800_010:800_100]) }, false, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			j := &job{o: SortOptions{Size: 2 << 20, Resident: 512 << 10, NoPlain: harm.noPlain}, res: &SortResult{}}
			j.o.Out = &onRow{row: "merge", do: func() { harm.do(j.from.bytes) }}
			if err := errors.Join(j.prepare(), j.start(t.Context())); err != nil {
				t.Fatal(err)
			}
			if err := j.play(sortContext(t)); !errors.Is(err, ErrDiffers) {
				t.Errorf("harm was done, but the error is %v", err)
			}
			if err := j.close(); err != nil {
				t.Error(err)
			}
			r := j.res
			if r.OK || r.Sorted != harm.sorted || (r.InputSum == r.OutputSum) != harm.sums || r.Plain != nil && r.Plain.Equal {
				t.Errorf("result %+v", r)
			}
		})
	}
}

func swap(x, y []byte) {
	z := bytes.Clone(x)
	copy(x, y)
	copy(y, z)
}

// TestSortOverBudget: a budget that did not hold is an error.
func TestSortOverBudget(t *testing.T) {
	j := &job{o: SortOptions{Size: 1 << 20, Resident: 512 << 10, NoPlain: true}, res: &SortResult{}}
	j.o.Out = &onRow{row: "merge", do: func() {
		j.sampler.mu.Lock()
		j.sampler.most = 512<<10 + 4096
		j.sampler.mu.Unlock()
	}}
	err := errors.Join(j.prepare(), j.start(t.Context()), j.play(sortContext(t)), j.close())
	if !errors.Is(err, ErrOverBudget) || j.res.OK {
		t.Errorf("error %v, result %+v", err, j.res)
	}
}

// TestSortFileChanges: the file is read again for the sort in plain memory.
func TestSortFileChanges(t *testing.T) {
	name := filepath.Join(t.TempDir(), "records")
	b := bytes.Repeat([]byte("0123456789"), 10_000)
	for _, changed := range [][]byte{append([]byte("1"), b[1:]...), b[100:], append(b, b...)} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		out := &onRow{row: "merge", do: func() {
			if err := os.WriteFile(name, changed, 0o600); err != nil {
				t.Error(err)
			}
		}}
		if _, err := Sort(sortContext(t), &SortOptions{File: name, Resident: 1 << 20, Out: out}); !errors.Is(err, ErrDiffers) {
			t.Errorf("the file has %d bytes now, but the error is %v", len(changed), err)
		}
	}
}

func TestSortRefuses(t *testing.T) {
	dir := t.TempDir()
	odd, empty := filepath.Join(dir, "odd"), filepath.Join(dir, "empty")
	if err := errors.Join(os.WriteFile(odd, make([]byte, 101), 0o600), os.WriteFile(empty, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, o := range []SortOptions{{File: odd}, {File: empty}, {File: dir}, {File: odd + "none"}, {Record: 10, Key: 11}, {Record: -1}, {Key: -1}, {Size: -1}, {Workers: -1},
		{Size: 100, Resident: 4096}} {
		if _, err := Sort(sortContext(t), &o); err == nil {
			t.Errorf("%+v: no error", o)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	out := &onRow{row: "generate", do: cancel}
	if _, err := Sort(ctx, &SortOptions{Size: 4 << 20, Resident: 1 << 20, Out: out}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestLosers(t *testing.T) {
	for n := range 20 {
		rng := rand.New(rand.NewPCG(7, uint64(n)))
		seqs := make([][]int, n)
		var want, got []int
		for i := range seqs {
			for range rng.IntN(20) {
				seqs[i] = append(seqs[i], rng.IntN(50))
			}
			slices.Sort(seqs[i])
			want = append(want, seqs[i]...)
		}
		slices.Sort(want)
		tree := newLosers(n, func(x, y int) bool { return len(seqs[x]) > 0 && (len(seqs[y]) == 0 || seqs[x][0] < seqs[y][0]) })
		for n > 0 && len(seqs[tree.winner]) > 0 {
			got = append(got, seqs[tree.winner][0])
			seqs[tree.winner] = seqs[tree.winner][1:]
			tree.replay()
		}
		if !slices.Equal(got, want) {
			t.Errorf("%d sequences: %v, want %v", n, got, want)
		}
	}
}

func TestLowerBound(t *testing.T) {
	words := []string{"", "a", "a", "ab", "b", "ba", "ba", "ba", "c"}
	text := []byte("x\n" + strings.Join(words, "\n") + "\n" + "y\n")
	fixed := []byte("--001122223344--")
	for _, c := range []struct {
		f    format
		b    []byte
		a, e int64
		key  string
		want int64
	}{
		{format{lines: true}, text, 2, int64(len(text)) - 2, "", 2},
		{format{lines: true}, text, 2, int64(len(text)) - 2, "a", 3},
		{format{lines: true}, text, 2, int64(len(text)) - 2, "ba", 12},
		{format{lines: true}, text, 2, int64(len(text)) - 2, "bb", 21},
		{format{lines: true}, text, 2, int64(len(text)) - 2, "d", int64(len(text)) - 2},
		{format{lines: true}, text, 2, 2, "d", 2},
		{format{record: 2, key: 1}, fixed, 2, 14, "0", 2},
		{format{record: 2, key: 1}, fixed, 2, 14, "2", 6},
		{format{record: 2, key: 1}, fixed, 2, 14, "3", 10},
		{format{record: 2, key: 1}, fixed, 2, 14, "5", 14},
	} {
		if got := (&job{format: c.f}).lowerBound(c.b, c.a, c.e, []byte(c.key)); got != c.want {
			t.Errorf("%q in %q: %d, want %d", c.key, c.b[c.a:c.e], got, c.want)
		}
	}
}

// TestLoader: however the bytes arrive, and in whatever order the records are, the multiset is the same; and another one if anything else changes.
func TestLoader(t *testing.T) {
	for _, f := range []format{{lines: true}, {record: 7, key: 1}} {
		g := generator{f, 3}
		b := make([]byte, 7*1000)
		want := g.part(0, b)
		again := make([]byte, len(b))
		if g.part(0, again) != want || !bytes.Equal(b, again) {
			t.Errorf("%+v: generated twice, and not the same", f)
		}
		for i, src := range []io.Reader{bytes.NewReader(b), iotest.OneByteReader(bytes.NewReader(b)), iotest.HalfReader(bytes.NewReader(b))} {
			l, dst := loader{format: f}, make([]byte, len(b))
			if err := l.copy(dst, src, func(int) error { return nil }); err != nil || l.m != want || !bytes.Equal(dst, b) {
				t.Errorf("%+v: reader %d: %v, %+v, want %+v", f, i, err, l.m, want)
			}
		}
		var fed loader
		fed.format = f
		for rest := b; len(rest) > 0; {
			n := min(len(rest), 1+rand.IntN(30))
			fed.feed(rest[:n])
			rest = rest[n:]
		}
		if fed.m != want {
			t.Errorf("%+v: in pieces: %+v, want %+v", f, fed.m, want)
		}
		var back multiset
		for _, r := range slices.Backward(split(f, b)) {
			back.add(r)
		}
		if back != want {
			t.Errorf("%+v: backwards: %+v, want %+v", f, back, want)
		}
		for range 100 {
			c := bytes.Clone(b)
			c[rand.IntN(len(c)-1)] ^= 0x80
			var m multiset
			for _, r := range split(f, c) {
				m.add(r)
			}
			if m == want {
				t.Errorf("%+v: a bit has changed, and the checksum is the same", f)
			}
		}
	}
}

func split(f format, b []byte) (records [][]byte) {
	for at := int64(0); at < int64(len(b)); {
		end := f.end(b, at)
		records = append(records, b[at:end])
		at = end
	}
	return records
}
