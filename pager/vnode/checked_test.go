package vnode

import (
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/checked"
	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

func openChecked(t testing.TB, f *os.File, size int64) *Pager {
	t.Helper()
	p, err := Checked(f, size, &Options{Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestSuiteOnChecked(t *testing.T) {
	emmtest.Run(t, harness(false, func(t testing.TB, size int64) *Pager {
		return openChecked(t, reopen(t, tempFile(t, nil), os.O_RDWR), size)
	}))
}

// A page whose bytes are damaged in the file is an error of this page, until it is written anew.
func TestCheckedTorn(t *testing.T) {
	const size = 5*ps + 100
	f := tempFile(t, nil)
	k := foreign(t, openChecked(t, reopen(t, f, os.O_RDWR), size))
	was := emmtest.Fill(6, ps, 2)
	clear(was[size:])
	if kr := k.Write(0, was); kr != emm.Success {
		t.Fatal(kr)
	}
	if kr := k.Synchronize(emm.Run{Size: 6 * ps}).Wait(); kr != emm.Success {
		t.Fatal(kr)
	}
	damage(t, f, was[2*ps:][:512])
	answers := k.Ask(emm.Run{Size: 6 * ps}, 4*ps).Wait()
	for i, a := range answers {
		if i == 2 || i == 3 { // a page that nobody waits for, before the one that is in order and waited for
			if a.Kind != emmtest.Failed || a.Reason != emm.MemoryError {
				t.Errorf("page %d: %v %v", i, a.Kind, a.Reason)
			}
			continue
		}
		supplied(t, a, was[i*ps:][:ps])
	}
	if a := k.Read(emm.Run{Off: 2 * ps, Size: ps})[0]; a.Kind != emmtest.Failed || a.Reason != emm.MemoryError {
		t.Errorf("%v %v", a.Kind, a.Reason)
	}
	supplied(t, k.Read(emm.Run{Off: 3 * ps, Size: ps})[0], was[3*ps:][:ps])
	if kr := k.Write(2*ps, make([]byte, ps)); kr != emm.Success {
		t.Fatal(kr)
	}
	supplied(t, k.Read(emm.Run{Off: 2 * ps, Size: ps})[0], make([]byte, ps))
}

// damage changes a byte of the file after what it finds.
func damage(t *testing.T, f *os.File, what []byte) {
	t.Helper()
	b, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(b); at += 512 {
		if string(b[at:at+512]) == string(what) {
			if _, err := f.WriteAt([]byte{^b[at+511]}, int64(at)+511); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("it is not in the file")
}

// Who has the file keeps others off, and it is free at the end.
func TestCheckedLock(t *testing.T) {
	f := tempFile(t, nil)
	same := reopen(t, f, os.O_RDWR)
	defer same.Close()
	k := foreign(t, openChecked(t, reopen(t, f, os.O_RDWR), ps))
	for _, flags := range []int{os.O_RDWR, os.O_RDONLY} {
		g := reopen(t, f, flags)
		begun := time.Now()
		if _, err := Checked(g, ps, nil); !errors.Is(err, unix.EBUSY) || time.Since(begun) < lockPatience {
			t.Errorf("a file that is in use: %v after %v", err, time.Since(begun))
		}
		g.Close()
	}
	k.Terminate()
	if err := k.Init(); err != emm.Success {
		t.Fatal(err)
	}
	k.Terminate()
	if unix.Flock(int(same.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		t.Error("it is not locked")
	}
}

// A file is free when its Pager is closed, also if somebody has it open by the same description. Several may read.
func TestCheckedUnlock(t *testing.T) {
	f := tempFile(t, nil)
	again := func(flags int) *Pager {
		g := reopen(t, f, flags)
		fd, err := syscall.Dup(int(g.Fd()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { syscall.Close(fd) })
		return openChecked(t, g, ps)
	}
	for range 2 {
		p := again(os.O_RDWR)
		p.Close()
		waitIdle(t, p)
	}
	a, b := again(os.O_RDONLY), again(os.O_RDONLY)
	for _, p := range []*Pager{a, b} {
		if p.MaxProtection() != emm.ProtRead {
			t.Error("a file that is open read-only can be mapped for writing")
		}
		p.Close()
		waitIdle(t, p)
	}
	p := again(os.O_RDWR)
	p.Close()
	waitIdle(t, p)
}

// What cannot be opened is not changed, and not closed.
func TestCheckedRefuses(t *testing.T) {
	f := tempFile(t, []byte("something else"))
	for _, c := range []struct {
		f    *os.File
		size int64
		want error
	}{
		{f, 100, checked.ErrFormat},
		{tempFile(t, nil), 0, emm.InvalidArgument},
		{reopen(t, tempFile(t, nil), os.O_RDONLY), 100, checked.ErrFormat},
		{reopen(t, f, os.O_RDWR|os.O_APPEND), 100, unix.EINVAL},
		{reopen(t, f, os.O_WRONLY), 100, unix.EBADF},
	} {
		if _, err := Checked(c.f, c.size, nil); !errors.Is(err, c.want) {
			t.Errorf("%v", err)
		}
		if _, err := c.f.Stat(); err != nil {
			t.Errorf("it was closed: %v", err)
		}
		c.f.Close()
	}
	if b, err := os.ReadFile(f.Name()); err != nil || string(b) != "something else" {
		t.Errorf("it was changed: %q, %v", b, err)
	}
}

// What was never written, or was discarded, takes no space.
func TestCheckedSparse(t *testing.T) {
	f := tempFile(t, nil)
	k := foreign(t, openChecked(t, reopen(t, f, os.O_RDWR), 1<<40))
	blocks := func() int64 {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			t.Fatal(err)
		}
		return st.Blocks * 512
	}
	if n := blocks(); n > 64<<10 {
		t.Errorf("an object of 1 TiB that was never written takes %d bytes", n)
	}
	const size = 2 << 20
	sync := func() {
		t.Helper()
		if kr := k.Synchronize(emm.Run{Size: size}).Wait(); kr != emm.Success {
			t.Fatal(kr)
		}
	}
	for i := range uint64(3) {
		if kr := k.Write(1<<30, emmtest.Fill(size/ps, ps, i)); kr != emm.Success {
			t.Fatal(kr)
		}
		sync()
	}
	if n := blocks(); n < size || n > 2*size+128<<10 {
		t.Errorf("%d bytes that were written again and again take %d", size, n)
	}
	if kr := k.Write(1<<30, make([]byte, size)); kr != emm.Success {
		t.Fatal(kr)
	}
	sync()
	if n := blocks(); n > 128<<10 {
		t.Errorf("discarded, they take %d", n)
	}
}
