package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/pager"
	"machpager/pager/emm"
	"machpager/pager/store"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["badstore"] = overBadStore(badStoreTask)
	tasks["slowstore"] = overBadStore(slowStoreTask)
	tasks["damaged"] = told(damagedTask)
	tasks["unguarded"] = touching(modeError)
	tasks["closing"] = withPager(closing)
}

// badStore is a default pager of its own, over a store in which goes wrong what a file says. Its argument is that file's name and the object's
// size, with a colon between.
type badStore struct {
	*pager.Pager
	store *storetest.Faulty
	file  string
	size  int64

	mu     sync.Mutex
	mode   string // guarded by mu
	disarm func() // guarded by mu
}

func openBadStore(_ context.Context, arg string, _ *os.File) (emm.Manager, error) {
	file, size, _ := strings.Cut(arg, ":")
	m := &badStore{file: file}
	var err error
	if m.size, err = strconv.ParseInt(size, 10, 64); err != nil {
		return nil, err
	}
	mem, err := store.NewAnonymous(0)
	if err != nil {
		return nil, err
	}
	s, err := memory.New(mem, nil)
	if err != nil {
		return nil, err
	}
	m.store = storetest.NewFaulty(s)
	m.Pager, err = pager.New(pager.Options{Store: m.store, ClusterSize: 4096})
	return m, err
}

func (m *badStore) Init(h emm.Head, pageSize int) emm.KernReturn {
	if err := m.ObjectCreate(h.Object, m.size, pageSize); err != nil {
		return emm.Failure
	}
	return m.Pager.Init(h, pageSize)
}

func (m *badStore) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	m.look()
	return m.Pager.DataRequest(h, want, need, access)
}

func (m *badStore) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	m.look()
	return m.Pager.DataReturn(h, off, data, dirty, kernelCopy)
}

func (m *badStore) Close() error { return firstOf(m.Pager.Close(), m.store.Close()) }

// What a badStore does.
var badModes = map[string]storetest.Fault{
	"read fails":   {Label: "read fails", On: storetest.OnRead, Err: unix.EIO},
	"read slow":    {Label: "read slow", On: storetest.OnRead, Delay: time.Second},
	"read short":   {Label: "read short", On: storetest.OnRead, IsShort: true},
	"read corrupt": {Label: "read corrupt", On: storetest.OnRead, Corrupt: true},
	"write fails":  {Label: "write fails", On: storetest.OnWrite, Err: unix.EIO},
	"write short":  {Label: "write short", On: storetest.OnWrite, IsShort: true},
	"full":         {Label: "full", On: storetest.OnAlloc, Err: store.ErrNoSpace},
}

// look arms what the file says.
func (m *badStore) look() {
	b, err := os.ReadFile(m.file)
	if err != nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if mode := string(b); mode != m.mode {
		if m.disarm != nil {
			m.disarm()
			m.disarm = nil
		}
		m.mode = mode
		if f, ok := badModes[mode]; ok {
			m.disarm = m.store.Inject(f)
		}
	}
}

// badObject is memory over a badStore, in a task.
type badObject struct {
	p    *region.Pager
	r    *region.Region
	file string
	want []byte
}

const badSize = 64 << 10

func newBadObject(ctx context.Context, p *region.Pager, dir string) (*badObject, error) {
	b := &badObject{p: p, file: filepath.Join(dir, "mode"), want: make([]byte, badSize)}
	fill(b.want, 0, 1)
	if err := b.set("ok"); err != nil {
		return nil, err
	}
	o, err := p.ObjectCreate(ctx, badSize, &region.ObjectOptions{Manager: "badstore", Arg: fmt.Sprintf("%s:%d", b.file, badSize), ClusterSize: 4096})
	if err != nil {
		return nil, err
	}
	if b.r, err = o.Map(ctx, nil); err != nil {
		return nil, err
	}
	copy(b.r.Bytes(), b.want)
	return b, b.r.PageOut(ctx, 0, badSize)
}

// set replaces the file at once.
func (b *badObject) set(mode string) error {
	if err := os.WriteFile(b.file+"+", []byte(mode), 0o600); err != nil {
		return err
	}
	return os.Rename(b.file+"+", b.file)
}

// right checks the contents of a page.
func (b *badObject) right(off int) error {
	if err := region.Guard(func() error {
		if !bytes.Equal(b.r.Bytes()[off:off+4096], b.want[off:off+4096]) {
			return errors.New("wrong contents")
		}
		return nil
	}); err != nil {
		return fmt.Errorf("page at %#x: %w", off, err)
	}
	return nil
}

// bad checks that no access gets anything but an error at a page that is not there.
func (b *badObject) bad(off int) error {
	if n, err := b.write(off); !errors.Is(err, unix.EFAULT) {
		return fmt.Errorf("write(2) from %#x: %d, %v, want EFAULT", off, n, err)
	}
	buf := bytes.Repeat([]byte{0xa5}, 4096)
	var fe *region.FaultError
	for range 2 { // the second touch asks again
		err := region.Guard(func() error { copy(buf, b.r.Bytes()[off:off+4096]); return nil })
		if !errors.As(err, &fe) || !errors.Is(err, emm.MemoryError) || fe.Region != b.r || fe.Offset&^4095 != int64(off) {
			return fmt.Errorf("a touch at %#x: %v, want a *FaultError there with %v", off, err, emm.MemoryError)
		}
		if buf[0] != 0xa5 {
			return fmt.Errorf("a touch at %#x gave %#x", off, buf[0])
		}
	}
	n, err := b.r.ReadAt(buf, int64(off))
	if n != 0 || !errors.As(err, &fe) || !errors.Is(err, emm.MemoryError) {
		return fmt.Errorf("ReadAt %#x: %d, %v", off, n, err)
	}
	if n, err = b.r.WriteAt(buf[:8], int64(off+16)); n != 0 || !errors.As(err, &fe) {
		return fmt.Errorf("WriteAt %#x: %d, %v", off, n, err)
	}
	return nil
}

// write has the kernel read a page.
func (b *badObject) write(off int) (int, error) {
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return 0, err
	}
	defer unix.Close(pipe[0])
	defer unix.Close(pipe[1])
	return unix.Write(pipe[1], b.r.Bytes()[off:off+4096])
}

// heals waits until the pager has asked again by itself for a page whose error only system calls met.
func (b *badObject) heals(off int) error {
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		n, err := b.write(off)
		if n == 4096 {
			return b.right(off)
		}
		if time.Now().After(end) {
			return fmt.Errorf("write(2) from %#x does not heal: %d, %w", off, n, err)
		}
	}
}

// overBadStore is a task that has memory over a badStore, whose file is in the directory that it is told.
func overBadStore(f func(ctx context.Context, b *badObject) error) func(*conn) error {
	return told(func(_ *conn, dir string) error {
		ctx := context.Background()
		p, err := startPager(ctx, spawn.Options{Confine: daemon.ConfineNever}) // a badStore reads a file by name
		if err != nil {
			return err
		}
		b, err := newBadObject(ctx, p, dir)
		if err != nil {
			return err
		}
		return firstOf(f(ctx, b), p.Close())
	})
}

func badStoreTask(ctx context.Context, b *badObject) error {
	for i, mode := range []string{"read fails", "read short", "read corrupt"} {
		off := i * 4 * 4096
		if err := firstOf(b.set(mode), b.bad(off), b.set("ok"), b.right(off)); err != nil {
			return fmt.Errorf("store whose %s: %w", mode, err)
		}
		if n, err := b.r.ReadAt(make([]byte, 100), int64(off)); n != 100 || err != nil {
			return fmt.Errorf("ReadAt after the recovery: %d, %w", n, err)
		}
	}
	if err := b.set("read fails"); err != nil {
		return err
	}
	if n, err := b.write(14 * 4096); !errors.Is(err, unix.EFAULT) {
		return fmt.Errorf("write(2): %d, %v, want EFAULT", n, err)
	}
	if err := firstOf(b.set("ok"), b.heals(14*4096)); err != nil {
		return err
	}
	// A store that does not take what is returned: the pages stay, with what was written.
	for v, mode := range []string{"write fails", "write short", "full"} {
		fill(b.want, 0, uint64(v+2))
		copy(b.r.Bytes(), b.want)
		if err := b.set(mode); err != nil {
			return err
		}
		if err := b.r.PageOut(ctx, 0, badSize); err == nil {
			return fmt.Errorf("%s: a page-out succeeds", mode)
		}
		check := func() error {
			for off := 0; off < badSize; off += 4096 {
				if err := b.right(off); err != nil {
					return fmt.Errorf("%s: %w", mode, err)
				}
			}
			return nil
		}
		if err := firstOf(check(), b.set("ok"), b.r.PageOut(ctx, 0, badSize), check()); err != nil {
			return fmt.Errorf("%s: %w", mode, err)
		}
	}
	return nil
}

// TestBadStore: SIGBUS in the thread, EFAULT in the system call, *FaultError from Guard and ReadAt; and when the store has recovered, what is right.
func TestBadStore(t *testing.T) { run(t, "badstore", t.TempDir(), nil, nil) }

// slowStoreTask: a page that takes a second holds up nobody else.
func slowStoreTask(ctx context.Context, b *badObject) error {
	other, err := b.p.Allocate(ctx, 1<<20, nil)
	if err != nil {
		return err
	}
	if err := b.set("read slow"); err != nil {
		return err
	}
	// A context ends a Populate, and the P is free meanwhile.
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if err := b.r.Populate(short, 0, 4096, false); !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("Populate with a short deadline: %v", err)
	}
	if d := time.Since(begin); d > 500*time.Millisecond {
		return fmt.Errorf("Populate with a deadline of 50 ms took %v", d)
	}
	// A touch waits, and gets what is right; by ReadAt, so that with GOMAXPROCS=1 others run.
	done := make(chan error, 1)
	begin = time.Now()
	go func() {
		buf := make([]byte, 4096)
		_, err := b.r.ReadAt(buf, 8*4096)
		if err == nil && !bytes.Equal(buf, b.want[8*4096:9*4096]) {
			err = errors.New("wrong contents from the slow store")
		}
		if d := time.Since(begin); err == nil && d < 900*time.Millisecond {
			err = fmt.Errorf("the slow store took %v only", d)
		}
		done <- err
	}()
	touched := 0
	for ; touched < 256; touched++ {
		other.Bytes()[touched*4096] = 1
	}
	if d := time.Since(begin); d > 900*time.Millisecond {
		return fmt.Errorf("%d pages of another object took %v while one page was slow", touched, d)
	}
	if err := <-done; err != nil {
		return err
	}
	if err := b.right(12 * 4096); err != nil {
		return err
	}
	return firstOf(b.set("ok"), b.right(0))
}

func TestSlowStore(t *testing.T) { run(t, "slowstore", t.TempDir(), nil, nil) }

// damagedTask pages out to the default pager's file, and lets the test damage it.
func damagedTask(c *conn, dir string) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Dir: dir, Store: daemon.StoreFile})
	if err != nil {
		return err
	}
	defer p.Close()
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	r, err := p.Allocate(ctx, badSize, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{ClusterSize: 4096}})
	if err != nil {
		return err
	}
	b := &badObject{p: p, r: r, want: make([]byte, badSize)}
	fill(b.want, 0, 1)
	copy(r.Bytes(), b.want)
	if err := firstOf(r.PageOut(ctx, 0, badSize), c.send(info.PagerPID)); err != nil {
		return err
	}
	for {
		var damaged bool
		if err := c.recv(&damaged); errors.Is(err, io.EOF) {
			return p.Close()
		} else if err != nil {
			return err
		}
		for off := 0; off < badSize; off += 3 * 4096 {
			check := b.right
			if damaged {
				check = b.bad
			}
			if err := check(off); err != nil {
				return err
			}
		}
		if err := firstOf(r.PageOut(ctx, 0, badSize), c.send(true)); err != nil {
			return err
		}
	}
}

// TestDamagedPagingFile damages the paging file itself, behind the pager's back: errors, never wrong data.
func TestDamagedPagingFile(t *testing.T) {
	dir := t.TempDir()
	k := start(t, "damaged", nil)
	k.send(dir)
	var pid int
	k.recv(&pid)
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	var file *os.File
	for _, l := range links {
		if to, _ := os.Readlink(l); strings.HasPrefix(to, dir) {
			f, err := os.OpenFile(l, os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			file = f
		}
	}
	if file == nil {
		t.Fatalf("the pager has no file open in %s", dir)
	}
	st, err := file.Stat()
	if err != nil {
		t.Fatal(err)
	}
	whole := make([]byte, st.Size())
	if _, err := file.ReadAt(whole, 0); err != nil {
		t.Fatal(err)
	}
	restore := func() error { _, err := file.WriteAt(whole, 0); return err }
	for _, c := range []struct {
		name   string
		damage func() error
	}{
		{"one bit in every sector", func() error {
			b := bytes.Clone(whole)
			for i := 100; i < len(b); i += 512 {
				b[i] ^= 1
			}
			_, err := file.WriteAt(b, 0)
			return err
		}},
		{"zeros", func() error { _, err := file.WriteAt(make([]byte, len(whole)), 0); return err }},
		{"truncated", func() error { return file.Truncate(0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			if err := c.damage(); err != nil {
				t.Fatal(err)
			}
			var done bool
			k.send(true)
			k.recv(&done)
			if err := restore(); err != nil {
				t.Fatal(err)
			}
			k.send(false)
			k.recv(&done)
		})
	}
	k.wait()
}

func TestMemoryErrorUnguarded(t *testing.T) {
	k := start(t, "unguarded", func(c *exec.Cmd) { c.Env = append(os.Environ(), "GOTRACEBACK=single") })
	if err := k.end(); err == nil || !strings.Contains(k.output(), "SIGBUS") {
		t.Errorf("the task ended with %v, want SIGBUS", err)
	}
}

// closing closes a Region in which goroutines wait.
func closing(ctx context.Context, p *region.Pager) error {
	const readers = 2
	o, err := p.ObjectCreate(ctx, 1<<20, &region.ObjectOptions{Manager: "faulty", Arg: modeStuck})
	if err != nil {
		return err
	}
	for _, how := range []string{"ReadAt", "Guard"} {
		r, err := o.Map(ctx, nil)
		if err != nil {
			return err
		}
		errs := make(chan error, readers)
		for g := range readers {
			go func() {
				buf := make([]byte, 10)
				if how == "ReadAt" {
					_, err := r.ReadAt(buf, int64(g)<<16)
					errs <- err
					return
				}
				errs <- region.Guard(func() error { copy(buf, r.Bytes()[g<<16:]); return nil })
			}()
		}
		if how == "Guard" {
			// These keep their Ps. So the one who closes needs one more, and must not need the world stopped.
			time.Sleep(100 * time.Millisecond)
		}
		time.Sleep(100 * time.Millisecond)
		begin := time.Now()
		if err := r.Close(); err != nil {
			return fmt.Errorf("%s: %w", how, err)
		}
		for range readers {
			if err := <-errs; !errors.Is(err, region.ErrClosed) {
				return fmt.Errorf("%s in a region that was closed: %v, want %v", how, err, region.ErrClosed)
			}
		}
		if d := time.Since(begin); d > time.Second {
			return fmt.Errorf("%s: Close took %v", how, d)
		}
	}
	return o.Close()
}

func TestCloseEndsWaits(t *testing.T) {
	run(t, "closing", nil, nil, func(c *exec.Cmd) { c.Env = append(os.Environ(), "GOMAXPROCS=8") })
}
