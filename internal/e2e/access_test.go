package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/region"
)

func init() {
	tasks["syscalls"] = withPager(syscalls)
	tasks["sizes"] = withPager(sizes)
	tasks["sparse"] = withPager(sparse)
	tasks["onepage"] = withPager(onePage)
	tasks["readonly"] = withPager(readOnly)
}

func TestSystemCalls(t *testing.T)      { run(t, "syscalls", nil, nil, nil) }
func TestSizes(t *testing.T)            { run(t, "sizes", nil, nil, nil) }
func TestSparse(t *testing.T)           { run(t, "sparse", nil, nil, nil) }
func TestThreadsOnOnePage(t *testing.T) { run(t, "onepage", nil, nil, nil) }
func TestReadOnly(t *testing.T)         { run(t, "readonly", nil, nil, nil) }

// syscalls lets the kernel itself meet missing pages.
func syscalls(ctx context.Context, p *region.Pager) error {
	const size = 1<<20 + 100 // ends within a page
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return err
	}
	mem := r.Bytes()
	want := make([]byte, size)
	fill(want, 0, 1)
	f, err := os.CreateTemp("", "e2e")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	out := func() error { return r.PageOut(ctx, 0, size) }
	check := func(what string, got []byte) error {
		if i := firstDiff(want, got); i >= 0 || len(got) != len(want) {
			return fmt.Errorf("%s: %d bytes, the first difference at %d", what, len(got), i)
		}
		return nil
	}

	if _, err := f.Write(want); err != nil {
		return err
	}
	// read(2) into memory never touched.
	if n, err := f.ReadAt(mem, 0); err != nil || n != size {
		return fmt.Errorf("read into missing memory: %d, %w", n, err)
	}
	if err := firstOf(check("read", mem), out()); err != nil {
		return err
	}
	// write(2) from memory that is paged out.
	if n, err := f.WriteAt(mem, size); err != nil || n != size {
		return fmt.Errorf("write from missing memory: %d, %w", n, err)
	}
	got := make([]byte, size)
	if _, err := f.ReadAt(got, size); err != nil {
		return err
	}
	if err := firstOf(check("write", got), out()); err != nil {
		return err
	}
	// Into a pipe and out of one.
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	defer pr.Close()
	wrote := make(chan error, 1)
	go func() {
		_, err := pw.Write(mem)
		pw.Close()
		wrote <- err
	}()
	got, err = io.ReadAll(pr)
	if err := firstOf(err, <-wrote, check("pipe", got), out()); err != nil {
		return err
	}
	// io.Copy from a Region, and to one.
	var b bytes.Buffer
	if n, err := io.Copy(&b, io.NewSectionReader(r, 0, size)); err != nil || n != size {
		return fmt.Errorf("io.Copy from the region: %d, %w", n, err)
	}
	if err := check("io.Copy from", b.Bytes()); err != nil {
		return err
	}
	fill(want, 0, 2)
	if n, err := io.Copy(io.NewOffsetWriter(r, 0), bytes.NewReader(want)); err != nil || n != size {
		return fmt.Errorf("io.Copy to the region: %d, %w", n, err)
	}
	if err := firstOf(check("io.Copy to", mem), out()); err != nil {
		return err
	}
	// io.Copy between a file and the slice itself.
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	if n, err := io.Copy(f, bytes.NewReader(mem)); err != nil || n != size {
		return fmt.Errorf("io.Copy to a file: %d, %w", n, err)
	}
	got = make([]byte, size)
	if _, err := f.ReadAt(got, 0); err != nil {
		return err
	}
	if err := check("io.Copy to a file", got); err != nil {
		return err
	}

	// The ends, as io.ReaderAt and io.WriterAt promise them.
	buf := make([]byte, 10)
	for _, c := range []struct {
		off int64
		n   int
		err error
	}{{size - 10, 10, nil}, {size - 4, 4, io.EOF}, {size, 0, io.EOF}, {size + 5, 0, io.EOF}, {1 << 40, 0, io.EOF}} {
		n, err := r.ReadAt(buf, c.off)
		// At the very end a ReaderAt may say io.EOF together with all it was asked for.
		if n != c.n || err != c.err && !(c.n == len(buf) && err == io.EOF) {
			return fmt.Errorf("ReadAt %d bytes at end%+d: %d, %v; want %d, %v", len(buf), c.off-size, n, err, c.n, c.err)
		}
		if !bytes.Equal(buf[:n], want[min(c.off, size):min(c.off, size)+int64(n)]) {
			return fmt.Errorf("ReadAt at end%+d: wrong bytes", c.off-size)
		}
	}
	for _, c := range []struct {
		off int64
		n   int
		err error
	}{{size - 10, 10, nil}, {size - 4, 4, io.ErrShortWrite}, {size, 0, io.ErrShortWrite}, {1 << 40, 0, io.ErrShortWrite}} {
		if n, err := r.WriteAt(buf, c.off); n != c.n || !errors.Is(err, c.err) {
			return fmt.Errorf("WriteAt %d bytes at end%+d: %d, %v; want %d, %v", len(buf), c.off-size, n, err, c.n, c.err)
		}
	}
	for _, off := range []int64{-1, -size} {
		if n, err := r.ReadAt(buf, off); n != 0 || err == nil || err == io.EOF {
			return fmt.Errorf("ReadAt %d: %d, %v", off, n, err)
		}
		if n, err := r.WriteAt(buf, off); n != 0 || err == nil {
			return fmt.Errorf("WriteAt %d: %d, %v", off, n, err)
		}
	}
	if n, err := r.ReadAt(nil, 0); n != 0 || err != nil {
		return fmt.Errorf("ReadAt of nothing: %d, %v", n, err)
	}
	return nil
}

// sizes faults on the first, the last and the partial last page of objects of odd sizes.
func sizes(ctx context.Context, p *region.Pager) error {
	for _, size := range []int64{1, 4095, 4096, 4097, 8191, 3*4096 + 1, 2<<20 - 1, 2 << 20, 2<<20 + 1} {
		r, err := p.Allocate(ctx, size, nil)
		if err != nil {
			return fmt.Errorf("size %d: %w", size, err)
		}
		mem := r.Bytes()
		if int64(len(mem)) != size || int64(cap(mem)) != size {
			return fmt.Errorf("size %d: Bytes has length %d and capacity %d", size, len(mem), cap(mem))
		}
		if mem[0] != 0 || mem[size-1] != 0 {
			return fmt.Errorf("size %d: fresh memory is not zero", size)
		}
		mem[size-1] = 0xee
		mem[0] ^= 0x11
		want0, want1 := mem[0], mem[size-1]
		for range 2 {
			if err := r.PageOut(ctx, 0, size); err != nil {
				return fmt.Errorf("size %d: %w", size, err)
			}
			if mem[size-1] != want1 || mem[0] != want0 {
				return fmt.Errorf("size %d: first and last byte are %#x and %#x, want %#x and %#x", size, mem[0], mem[size-1], want0, want1)
			}
		}
		if n, err := r.ReadAt(make([]byte, size), 0); int64(n) != size || err != nil && err != io.EOF {
			return fmt.Errorf("size %d: ReadAt: %d, %v", size, n, err)
		}
		if err := r.Close(); err != nil {
			return err
		}
		if r.Bytes() != nil {
			return errors.New("Bytes is not nil after Close")
		}
	}
	for _, size := range []int64{0, -1, -4096, 1<<63 - 1} {
		if r, err := p.Allocate(ctx, size, nil); err == nil {
			return fmt.Errorf("an object of %d bytes was made: %v", size, r)
		}
	}
	return nil
}

// sparse reserves 64 GiB and touches a few pages.
func sparse(ctx context.Context, p *region.Pager) error {
	const size = 64 << 30
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return err
	}
	mem := r.Bytes()
	offs := []int64{0, 4096, 2<<20 - 1, 2 << 20, 1<<32 - 1, 1 << 32, 1<<35 + 12345, size - 4096, size - 1}
	for i, off := range offs {
		if mem[off] != 0 {
			return fmt.Errorf("offset %#x: %#x in fresh memory", off, mem[off])
		}
		mem[off] = byte(i + 1)
	}
	for range 2 {
		for i, off := range offs {
			if mem[off] != byte(i+1) {
				return fmt.Errorf("offset %#x: %#x, want %#x", off, mem[off], i+1)
			}
		}
		if err := r.PageOut(ctx, 0, size); err != nil {
			return err
		}
	}
	return nil
}

// onePage lets 64 threads meet one missing page at the same time.
func onePage(ctx context.Context, p *region.Pager) error {
	const n = 64
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(n + 4))
	r, err := p.Allocate(ctx, 4096, nil)
	if err != nil {
		return err
	}
	mem := r.Bytes()
	for round := range 50 {
		var ready, done sync.WaitGroup
		gate := make(chan struct{})
		ready.Add(n)
		errs := make(chan error, n)
		for g := range n {
			done.Go(func() {
				runtime.LockOSThread()
				ready.Done()
				<-gate
				if g%2 == 0 {
					mem[g*8] = byte(round + g)
				}
				if got, want := mem[g*8+4], byte(max(0, round-1+g)); round > 0 && got != want {
					errs <- fmt.Errorf("round %d, thread %d: %#x, want %#x", round, g, got, want)
				}
				mem[g*8+4] = byte(round + g)
			})
		}
		ready.Wait()
		close(gate)
		done.Wait()
		select {
		case err := <-errs:
			return err
		default:
		}
		for g := 0; g < n; g += 2 {
			if mem[g*8] != byte(round+g) {
				return fmt.Errorf("round %d: the write of thread %d is lost", round, g)
			}
		}
		if err := r.PageOut(ctx, 0, 4096); err != nil {
			return err
		}
	}
	return nil
}

// readOnly maps an object that another mapping writes.
func readOnly(ctx context.Context, p *region.Pager) error {
	const size = 256 << 10
	o, err := p.ObjectCreate(ctx, size, nil)
	if err != nil {
		return err
	}
	ro, err := o.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("map read-only: %w", err)
	}
	// Alone it sees zeros: nobody else has mapped the object yet.
	if i := firstDiff(ro.Bytes(), make([]byte, size)); i >= 0 {
		return fmt.Errorf("a fresh object read-only: not zero at %d", i)
	}
	rw, err := o.Map(ctx, nil)
	if err != nil {
		return err
	}
	want := make([]byte, size)
	for v := uint64(1); v < 5; v++ {
		fill(want, 0, v)
		copy(rw.Bytes(), want)
		if i := firstDiff(ro.Bytes(), want); i >= 0 {
			return fmt.Errorf("version %d: the read-only mapping differs at %d", v, i)
		}
		if v%2 == 0 {
			if err := ro.PageOut(ctx, 0, size); err != nil {
				return err
			}
			if i := firstDiff(ro.Bytes(), want); i >= 0 {
				return fmt.Errorf("version %d: the read-only mapping differs at %d after the page-out", v, i)
			}
		}
	}
	// Only the read-only mapping is left, and everything is paged out.
	if err := firstOf(rw.PageOut(ctx, 0, size), rw.Close()); err != nil {
		return err
	}
	if i := firstDiff(ro.Bytes(), want); i >= 0 {
		return fmt.Errorf("the read-only mapping alone differs at %d", i)
	}
	// A write is refused, by Guard and by WriteAt, and leaves the contents.
	err = region.Guard(func() error { ro.Bytes()[100]++; return nil })
	var fe *region.FaultError
	if !errors.As(err, &fe) || fe.Region != ro || !errors.Is(err, emm.ProtectionFailure) {
		return fmt.Errorf("a write to a read-only mapping: %v, want a *FaultError of protection failure", err)
	}
	if n, err := ro.WriteAt([]byte{1}, 100); n != 0 || !errors.Is(err, emm.ProtectionFailure) {
		return fmt.Errorf("WriteAt to a read-only mapping: %d, %v", n, err)
	}
	if i := firstDiff(ro.Bytes(), want); i >= 0 {
		return fmt.Errorf("the refused write changed the contents at %d", i)
	}
	// The kernel refuses as well, and says so.
	var pipe [2]int
	if err := unix.Pipe(pipe[:]); err != nil {
		return err
	}
	unix.Write(pipe[1], []byte("x"))
	if _, err := unix.Read(pipe[0], ro.Bytes()[:1]); !errors.Is(err, unix.EFAULT) {
		return fmt.Errorf("read(2) into a read-only mapping: %v", err)
	}
	return firstOf(ro.Close(), o.Close())
}
