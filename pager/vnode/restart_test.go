package vnode

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/checked"
	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

const (
	killedEnv   = "MACHPAGER_VNODETEST" // manager and failpoints: this process is the one that is killed
	killedPages = 16
)

// promises is memory that outlives a process: by page the version that was given to the manager last, and the one that is safe.
type promises struct {
	given, safe [killedPages]atomic.Uint64
}

func mapPromises(t testing.TB, f *os.File) *promises {
	t.Helper()
	b, err := unix.Mmap(int(f.Fd()), 0, ps, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return (*promises)(unsafe.Pointer(&b[0]))
}

// page is the contents of a version: it is in every word, so that a torn page tells.
func page(v uint64) []byte {
	b := make([]byte, ps)
	for i := 0; i < ps; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], v)
	}
	return b
}

// The process is killed at each step of writing and synchronising, and nothing is left but the file: each page is whole, and no older than what was synchronised. The vm that lives on has the
// rest, dirty: returned again it counts, however far the first return had come.
func TestKilled(t *testing.T) {
	if spec, ok := os.LookupEnv(killedEnv); ok {
		beKilled(t, spec)
	}
	t.Run("file", func(t *testing.T) {
		f := tempFile(t, bytes.Repeat(page(0), killedPages))
		testKilled(t, kept{"file", f}, []string{"vnode.write", "vnode.written", "vnode.sync", "vnode.synced"})
	})
	t.Run("checked", func(t *testing.T) {
		testKilled(t, kept{"checked", tempFile(t, nil)}, []string{"vnode.write", "vnode.written", "vnode.sync", "vnode.synced",
			"checked.write", "checked.written", "checked.entered", "checked.sync", "checked.safe", "checked.sealed"})
	})
}

// kept is a file and who manages it.
type kept struct {
	manager string
	f       *os.File
}

// open opens the file anew.
func (k kept) open(t *testing.T) *Pager {
	t.Helper()
	open := File
	if k.manager == "checked" {
		open = Checked
	}
	p, err := open(reopen(t, k.f, os.O_RDWR), killedPages*ps, &Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// page is what is in the file.
func (k kept) page(t *testing.T, n int) []byte {
	t.Helper()
	var r io.ReaderAt = k.f
	if k.manager == "checked" {
		if st, err := k.f.Stat(); err != nil || st.Size() == 0 { // the process was killed before it made it
			return page(0)
		}
		d, err := newDisk(k.f, nil)
		if err != nil {
			t.Fatal(err)
		}
		c, err := checked.Open(d, 0, &checked.Options{ReadOnly: true})
		if err != nil {
			t.Fatal(err)
		}
		r = c
	}
	b := make([]byte, ps)
	if _, err := r.ReadAt(b, int64(n)*ps); err != nil {
		t.Fatal(err)
	}
	return b
}

func testKilled(t *testing.T, f kept, points []string) {
	mem := tempFile(t, make([]byte, ps))
	rng := rand.New(rand.NewPCG(1, 1))
	var spec []string
	for _, name := range points {
		spec = append(spec, fmt.Sprintf("%s=%d:kill", name, 1+rng.IntN(40)), fmt.Sprintf("%s=%d:kill", name, 1+rng.IntN(40)))
	}
	for i, s := range append(spec, "", "", "", "") {
		killOnce(t, f, mem, s, rng)
		p := mapPromises(t, mem)
		if i%3 == 2 { // the vm is lost as well: what is in the file is what there is
			for n := range killedPages {
				p.given[n].Store(binary.LittleEndian.Uint64(f.page(t, n)))
			}
			continue
		}
		again := f.open(t)
		k := emmtest.NewKernel(t, again, emm.NewPort(), ps)
		k.MayFail = true
		if kr := k.Init(); kr != emm.Success {
			t.Fatal(kr)
		}
		for n := range int64(killedPages) { // the vm has it: the page table says Dirty
			if kr := k.Write(n*ps, page(p.given[n].Load())); kr != emm.Success {
				t.Fatal(kr)
			}
		}
		if kr := k.Synchronize(emm.Run{Size: killedPages * ps}).Wait(); kr != emm.Success {
			t.Fatal(kr)
		}
		k.Terminate()
		again.Close()
		waitIdle(t, again)
		for n := range killedPages {
			if got := f.page(t, n); !bytes.Equal(got, page(p.given[n].Load())) {
				t.Errorf("%q: page %d is not what was returned again", s, n)
			}
		}
	}
}

// killOnce runs a process until it is killed: by a failpoint, or, without any, from here. Then it looks at the file.
func killOnce(t *testing.T, f kept, mem *os.File, spec string, rng *rand.Rand) {
	t.Helper()
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	c, err := os.StartProcess(os.Args[0], []string{os.Args[0], "-test.run=^TestKilled$", "-test.timeout=60s"},
		&os.ProcAttr{Env: append(os.Environ(), killedEnv+"="+f.manager+" "+spec, "GORACE=atexit_sleep_ms=0"), Files: []*os.File{nil, in, os.Stderr, f.f, mem}})
	in.Close()
	if err != nil {
		t.Fatal(err)
	}
	if spec == "" {
		out.SetReadDeadline(time.Now().Add(emmtest.Deadline))
		out.Read(make([]byte, 1)) // it has begun
		time.Sleep(time.Duration(rng.Int64N(int64(5 * time.Millisecond))))
		c.Kill()
	}
	timer := time.AfterFunc(emmtest.Deadline, func() { c.Signal(unix.SIGQUIT) })
	defer timer.Stop()
	if st, err := c.Wait(); err != nil || st.Success() || st.Exited() {
		t.Fatalf("%q: the process was not killed: %v, %v", spec, st, err)
	}
	p := mapPromises(t, mem)
	for n := range killedPages {
		got := f.page(t, n)
		v := binary.LittleEndian.Uint64(got)
		switch {
		case !bytes.Equal(got, page(v)):
			t.Errorf("%q: page %d is torn", spec, n)
		case v < p.safe[n].Load() || v > p.given[n].Load():
			t.Errorf("%q: page %d has version %d; %d was synchronised, and %d given", spec, n, v, p.safe[n].Load(), p.given[n].Load())
		}
	}
}

// beKilled returns and synchronises pages until it is killed.
func beKilled(t *testing.T, spec string) {
	mem := os.NewFile(4, "memory")
	p := mapPromises(t, mem)
	manager, spec, _ := strings.Cut(spec, " ")
	f, err := os.OpenFile("/proc/self/fd/3", os.O_RDWR, 0) // the lock of one that is inherited would outlive this process
	if err != nil {
		t.Fatal(err)
	}
	open := File
	if manager == "checked" {
		open = Checked
	}
	m, err := open(f, killedPages*ps, &Options{Log: quiet})
	if err == nil {
		err = failpoint.Arm(spec)
	}
	if err != nil {
		t.Fatal(err)
	}
	k := emmtest.NewKernel(t, m, emm.NewPort(), ps)
	k.MayFail = true
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	os.Stdout.Write([]byte{'r'})
	rng := rand.New(rand.NewPCG(uint64(len(spec)), uint64(time.Now().UnixNano())))
	for {
		first := rng.IntN(killedPages)
		n := min(1+rng.IntN(6), killedPages-first)
		var data []byte
		for i := range n {
			data = append(data, page(p.given[first+i].Add(1))...)
		}
		if kr := k.Write(int64(first)*ps, data); kr != emm.Success {
			t.Fatal(kr)
		}
		if rng.IntN(3) == 0 {
			var now [killedPages]uint64
			for i := range now {
				now[i] = p.given[i].Load()
			}
			if kr := k.Synchronize(emm.Run{Size: killedPages * ps}).Wait(); kr != emm.Success {
				t.Fatal(kr)
			}
			for i := range now {
				p.safe[i].Store(now[i])
			}
		}
	}
}

// A failed fdatasync is told to who keeps the file, once and before the answer; and the next Pager fails from the beginning.
func TestLostSurvives(t *testing.T) {
	r, w, err := os.Pipe() // fdatasync of a pipe: EINVAL
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	told := 0
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c := &file{f: w, raw: raw, onLost: func() { told++ }}
	for range 3 {
		if err := c.sync(); !errors.Is(err, emm.MemoryFailure) || !errors.Is(err, unix.EINVAL) {
			t.Errorf("sync: %v", err)
		}
	}
	if told != 1 {
		t.Errorf("told %d times", told)
	}
	f := tempFile(t, page(1))
	p, err := File(reopen(t, f, os.O_RDWR), ps, &Options{Log: quiet, Lost: true})
	if err != nil {
		t.Fatal(err)
	}
	k := foreign(t, p)
	if kr := k.Write(0, page(2)); kr != emm.Success {
		t.Fatal(kr)
	}
	if kr := k.Synchronize(emm.Run{Size: ps}).Wait(); kr != emm.MemoryFailure {
		t.Errorf("synchronize a file whose fdatasync failed in an earlier pager: %v", kr)
	}
	if err := p.contents.sync(); err == nil || !strings.Contains(err.Error(), "earlier") {
		t.Errorf("sync: %v", err)
	}
}
