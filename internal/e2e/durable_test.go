package e2e

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["durable"] = told(durableTask)
	tasks["durableread"] = using(durableRead)
}

const (
	durablePages   = 1024
	durableWriters = 4
)

// durableArg names the manager of the object, the file behind it, and the one with the promises.
type durableArg struct {
	At
	Manager, File, Promises string
}

// promise is what a task knows of a page when it dies: the version that it began to write last, and the one that Sync made safe.
type promise struct{ given, safe uint64 }

func mapPromises(path string) (*[durablePages]promise, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), 0, durablePages*16, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	return (*[durablePages]promise)(unsafe.Pointer(&b[0])), nil
}

// durableTask changes pages of a file's object and synchronises them until everything is killed. Most of the object is paged out at any time.
func durableTask(c *conn, arg durableArg) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: 1 << 20})
	if err != nil {
		return err
	}
	known, err := mapPromises(arg.Promises)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(arg.File, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	r, err := p.Allocate(ctx, durablePages*4096, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: arg.Manager, File: f}})
	if err != nil {
		return err
	}
	failed := make(chan error, durableWriters)
	for w := range durableWriters {
		go func() { failed <- durableWriter(ctx, r, known, w) }()
	}
	if err := c.send(true); err != nil {
		return err
	}
	return <-failed
}

func durableWriter(ctx context.Context, r *region.Region, known *[durablePages]promise, w int) error {
	const own = durablePages / durableWriters
	rng := rand.New(rand.NewPCG(uint64(w), uint64(os.Getpid())))
	b := r.Bytes()
	for {
		first := w*own + rng.IntN(own)
		n := min(1+rng.IntN(32), (w+1)*own-first)
		for i := first; i < first+n; i++ {
			known[i].given++
			for off := 0; off < 4096; off += 8 {
				binary.LittleEndian.PutUint64(b[i*4096+off:], known[i].given)
			}
		}
		if rng.IntN(2) == 0 {
			if err := r.Sync(ctx, int64(first)*4096, int64(n)*4096); err != nil {
				return err
			}
			for i := first; i < first+n; i++ {
				known[i].safe = known[i].given
			}
		}
	}
}

// TestDurable kills the guardian, the pager and the task at one instant, while the task changes and synchronises. What was synchronised is in the file, or what was
// written there later; never anything older, and never anything else.
func TestDurable(t *testing.T) {
	for _, manager := range []string{"file", "checked"} {
		t.Run(manager, func(t *testing.T) { testDurable(t, manager) })
	}
}

func testDurable(t *testing.T, manager string) {
	dir := t.TempDir()
	arg := durableArg{Manager: manager, File: filepath.Join(dir, "file"), Promises: filepath.Join(dir, "promises")}
	rng := rand.New(rand.NewPCG(4, 4))
	var safe, later int
	for round := range 6 {
		for path, size := range map[string]int64{arg.File: durablePages * 4096, arg.Promises: durablePages * 16} {
			if path == arg.File && manager == "checked" {
				size = 0
			}
			err := os.WriteFile(path, nil, 0o600)
			if err := firstOf(err, os.Truncate(path, size)); err != nil {
				t.Fatal(err)
			}
		}
		k := start(t, "durable", nil)
		k.send(arg)
		k.ready()
		time.Sleep(time.Duration(20+rng.IntN(100)) * time.Millisecond)
		all := append(descendants(k.cmd.Process.Pid), k.cmd.Process.Pid)
		for _, pid := range all { // at one instant: nobody is to see another's death
			syscall.Kill(pid, syscall.SIGSTOP)
		}
		rng.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		for _, pid := range all {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				t.Fatal(err)
			}
		}
		k.end()
		allGone(t, all)

		known, err := mapPromises(arg.Promises)
		if err != nil {
			t.Fatal(err)
		}
		b := durableContents(t, arg)
		for i, p := range known {
			for off := 0; off < 4096; off += 8 { // what was being written is torn where the program was
				if v := binary.LittleEndian.Uint64(b[i*4096+off:]); v < p.safe || v > p.given {
					t.Fatalf("round %d: page %d has version %d at byte %d; %d was synchronised, and %d written", round, i, v, off, p.safe, p.given)
				}
			}
			if p.safe > 0 {
				safe++
			}
			if v := binary.LittleEndian.Uint64(b[i*4096:]); v > p.safe {
				later++
			}
		}
		if err := unix.Munmap(unsafe.Slice((*byte)(unsafe.Pointer(known)), unsafe.Sizeof(*known))); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d pages were synchronised; %d in the files are later than that", safe, later)
	if safe == 0 {
		t.Error("nothing was synchronised")
	}
}

// durableContents is what another pager finds in the file.
func durableContents(t *testing.T, arg durableArg) []byte {
	t.Helper()
	if arg.Manager == "file" {
		b, err := os.ReadFile(arg.File)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	k := start(t, "durableread", nil)
	k.send(arg)
	var b []byte
	k.recv(&b)
	k.wait()
	if len(b) != durablePages*4096 {
		t.Fatalf("the object has %d bytes", len(b))
	}
	return b
}

func durableRead(ctx context.Context, c *conn, p *region.Pager, arg durableArg) error {
	f, err := os.OpenFile(arg.File, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	r, err := p.Allocate(ctx, 0, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: arg.Manager, File: f}})
	if err != nil {
		return err
	}
	b := make([]byte, r.Size())
	if _, err := r.ReadAt(b, 0); err != nil {
		return err
	}
	return firstOf(c.send(b), r.Close())
}
