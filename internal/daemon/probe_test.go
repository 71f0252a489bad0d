package daemon

import (
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/internal/guardian"
	"machpager/pager/emm"
	"machpager/uffd"
)

// TestProbe registers memory in every way a task may lie about, and looks that the probe changes nothing. Nothing is touched here.
func TestProbe(t *testing.T) {
	p, err := newProber()
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	fd, err := uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures})
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	const n = 16 * 4096
	all := uffd.RegisterMissing | uffd.RegisterMinor | uffd.RegisterWP
	for _, c := range []struct {
		name           string
		mode           uffd.RegisterMode // 0: not at all
		start, end     uint64            // of what is registered
		readOnly, good bool
	}{
		{"all", all, 0, n, false, true},
		{"nothing", 0, 0, 0, false, false},
		{"the first half", all, 0, n / 2, false, false},
		{"the second half", all, n / 2, n, false, false},
		{"no protection", uffd.RegisterMissing | uffd.RegisterMinor, 0, n, false, false},
		{"no protection, read-only", uffd.RegisterMissing | uffd.RegisterMinor, 0, n, true, true},
		{"nothing, read-only", 0, 0, 0, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			file, err := unix.MemfdCreate("probe", unix.MFD_CLOEXEC)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(file)
			if err := unix.Ftruncate(file, n); err != nil {
				t.Fatal(err)
			}
			b, err := unix.Mmap(file, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Munmap(b)
			addr := uint64(uintptr(unsafe.Pointer(&b[0])))
			if c.mode != 0 {
				if _, err := fd.Register(addr+c.start, c.end-c.start, c.mode); err != nil {
					t.Fatal(err)
				}
			}
			err = p.registered(fd, guardian.Range{Start: addr, Len: n}, c.readOnly)
			if c.good && err != nil || !c.good && !errors.Is(err, emm.InvalidAddress) {
				t.Errorf("got %v", err)
			}
			var st unix.Stat_t
			if err := unix.Fstat(file, &st); err != nil || st.Blocks != 0 {
				t.Errorf("%d blocks in the file, %v; want none", st.Blocks, err)
			}
			resident := make([]byte, n/4096)
			if err := mincore(b, resident); err != nil {
				t.Fatal(err)
			}
			for i, r := range resident {
				if r&1 != 0 {
					t.Errorf("page %d is there", i)
				}
			}
		})
	}
}

func mincore(b, vec []byte) error {
	_, _, e := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&vec[0])))
	if e != 0 {
		return e
	}
	return nil
}
