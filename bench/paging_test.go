//go:build linux

package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestPaging runs every work of every system with a pager once.
func TestPaging(t *testing.T) {
	o := &PagingOptions{Systems: []string{PagedMemory, PagedCompressed, PagedTiered, PagedFile, PagedFileGroup}, Budget: 2 << 20, Times: []int{1, 3}, Rounds: 1}
	testPaging(t, o)
}

// TestMapped runs what a mapped file can do in the time of a test: in a group that is very small the kernel reads around each fault what it drops at once.
func TestMapped(t *testing.T) {
	testPaging(t, &PagingOptions{Systems: []string{MappedFile}, Works: []Work{SeqRead, RandRead, RandWrite, Search}, Budget: 8 << 20, Times: []int{2}, Rounds: 1})
}

func testPaging(t *testing.T, o *PagingOptions) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	o.Dir = t.TempDir()
	measured, err := Paging(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("took %.1f s; not measured: %v", measured.Seconds, measured.None)
	var b bytes.Buffer
	if err := measured.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var r PagingReport
	if err := json.Unmarshal(b.Bytes(), &r); err != nil {
		t.Fatal(err)
	}
	for _, s := range o.Systems {
		if why, none := r.None[s]; none {
			if s != PagedFileGroup && s != MappedFile || why == "" {
				t.Errorf("%s: not measured: %q", s, why)
			}
			continue
		}
		for _, w := range r.Options.Works {
			times := []int{w.times()}
			if w.swept() {
				times = r.Options.Times
			}
			for _, n := range times {
				testPagingRun(t, r.find(s, w, n), s, w, n)
			}
		}
	}
	for _, g := range r.Goals {
		if g.Value.Median < 0 || g.Limit <= 0 || g.Value.Min > g.Value.Median || g.Value.Median > g.Value.Max {
			t.Errorf("goal %+v", g)
		}
	}
	b.Reset()
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, w := range r.Options.Works {
		if !strings.Contains(b.String(), string(w)) {
			t.Errorf("no %s in the table:\n%s", w, b.String())
		}
	}
	b.Reset()
	if err := r.WriteSVG(&b); err != nil {
		t.Fatal(err)
	}
	for d := xml.NewDecoder(&b); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("SVG: %v", err)
		}
	}
}

func testPagingRun(t *testing.T, x *PagingRun, s string, w Work, n int) {
	switch {
	case x == nil:
		t.Errorf("no row for %s, %s, %d", s, w, n)
	case x.Rate.Median <= 0 || x.Bytes <= 0:
		t.Errorf("%s, %s, %d: %+v", s, w, n, x)
	case n > 1 && (x.Faults == 0 || x.In <= 0):
		t.Errorf("%s, %s, %d: nothing came from the store: %+v", s, w, n, x)
	case s != MappedFile && n > 1 && x.Evicted <= 0:
		t.Errorf("%s, %s, %d: nothing was evicted: %+v", s, w, n, x)
	}
}

// TestContents: a single wrong byte is noticed, wherever it is.
func TestContents(t *testing.T) {
	const pages = 3
	m, err := mapMemory(-1, extent)
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	mem := m.mem[:pages*pageSize]
	c := newContents(pages)
	for p := range pages {
		c.write(mem, p)
	}
	if err := c.update(mem, 1); err != nil {
		t.Fatal(err)
	}
	if err := c.compare(mem); err != nil {
		t.Fatal(err)
	}
	for i := range mem {
		mem[i] ^= 0x10
		if err := c.check(mem, i/pageSize); !errors.As(err, new(wrongError)) {
			t.Fatalf("byte %d: %v", i, err)
		}
		mem[i] ^= 0x10
	}
	mem[5000]++
	if err := c.compare(mem); !errors.As(err, new(wrongError)) || !strings.Contains(err.Error(), "byte 904") {
		t.Errorf("compare: %v", err)
	}
}

// TestGraph compares the search with one that keeps a queue.
func TestGraph(t *testing.T) {
	s, err := makeGraph(filepath.Join(t.TempDir(), "graph"), 1<<18)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.ReadFile(s.Name)
	if err != nil {
		t.Fatal(err)
	}
	g := s.in(mem)
	level := make([]uint64, s.Vertices)
	level[s.Root] = 1
	reached, sum := 1, uint64(0)
	for queue := []int{s.Root}; len(queue) > 0; queue = queue[1:] {
		for _, u := range g.edges[g.offsets[queue[0]]:g.offsets[queue[0]+1]] {
			if level[u] == 0 {
				level[u] = level[queue[0]] + 1
				sum += (level[u] - 1) * (uint64(u)*stampStep | 1)
				reached++
				queue = append(queue, int(u))
			}
		}
	}
	if sum != s.Sum {
		t.Errorf("sum %#x, want %#x", s.Sum, sum)
	}
	if reached < s.Vertices/4 {
		t.Errorf("only %d of %d vertices can be reached", reached, s.Vertices)
	}
}

// TestGroupParent reads made-up control groups.
func TestGroupParent(t *testing.T) {
	for _, c := range []struct {
		self, handed, want string
		unified, fails     bool
	}{
		{self: "4:memory:/a\n0::/\n", want: "memory/a"},
		{self: "4:cpu,memory:/\n", want: "memory"},
		{self: "0::/a/b\n", handed: "cpu memory", want: "a", unified: true},
		{self: "0::/a/b\n", handed: "cpu", unified: true, fails: true},
		{self: "4:cpu:/\n", fails: true},
	} {
		root := t.TempDir()
		self := filepath.Join(root, "self")
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "a"), 0o700), os.WriteFile(self, []byte(c.self), 0o600),
			os.WriteFile(filepath.Join(root, "a", "cgroup.subtree_control"), []byte(c.handed), 0o600)); err != nil {
			t.Fatal(err)
		}
		dir, unified, err := groupParent(self, root)
		if c.fails != (err != nil) || unified != c.unified || err == nil && dir != filepath.Join(root, c.want) {
			t.Errorf("%q: %q, %v, %v", c.self, dir, unified, err)
		}
	}
}
