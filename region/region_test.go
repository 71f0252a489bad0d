//go:build linux

package region

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/internal/vm/page"
	"machpager/pager/emm"
)

// A program that imports region links golang.org/x/sys and the standard library, and of machpager only what is below it.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", "machpager/region").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	want := map[string]bool{"golang.org/x/sys/unix": true, "machpager/internal/ipc": true, "machpager/pager/emm": true, "machpager/uffd": true,
		"machpager/region": true}
	for _, dep := range strings.Fields(string(out)) {
		if !want[dep] {
			t.Errorf("region brings %s", dep)
		}
		delete(want, dep)
	}
	if len(want) != 0 {
		t.Errorf("not among the dependencies: %v", want)
	}
}

func TestPageStates(t *testing.T) {
	for s := page.State(0); s < page.NumStates; s++ {
		if got := PageState(s).String(); got != strings.ToLower(s.String()) {
			t.Errorf("state %d is %q here, %q in vm/page", s, got, s)
		}
	}
	p := Page(byte(page.Dirty) | ipc.PageStored | ipc.PageWired)
	if p.State() != PageDirty || !p.Resident() || !p.Stored() || !p.Wired() || p.Precious() {
		t.Errorf("%#x", byte(p))
	}
	if Page(page.Error).Resident() || PageState(7).String() != "invalid" {
		t.Error("an error is resident")
	}
}

func TestTouchReadWrite(t *testing.T) {
	p, _ := startFake(t, nil)
	const size = 5*4096 + 1
	r := mapObject(t, p, size, nil, nil)
	if len(r.Bytes()) != size || cap(r.Bytes()) != size || r.Size() != size || r.PageSize() != 4096 {
		t.Fatalf("%d bytes", len(r.Bytes()))
	}
	got := make([]byte, size)
	if n, err := r.ReadAt(got, 0); n != size || err != nil {
		t.Fatal(n, err)
	}
	same(t, "read", got, pattern(0, size))
	same(t, "touch", r.Bytes(), pattern(0, size))
	data := []byte("over the edge of two pages")
	if n, err := r.WriteAt(data, 4090); n != len(data) || err != nil {
		t.Fatal(n, err)
	}
	same(t, "touch what was written", r.Bytes()[4090:4090+len(data)], data)
	if err := r.PageOut(deadline(t), 0, size); err != nil {
		t.Fatal(err)
	}
	same(t, "touch what was paged out", r.Bytes()[4090:4090+len(data)], data)
	s := r.Stats()
	if s.ZeroFilled != 1 || s.Stored != 2 || s.Minor != 3 || s.WriteProtect != 4 || s.Errors != 5 || s.PagesIn != 6 || s.PagesOut != 7 || s.Resident != 8 ||
		s.Dirty != 9 || s.Latency != (Latency{10, 11, 12, 13}) {
		t.Fatalf("%+v", s)
	}
}

func TestReadAtWriteAtContracts(t *testing.T) {
	p, _ := startFake(t, nil)
	const size = 10000
	r := mapObject(t, p, size, nil, nil)
	b := make([]byte, 100)
	for _, c := range []struct {
		off         int64
		len, n      int
		read, write error
	}{
		{0, 100, 100, nil, nil},
		{size - 100, 100, 100, nil, nil},
		{size - 99, 100, 99, io.EOF, io.ErrShortWrite},
		{size - 1, 1, 1, nil, nil},
		{size, 1, 0, io.EOF, io.ErrShortWrite},
		{size, 0, 0, io.EOF, nil},
		{1 << 62, 100, 0, io.EOF, io.ErrShortWrite},
		{5, 0, 0, nil, nil},
		{-1, 10, 0, emm.InvalidArgument, emm.InvalidArgument},
	} {
		if n, err := r.ReadAt(b[:c.len], c.off); n != c.n || !errors.Is(err, c.read) {
			t.Errorf("read %d at %d: %d, %v", c.len, c.off, n, err)
		}
		if n, err := r.WriteAt(b[:c.len], c.off); n != c.n || !errors.Is(err, c.write) {
			t.Errorf("write %d at %d: %d, %v", c.len, c.off, n, err)
		}
	}
	all, err := io.ReadAll(io.NewSectionReader(r, 0, 1<<40))
	if err != nil || len(all) != size {
		t.Fatal(len(all), err)
	}
}

// Ranges that begin inside a page, and sizes that share their last page with nothing.
func TestMapRanges(t *testing.T) {
	p, _ := startFake(t, nil)
	const size = 6 << 20
	o, err := p.ObjectCreate(deadline(t), size, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []MapOptions{{}, {Offset: 4096}, {Offset: 4095, Size: 2}, {Offset: 1 << 20, Size: 3 << 20}, {Offset: size - 1}, {Size: 1},
		{Offset: 5 << 20, ReadOnly: true},
		{Offset: 12345, Size: 4 << 20, ReadOnly: true}} {
		r, err := o.Map(deadline(t), &m)
		if err != nil {
			t.Fatalf("%+v: %v", m, err)
		}
		want := m.Size
		if want == 0 {
			want = size - m.Offset
		}
		if int64(len(r.Bytes())) != want {
			t.Fatalf("%+v: %d bytes", m, len(r.Bytes()))
		}
		if len(r.mem) >= hugeSize && (int64(r.address())+r.delta-m.Offset)%hugeSize != 0 {
			t.Errorf("%+v: at %#x", m, r.address())
		}
		for _, at := range []int64{0, want / 2, want - 1} {
			if got, want := r.Bytes()[at], pattern(m.Offset+at, 1)[0]; got != want {
				t.Errorf("%+v: byte %d is %d, want %d", m, at, got, want)
			}
		}
		flags := vmFlags(t, r.address())
		for _, f := range []string{"dc", "um", "ui"} { // MADV_DONTFORK, MISSING, MINOR
			if !strings.Contains(flags, " "+f) {
				t.Errorf("%+v: VmFlags %q lack %s", m, flags, f)
			}
		}
		if strings.Contains(flags, " uw") == m.ReadOnly || strings.Contains(flags, " wr") == m.ReadOnly {
			t.Errorf("%+v: VmFlags %q", m, flags)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, m := range []MapOptions{{Offset: -1}, {Size: -1}, {Offset: size}, {Size: size + 1}, {Offset: 1, Size: size}, {Offset: 1 << 62, Size: 1 << 62}} {
		if _, err := o.Map(deadline(t), &m); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("%+v: %v", m, err)
		}
	}
}

// vmFlags are the flags of the mapping at address, from smaps.
func vmFlags(t *testing.T, address uint64) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut("\n"+string(b), fmt.Sprintf("\n%x-", address))
	if !ok {
		t.Fatalf("no mapping at %#x", address)
	}
	_, rest, _ = strings.Cut(rest, "VmFlags:")
	line, _, _ := strings.Cut(rest, "\n")
	return line
}

func TestBadArguments(t *testing.T) {
	p, _ := startFake(t, nil)
	ctx := deadline(t)
	for _, c := range []struct {
		size int64
		o    ObjectOptions
	}{{0, ObjectOptions{}}, {-1, ObjectOptions{}}, {1, ObjectOptions{PageSize: 100}}, {1, ObjectOptions{PageSize: 4 << 20}}, {1, ObjectOptions{PageSize: -4096}},
		{1, ObjectOptions{ClusterSize: 3}}, {1, ObjectOptions{ClusterSize: -1}},
		{1, ObjectOptions{Arg: strings.Repeat("x", 70000)}}} {
		if _, err := p.ObjectCreate(ctx, c.size, &c.o); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("%d %+v: %v", c.size, c.o, err)
		}
	}
	_, err := p.ObjectCreate(ctx, 1, &ObjectOptions{Manager: "full"})
	if !errors.Is(err, emm.ResourceShortage) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "free some") || strings.Contains(err.Error(), "call ") {
		t.Errorf("%v", err)
	}
	if _, err := p.ObjectOpen(ctx, emm.NewPort()); !errors.Is(err, emm.InvalidArgument) {
		t.Error(err)
	}
	closed, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if _, err := p.ObjectCreate(ctx, 1, &ObjectOptions{File: closed}); err == nil || !strings.Contains(err.Error(), "closed") {
		t.Error(err)
	}
	r := mapObject(t, p, 8192, nil, nil)
	for _, c := range [][2]int64{{-1, 1}, {0, -1}, {0, 8193}, {8193, 0}, {8192, 1}, {1 << 62, 1 << 62}} {
		if err := r.Populate(ctx, c[0], c[1], false); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("populate %v: %v", c, err)
		}
		if err := r.PageOut(ctx, c[0], c[1]); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("page out %v: %v", c, err)
		}
	}
	if err := errors.Join(r.Populate(ctx, 8192, 0, true), r.PageOut(ctx, 0, 0), r.Populate(ctx, 4095, 2, true)); err != nil {
		t.Error(err)
	}
}

func TestSharing(t *testing.T) {
	p, _ := startFake(t, nil)
	o, err := p.ObjectCreate(deadline(t), 1<<20, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := p.ObjectOpen(deadline(t), o.Port())
	if err != nil || again.Size() != o.Size() || again.PageSize() != 4096 || again.Port() != o.Port() {
		t.Fatal(again, err)
	}
	a, err := o.Map(deadline(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := again.Map(deadline(t), &MapOptions{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	a.Bytes()[70000] = 99
	if got := b.Bytes()[70000]; got != 99 {
		t.Fatalf("the other mapping reads %d", got)
	}
	a.Bytes()[70000] = 98
	if got := b.Bytes()[70000]; got != 98 {
		t.Fatalf("the other mapping reads %d", got)
	}
	if _, err := b.WriteAt([]byte{1}, 0); !errors.Is(err, emm.ProtectionFailure) {
		t.Error(err)
	}
	if err := b.Populate(deadline(t), 0, 1, true); !errors.Is(err, emm.ProtectionFailure) {
		t.Error(err)
	}
	if err := errors.Join(o.Close(), o.Close(), again.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Map(deadline(t), nil); !errors.Is(err, ErrClosed) || !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if _, err := o.Pages(deadline(t)); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	if a.Bytes()[70000] != 98 {
		t.Error("a mapping ended with its object's handle")
	}
}

func TestLists(t *testing.T) {
	p, cmd := startFake(t, nil)
	o, err := p.ObjectCreate(deadline(t), 300<<20+1, nil)
	if err != nil {
		t.Fatal(err)
	}
	pages, err := o.Pages(deadline(t))
	if err != nil || len(pages) != 300<<8+1 || pages[len(pages)-1].State() != PageDirty {
		t.Fatal(len(pages), err)
	}
	list, err := p.Objects(deadline(t))
	if err != nil || len(list) != 6 || list[5].ID != 6 || list[0].Size != 5 || list[1].Mappings != 3 {
		t.Fatalf("%+v, %v", list, err)
	}
	info, err := p.Info(deadline(t))
	if err != nil || info.Objects != 1 || info.Tier != "A" || info.KernelResident != -1 || info.PagerPID != cmd.Process.Pid || info.Frames != "memfd" ||
		info.Kernel != "6.18" || info.Version != "v0" || info.TierText == "" {
		t.Fatalf("%+v, %v", info, err)
	}
}

func TestAllocate(t *testing.T) {
	p, _ := startFake(t, nil)
	r, err := p.Allocate(deadline(t), 8192, &AllocateOptions{MapOptions: MapOptions{Size: 5000}})
	if err != nil || len(r.Bytes()) != 5000 {
		t.Fatal(err)
	}
	if info, err := p.Info(deadline(t)); err != nil || info.Objects != 0 || info.Mappings != 1 {
		t.Fatalf("%+v, %v", info, err)
	}
	if r.Bytes()[4999] != 2 {
		t.Error("wrong byte")
	}
	if _, err := p.Allocate(deadline(t), 8192, &AllocateOptions{MapOptions: MapOptions{Size: 9000}}); !errors.Is(err, emm.InvalidArgument) {
		t.Error(err)
	}
	if info, err := p.Info(deadline(t)); err != nil || info.Objects != 0 || info.Mappings != 1 {
		t.Fatalf("%+v, %v", info, err)
	}
}

// A write from memory that is slow to come must not be lost when its target is evicted meanwhile: the kernel pins one side of the copy.
func TestWriteAtWhileTargetIsEvicted(t *testing.T) {
	p, _ := startFake(t, nil)
	src := mapObject(t, p, 2*4096, &ObjectOptions{Arg: "s1"}, nil)
	dst := mapObject(t, p, 2*4096, nil, nil)
	if err := dst.Populate(deadline(t), 0, 8192, true); err != nil {
		t.Fatal(err)
	}
	for i := range dst.Bytes() {
		dst.Bytes()[i] = 77
	}
	done := make(chan error, 1)
	go func() {
		n, err := dst.WriteAt(src.Bytes(), 0)
		if n != 8192 && err == nil {
			err = fmt.Errorf("%d bytes", n)
		}
		done <- err
	}()
	time.Sleep(50 * time.Millisecond)
	if err := dst.PageOut(deadline(t), 0, 8192); err != nil {
		t.Fatal(err)
	}
	if err := src.Populate(deadline(t), 4096, 4096, false); err != nil { // releases the page
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 8192)
	if _, err := dst.ReadAt(got, 0); err != nil {
		t.Fatal(err)
	}
	same(t, "after the write", got, pattern(0, 8192))
	// The same region on both sides, and a read into region memory.
	if _, err := dst.WriteAt(dst.Bytes()[4096:], 0); err != nil {
		t.Fatal(err)
	}
	if _, err := src.ReadAt(dst.Bytes()[4096:], 0); err != nil {
		t.Fatal(err)
	}
	if dst.Bytes()[0] != 2 || dst.Bytes()[8191] != 1 {
		t.Error("wrong bytes", dst.Bytes()[0], dst.Bytes()[8191])
	}
}

// Readers and writers of their own slots, page-outs, mappings that come and go: no slot ever reads as anything but what was written last.
func TestStorm(t *testing.T) {
	p, _ := startFake(t, nil)
	o, err := p.ObjectCreate(deadline(t), 64*4096, &ObjectOptions{Arg: "w"})
	if err != nil {
		t.Fatal(err)
	}
	main, err := o.Map(deadline(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	stop := time.Now().Add(1500 * time.Millisecond)
	var wg sync.WaitGroup
	for g := range 6 {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(1, uint64(g)))
			last := map[int64]byte{}
			for time.Now().Before(stop) {
				slot := rng.Int64N(64)*4096 + int64(g)*600
				b := make([]byte, 600)
				if v, ok := last[slot]; ok {
					if _, err := main.ReadAt(b, slot); err != nil {
						t.Error(err)
						return
					}
					for _, x := range b {
						if x != v {
							t.Errorf("slot %#x reads %d, was written %d", slot, x, v)
							return
						}
					}
				}
				v := byte(rng.Uint32())
				for i := range b {
					b[i] = v
				}
				if _, err := main.WriteAt(b, slot); err != nil {
					t.Error(err)
					return
				}
				last[slot] = v
			}
		})
	}
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(2, 2))
		for time.Now().Before(stop) {
			off := rng.Int64N(60) * 4096
			if err := main.PageOut(deadline(t), off, 4*4096); err != nil {
				t.Error(err)
				return
			}
			runtime.GC()
		}
	})
	wg.Go(func() {
		for time.Now().Before(stop) {
			r, err := o.Map(deadline(t), nil)
			if err != nil {
				t.Error(err)
				return
			}
			var inner sync.WaitGroup
			for range 2 {
				inner.Go(func() {
					b := make([]byte, 4096)
					for {
						if _, err := r.ReadAt(b, 4096*rand.Int64N(64)); err != nil {
							if !errors.Is(err, ErrClosed) {
								t.Error(err)
							}
							return
						}
					}
				})
			}
			time.Sleep(time.Millisecond)
			if err := r.Close(); err != nil {
				t.Error(err)
			}
			inner.Wait()
		}
	})
	wg.Wait()
}
