package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["file"] = withPager(fileObject)
	tasks["filesizes"] = withPager(fileSizes)
	tasks["fileends"] = withPager(fileEnds)
	tasks["filekilled"] = fileKilled
	tasks["truncated"] = withPager(truncated)
	tasks["filereadonly"] = withPager(fileReadOnly)
	tasks["moody"] = withPagerOf(spawn.Options{Confine: daemon.ConfineNever}, moodyObject) // it reads its mood from a file that it opens by name
	tasks["filewriter"] = using(fileWriter)
}

func TestFile(t *testing.T)          { run(t, "file", nil, nil, nil) }
func TestFileSizes(t *testing.T)     { run(t, "filesizes", nil, nil, nil) }
func TestFileEnds(t *testing.T)      { run(t, "fileends", nil, nil, nil) }
func TestFileKilled(t *testing.T)    { run(t, "filekilled", nil, nil, nil) }
func TestFileTruncated(t *testing.T) { run(t, "truncated", nil, nil, nil) }
func TestFileReadOnly(t *testing.T)  { run(t, "filereadonly", nil, nil, nil) }

// backing is a file in a directory of its own, with fill(b, 0, 1) in it.
type backing struct {
	*os.File
	want []byte // what must be in it
}

func newBacking(size int) (*backing, error) {
	dir, err := os.MkdirTemp("", "e2e-file")
	if err != nil {
		return nil, err
	}
	b := &backing{want: make([]byte, size)}
	fill(b.want, 0, 1)
	if b.File, err = os.Create(filepath.Join(dir, "file")); err == nil {
		_, err = b.Write(b.want)
	}
	if err != nil {
		os.RemoveAll(dir)
	}
	return b, err
}

func (b *backing) remove() {
	b.Close()
	os.RemoveAll(filepath.Dir(b.Name()))
}

// check compares the file with what must be in it.
func (b *backing) check(what string) error {
	got, err := os.ReadFile(b.Name())
	if err != nil {
		return err
	}
	return sameBytes(what+": the file", got, b.want)
}

func sameBytes(what string, got, want []byte) error {
	if len(got) != len(want) {
		return fmt.Errorf("%s: %d bytes, want %d", what, len(got), len(want))
	}
	if i := firstDiff(got, want); i >= 0 {
		return fmt.Errorf("%s: byte %d is %#x, want %#x", what, i, got[i], want[i])
	}
	return nil
}

// put writes the same to the memory and to what must be in the file.
func (b *backing) put(r *region.Region, off int, s string) {
	copy(r.Bytes()[off:], s)
	copy(b.want[off:], s)
}

func mapFile(ctx context.Context, p *region.Pager, f *os.File, o region.ObjectOptions, m *region.MapOptions) (*region.Object, *region.Region, error) {
	o.Manager, o.File = "file", f
	return create(ctx, p, 0, &o, m)
}

// fileObject reads a file by touching memory, and changes it.
func fileObject(ctx context.Context, p *region.Pager) error {
	const size = 3<<20 + 100
	b, err := newBacking(size)
	if err != nil {
		return err
	}
	defer b.remove()
	for _, o := range []region.ObjectOptions{{}, {ClusterSize: 256 << 10}, {PageSize: 64 << 10}, {PageSize: 2 << 20}} {
		object, r, err := mapFile(ctx, p, b.File, o, nil)
		if err != nil {
			return err
		}
		if r.Size() != size {
			return fmt.Errorf("the object has %d bytes", r.Size())
		}
		if err := sameBytes("first touch", r.Bytes(), b.want); err != nil {
			return err
		}
		b.put(r, 4090, "over the edge of a page")
		b.put(r, size-3, "end")
		if err := firstOf(r.Sync(ctx, 4090, 23), r.Sync(ctx, size-1, 1), b.check("after Sync")); err != nil {
			return err
		}
		b.put(r, 4090, "over the edge, once more") // the page is clean, and resident
		b.put(r, 1<<20, "in the middle")
		if err := firstOf(r.PageOut(ctx, 0, size), b.check("after page-out"), sameBytes("touched again", r.Bytes(), b.want)); err != nil {
			return err
		}
		if s := r.Stats(); s.WriteProtect < 3 || s.Stored == 0 {
			return fmt.Errorf("%+v", s)
		}
		b.put(r, 2<<20, "by the end of the object")
		b.put(r, size-10, "0123456789")
		if err := firstOf(r.Close(), object.Close(), b.check("after the object's end")); err != nil {
			return err
		}
	}
	return nil
}

// fileSizes maps files of awkward sizes. They never grow by a page's remainder.
func fileSizes(ctx context.Context, p *region.Pager) error {
	for _, size := range []int{1, 4095, 4096, 4097, 2<<20 - 1, 2<<20 + 1} {
		for _, page := range []int{4096, 2 << 20} {
			b, err := newBacking(size)
			if err != nil {
				return err
			}
			defer b.remove()
			_, r, err := mapFile(ctx, p, b.File, region.ObjectOptions{PageSize: page}, nil)
			if err != nil {
				return err
			}
			if err := r.Populate(ctx, 0, int64(size), true); err != nil {
				return err
			}
			b.put(r, size-1, "X")
			if err := firstOf(r.Sync(ctx, 0, int64(size)), b.check(fmt.Sprint(size)), r.Close()); err != nil {
				return err
			}
		}
	}
	return nil
}

// fileEnds maps an object that is larger than its file, and one that is smaller.
func fileEnds(ctx context.Context, p *region.Pager) error {
	b, err := newBacking(10_000)
	if err != nil {
		return err
	}
	defer b.remove()
	small, err := p.Allocate(ctx, 5_000, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: "file", File: b.File}})
	if err != nil {
		return err
	}
	b.put(small, 4_998, "<>")
	if err := firstOf(sameBytes("a part", small.Bytes(), b.want[:5_000]), small.Close(), b.check("a part")); err != nil {
		return err
	}
	large, err := p.Allocate(ctx, 1<<20, &region.AllocateOptions{ObjectOptions: region.ObjectOptions{Manager: "file", File: b.File}})
	if err != nil {
		return err
	}
	if err := sameBytes("beyond the end", large.Bytes(), append(bytes.Clone(b.want), make([]byte, 1<<20-10_000)...)); err != nil {
		return err
	}
	b.put(large, 9_000, "within")
	if err := firstOf(large.Sync(ctx, 0, 1<<20), b.check("not grown")); err != nil {
		return err
	}
	b.want = append(b.want, make([]byte, 500_003-10_000)...)
	b.put(large, 500_000, "end")
	return firstOf(large.Sync(ctx, 0, 1<<20), b.check("grown"), large.PageOut(ctx, 0, 1<<20), sameBytes("again", large.Bytes()[:500_003], b.want), large.Close(),
		b.check("grown, and closed"))
}

// fileKilled: what was synchronised is in the file, whoever dies.
func fileKilled(*conn) error {
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: 64 << 20, Restarts: -1})
	if err != nil {
		return err
	}
	b, err := newBacking(1<<20 + 7)
	if err != nil {
		return err
	}
	defer b.remove()
	_, r, err := mapFile(ctx, p, b.File, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	fill(r.Bytes(), 0, 2)
	fill(b.want, 0, 2)
	info, err := p.Info(ctx)
	if err := firstOf(err, r.Sync(ctx, 0, r.Size())); err != nil {
		return err
	}
	fill(r.Bytes()[:100<<10], 0, 3) // and this is not
	if err := syscall.Kill(info.PagerPID, syscall.SIGKILL); err != nil {
		return err
	}
	for alive(info.PagerPID) {
		time.Sleep(time.Millisecond)
	}
	if err := r.Sync(ctx, 0, 1); !errors.Is(err, region.ErrPagerGone) {
		return fmt.Errorf("sync without a pager: %w", err)
	}
	if err := b.check("after the pager's death"); err != nil {
		return err
	}
	if p.Close() == nil { // it was a child, and did not end well
		return errors.New("closing a pager that was killed is no error")
	}
	return nil
}

// truncated cuts a file under the object.
func truncated(ctx context.Context, p *region.Pager) error {
	const size = 1 << 20
	b, err := newBacking(size)
	if err != nil {
		return err
	}
	defer b.remove()
	_, r, err := mapFile(ctx, p, b.File, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	b.put(r, 500_000, "dirty when it happens")
	if err := b.Truncate(300_000); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	var fault *region.FaultError
	for _, off := range []int64{300_000, 400_000, size - 4096} {
		if _, err := r.ReadAt(buf, off); !errors.As(err, &fault) || !errors.Is(err, emm.MemoryError) {
			return fmt.Errorf("a page that was cut off, at %d: %w", off, err)
		}
		if err := region.Guard(func() error { buf[0] = r.Bytes()[off]; return nil }); !errors.Is(err, emm.MemoryError) {
			return fmt.Errorf("a touch of a page that was cut off, at %d: %w", off, err)
		}
	}
	if err := sameBytes("what is left", r.Bytes()[:290_000], b.want[:290_000]); err != nil {
		return err
	}
	if err := r.Sync(ctx, 0, size); err == nil {
		return errors.New("a page behind the new end was synchronised")
	}
	if err := r.PageOut(ctx, 0, size); err == nil {
		return errors.New("a page behind the new end was paged out")
	}
	if got := string(r.Bytes()[500_000:500_021]); got != "dirty when it happens" {
		return fmt.Errorf("the dirty page has %q", got)
	}
	if st, err := b.Stat(); err != nil || st.Size() != 300_000 {
		return fmt.Errorf("the file has %d bytes, %w", st.Size(), err)
	}
	if _, err := b.WriteAt(b.want, 0); err != nil { // as it was
		return err
	}
	all := make([]byte, size)
	if _, err := r.ReadAt(all, 0); err != nil {
		return fmt.Errorf("after the file was made whole again: %w", err)
	}
	return firstOf(sameBytes("whole again", all, b.want), r.Sync(ctx, 0, size), b.check("whole again"))
}

// fileReadOnly opens files in every way that does not do.
func fileReadOnly(ctx context.Context, p *region.Pager) error {
	b, err := newBacking(100_000)
	if err != nil {
		return err
	}
	defer b.remove()
	open := func(flags int) *os.File {
		f, e := os.OpenFile(b.Name(), flags, 0)
		err = firstOf(err, e)
		return f
	}
	ro, wo, app := open(os.O_RDONLY), open(os.O_WRONLY), open(os.O_RDWR|os.O_APPEND)
	if err != nil {
		return err
	}
	if _, _, err := mapFile(ctx, p, ro, region.ObjectOptions{}, nil); !errors.Is(err, emm.ProtectionFailure) {
		return fmt.Errorf("a writable mapping of a file open read-only: %w", err)
	}
	_, r, err := mapFile(ctx, p, ro, region.ObjectOptions{}, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	if err := firstOf(sameBytes("read-only", r.Bytes(), b.want), r.Sync(ctx, 0, r.Size()), r.PageOut(ctx, 0, r.Size()), sameBytes("again", r.Bytes(), b.want)); err != nil {
		return err
	}
	empty, err := os.CreateTemp(filepath.Dir(b.Name()), "empty")
	if err != nil {
		return err
	}
	for _, c := range []struct {
		f    *os.File
		arg  string
		want error
	}{{wo, "", unix.EBADF}, {app, "", unix.EINVAL}, {empty, "", emm.InvalidArgument}, {b.File, "x", emm.InvalidArgument}} {
		if _, err := p.ObjectCreate(ctx, 0, &region.ObjectOptions{Manager: "file", File: c.f, Arg: c.arg}); !errors.Is(err, c.want) {
			return fmt.Errorf("create object of %s: %w, want %w", c.f.Name(), err, c.want)
		}
	}
	if _, err := p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "file"}); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("create object of no file: %w", err)
	}
	return b.check("untouched")
}

type writerArg struct {
	At
	File        string
	Port        emm.Port // null: make the object
	Slot, Slots int
	Time        time.Duration
	Seed        uint64
}

const sharedSize = 300*4096 + 48 // a multiple of 8 bytes per slot, and no whole page

// fileWriter writes the words of a shared file that are its own, and sees to it that nobody else does.
func fileWriter(ctx context.Context, c *conn, p *region.Pager, arg writerArg) error {
	f, err := os.OpenFile(arg.File, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	o, r, err := share(ctx, p, arg.Port, 0, &region.ObjectOptions{Manager: "file", File: f, ClusterSize: 32 << 10})
	f.Close() // the pager has its own
	if err != nil {
		return err
	}
	if err := c.send(o.Port()); err != nil {
		return err
	}
	rng := rand.New(rand.NewPCG(arg.Seed, uint64(arg.Slot)))
	mem, mine := r.Bytes(), map[int]byte{}
	words := sharedSize / 8 / arg.Slots
	for end := time.Now().Add(arg.Time); time.Now().Before(end); {
		for range 50 {
			at := (rng.IntN(words)*arg.Slots + arg.Slot) * 8
			if v, ok := mine[at]; ok && mem[at] != v {
				return fmt.Errorf("seed %d: byte %d is %d, and was written as %d", arg.Seed, at, mem[at], v)
			}
			mine[at] = byte(rng.Uint32())
			mem[at] = mine[at]
		}
		off := rng.Int64N(sharedSize)
		n := rng.Int64N(min(sharedSize-off, 40*4096)) + 1
		switch rng.IntN(3) {
		case 0:
			err = r.Sync(ctx, off, n)
		case 1:
			err = r.PageOut(ctx, off, n)
		}
		if err != nil {
			return fmt.Errorf("seed %d: %w", arg.Seed, err)
		}
	}
	if err := firstOf(r.Sync(ctx, 0, sharedSize), c.send(mine)); err != nil {
		return err
	}
	c.await() // the object lives until all have synchronised
	return nil
}

// TestFileShared: tasks that write the same pages, while they are synchronised and paged out all the time.
func TestFileShared(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Resident: 512 << 10}) // less than half of the file
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, make([]byte, sharedSize), 0o600); err != nil {
		t.Fatal(err)
	}
	arg := writerArg{At: At{socket}, File: path, Slots: 3, Time: soak(2 * time.Second), Seed: uint64(time.Now().UnixNano())}
	t.Logf("seed %d", arg.Seed)
	var writers []*task
	for arg.Slot = range arg.Slots {
		k := startFor(t, "filewriter", arg.Time+patience, nil)
		k.send(arg)
		k.recv(&arg.Port)
		writers = append(writers, k)
	}
	want := make([]byte, sharedSize)
	for _, k := range writers {
		var mine map[int]byte
		k.recv(&mine)
		for at, v := range mine {
			want[at] = v
		}
		if len(mine) < 100 {
			t.Errorf("only %d words written", len(mine))
		}
	}
	if got, err := os.ReadFile(path); err != nil || sameBytes("synchronised", got, want) != nil {
		t.Fatal(err, sameBytes("synchronised", got, want))
	}
	for _, k := range writers {
		k.wait()
	}
	if got, err := os.ReadFile(path); err != nil || sameBytes("in the end", got, want) != nil {
		t.Fatal(err, sameBytes("in the end", got, want))
	}
}
