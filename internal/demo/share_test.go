//go:build linux

package demo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"machpager/region"
	"machpager/region/spawn"
)

func TestMain(m *testing.M) {
	spawn.Main()
	Main()
	os.Exit(m.Run())
}

// onHeading is an output that does something when the first line comes: the file has been hashed by then, and nothing was copied.
type onHeading struct {
	bytes.Buffer
	do func()
}

func (w *onHeading) Write(b []byte) (int, error) {
	if w.do != nil {
		w.do()
		w.do = nil
	}
	return w.Buffer.Write(b)
}

func TestShareDiffers(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, make([]byte, 100_000), 0o600); err != nil {
		t.Fatal(err)
	}
	out := &onHeading{do: func() {
		b := make([]byte, 100_000)
		b[99_999] = 1
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Error(err)
		}
	}}
	r, err := Share(ctx, &ShareOptions{File: file, Out: out})
	if !errors.Is(err, ErrDiffers) {
		t.Fatalf("one byte differs, but Share says %v", err)
	}
	if r == nil || r.Equal || r.Shared == r.FileHash || r.Shared != r.PagedIn {
		t.Errorf("result %+v", r)
	}
	if n := strings.Count(out.String(), "DIFFERENT"); n != 2 {
		t.Errorf("DIFFERENT stands %d times in\n%s", n, out.String())
	}
}

// TestShareSteps: what the pager counts is what the steps do.
func TestShareSteps(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	const pages = 300
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, bytes.Repeat([]byte("contents"), (pages*4096-10)/8), 0o600); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	r, err := Share(ctx, &ShareOptions{File: file, Out: &out, Progress: true})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Equal || len(r.Steps) != 6 {
		t.Fatalf("result %+v", r)
	}
	for i, c := range []struct {
		what    string
		in, out uint64
		faults  func(c Counts) bool
		mapped  rune
	}{
		{"copies", pages, 0, func(c Counts) bool { return c.ZeroFilled > 0 && c.Stored == 0 }, glyphDirty},
		{"hashes", 0, 0, func(c Counts) bool { return c.Minor > 0 && c.Minor == c.Faults() }, glyphDirty},
		{"pages out", 0, pages, func(c Counts) bool { return c.Faults() == 0 }, glyphAbsent},
		{"reads", pages, 0, func(c Counts) bool { return c.Stored > 0 && 0 < c.WriteProtect && c.WriteProtect <= pages }, glyphDirty},
		{"pages out", 0, pages, func(c Counts) bool { return c.Faults() == 0 }, glyphAbsent},
		{"hashes again", pages, 0, func(c Counts) bool { return c.Stored > 0 && c.Stored == c.Faults() }, glyphClean},
	} {
		st := r.Steps[i]
		if !strings.HasPrefix(st.What, c.what) || st.Counts.PagesIn != c.in || st.Counts.PagesOut != c.out || !c.faults(st.Counts) {
			t.Errorf("step %d: %+v, want %d pages in, %d out", i, st, c.in, c.out)
		}
		if strings.Trim(st.Map, string(c.mapped)) != "" {
			t.Errorf("step %d: map %s, want %c alone", i, st.Map, c.mapped)
		}
		if n := st.Counts.Faults(); n > 0 && (st.Touch.Faults == 0 || st.Touch.P50 <= 0 || st.Touch.P99 < st.Touch.P50) {
			t.Errorf("step %d: touches %+v of %d faults", i, st.Touch, n)
		}
	}
}

func TestDrawMap(t *testing.T) {
	p := func(s ...region.PageState) (pages []region.Page) {
		for _, s := range s {
			pages = append(pages, region.Page(s))
		}
		return pages
	}
	for _, c := range []struct {
		pages []region.Page
		width int
		want  string
	}{
		{nil, 4, ""},
		{p(region.PageAbsent, region.PageClean, region.PageDirty, region.PageError), 4, "·░█!"},
		{p(region.PageRequested, region.PageCleaning, region.PageEvicting), 4, "+++"},
		{p(region.PageAbsent, region.PageClean, region.PageAbsent, region.PageAbsent, region.PageDirty), 3, "░·█"},
		{make([]region.Page, 1000), 64, strings.Repeat("·", 63)},
	} {
		if got := drawMap(c.pages, c.width); got != c.want {
			t.Errorf("%v in %d: %q, want %q", c.pages, c.width, got, c.want)
		}
	}
}
