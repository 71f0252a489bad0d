//go:build linux

package uffd

import (
	"bytes"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCopy answers a read and a write fault on each kind of memory.
func TestCopy(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		want := fill(m.page, 1)

		c := startPeek(m.at(0), m.page)
		nextFault(t, u, 0, m.at(0), m.page)
		c.waits(t)
		done, err := u.Copy(m.at(0), want, 0)
		wantDone(t, "copy", done, err, m.page, nil)
		if !bytes.Equal(c.ok(t), want) {
			t.Error("the reader got something else")
		}

		c = startPoke(m.at(1)+5, []byte("written"))
		nextFault(t, u, FaultWrite, m.at(1), m.page)
		done, err = u.Copy(m.at(1), want, 0)
		wantDone(t, "copy", done, err, m.page, nil)
		c.ok(t)
		after := slices.Clone(want)
		copy(after[5:], "written")
		wantBytes(t, m, 1, after)

		done, err = u.Copy(m.at(1), want, 0)
		wantDone(t, "copy again", done, err, 0, unix.EEXIST)
		wantBytes(t, m, 1, after)
	})
}

// TestCopyPartial meets a page that is there already: the pages before it are done and told.
func TestCopyPartial(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		three := fill(m.page, 3)
		if _, err := u.Copy(m.at(3), three, 0); err != nil {
			t.Fatal(err)
		}
		src := fill(m.size, 9)
		done, err := u.Copy(m.at(0), src, 0)
		wantDone(t, "copy over a page", done, err, 3*m.page, unix.EAGAIN)
		done, err = u.Copy(m.at(3), src[3*m.page:], 0)
		wantDone(t, "copy from the page on", done, err, 0, unix.EEXIST)
		done, err = u.Copy(m.at(4), src[4*m.page:], 0)
		wantDone(t, "copy the rest", done, err, 4*m.page, nil)
		for i := range pages {
			want := src[uint64(i)*m.page:][:m.page]
			if i == 3 {
				want = three
			}
			wantBytes(t, m, i, want)
		}
	})
}

// TestCopyErrors lists what Copy refuses, always with nothing done.
func TestCopyErrors(t *testing.T) {
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	src := fill(m.page, 1)
	for _, c := range []struct {
		what string
		dst  uint64
		src  []byte
		mode CopyMode
		err  error
	}{
		{"part of a page", m.at(0), src[1:], 0, unix.EINVAL},
		{"nothing", m.at(0), nil, 0, unix.EINVAL},
		{"an unaligned address", m.at(0) + 1, src, 0, unix.EINVAL},
		{"an unknown mode", m.at(0), src, 1 << 30, unix.EINVAL},
		{"write-protected, without RegisterWP", m.at(0), src, CopyWP, unix.EINVAL},
		{"nothing registered", m.addr + m.size + 1<<30, src, 0, unix.ENOENT},
		{"past the end", m.at(7), fill(2*m.page, 1), 0, unix.ENOENT},
	} {
		done, err := u.Copy(c.dst, c.src, c.mode)
		wantDone(t, c.what, done, err, 0, c.err)
	}

	// A source that cannot be read: mapped, not accessible.
	hole, err := unix.Mmap(-1, 0, int(m.page), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(hole)
	done, err := u.Copy(m.at(0), hole, 0)
	wantDone(t, "an unreadable source", done, err, 0, unix.EFAULT)
}

// TestCopyUnalignedSource reads from the middle of a buffer.
func TestCopyUnalignedSource(t *testing.T) {
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	src := fill(2*m.page, 1)[77:][:m.page]
	done, err := u.Copy(m.at(0), src, 0)
	wantDone(t, "copy", done, err, m.page, nil)
	wantBytes(t, m, 0, src)
}

// TestCopySourceMoves copies from buffers of short life, on goroutines whose stacks grow, while the collector runs.
func TestCopySourceMoves(t *testing.T) {
	u := open(t, nil)
	const n = 512
	m := memfd.memorySize(t, n*memfd.pageSize())
	register(t, u, m, RegisterMissing)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	}()
	errs := make(chan error, n)
	for i := range n {
		go func() {
			var page [4096]byte
			for j := range page {
				page[j] = byte(i)
			}
			grow(i % 64)
			_, err := u.Copy(m.at(i), page[:], 0)
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	close(stop)
	<-stopped
	for i := range n {
		wantBytes(t, m, i, bytes.Repeat([]byte{byte(i)}, int(m.page)))
	}
}

func grow(n int) byte {
	var pad [256]byte
	if n == 0 {
		return pad[0]
	}
	return grow(n-1) + pad[n]
}

// TestWake resolves without waking, and wakes by itself.
func TestWake(t *testing.T) {
	u := open(t, nil)
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	want := fill(m.page, 1)
	c := startPeek(m.at(0), m.page)
	nextFault(t, u, 0, m.at(0), m.page)
	done, err := u.Copy(m.at(0), want, CopyDontWake)
	wantDone(t, "copy", done, err, m.page, nil)
	c.waits(t)
	if err := u.Wake(m.at(0), m.page); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(c.ok(t), want) {
		t.Error("wrong contents")
	}

	// Nothing resolved: the thread faults again, with a new message.
	c = startPeek(m.at(1), m.page)
	nextFault(t, u, 0, m.at(1), m.page)
	if err := u.Wake(m.addr, m.size); err != nil {
		t.Fatal(err)
	}
	nextFault(t, u, 0, m.at(1), m.page)
	c.waits(t)
	if _, err := u.Zeropage(m.at(1), m.page, ZeropageDontWake); err != nil {
		t.Fatal(err)
	}
	c.waits(t)
	if err := u.Wake(m.at(1), m.page); err != nil {
		t.Fatal(err)
	}
	c.ok(t)
}

// TestZeropage fills with zeros where that is possible.
func TestZeropage(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		u := open(t, nil)
		m := k.memory(t)
		register(t, u, m, RegisterMissing)
		if k.hugetlb {
			done, err := u.Zeropage(m.at(0), m.page, 0)
			wantDone(t, "zeropage on hugetlb", done, err, 0, unix.EINVAL)
			return
		}
		c := startPeek(m.at(0), m.page)
		nextFault(t, u, 0, m.at(0), m.page)
		done, err := u.Zeropage(m.at(0), 2*m.page, 0)
		wantDone(t, "zeropage", done, err, 2*m.page, nil)
		zeros := make([]byte, m.page)
		if !bytes.Equal(c.ok(t), zeros) {
			t.Error("not zeros")
		}
		done, err = u.Zeropage(m.at(0), m.page, 0)
		wantDone(t, "zeropage again", done, err, 0, unix.EEXIST)
		if _, err := u.Copy(m.at(4), fill(m.page, 4), 0); err != nil {
			t.Fatal(err)
		}
		done, err = u.Zeropage(m.at(2), m.size-2*m.page, 0)
		wantDone(t, "zeropage to a page that is there", done, err, 2*m.page, unix.EAGAIN)
		wantBytes(t, m, 3, zeros)
		done, err = u.Zeropage(m.at(5), m.page, 1<<20)
		wantDone(t, "an unknown mode", done, err, 0, unix.EINVAL)
		if err := poke(m.at(0), []byte{7}); err != nil { // the shared page of zeros gives way
			t.Error(err)
		}
		wantBytes(t, m, 1, zeros)
	})
}

// TestReadBatch reads the faults of several threads with one system call.
func TestReadBatch(t *testing.T) {
	u := open(t, &OpenOptions{Features: FeatureThreadID})
	m := memfd.memory(t)
	register(t, u, m, RegisterMissing)
	var touches [pages]*touch
	tids := map[uint32]int{}
	for i := range touches {
		touches[i] = startPeek(m.at(i), 1)
		tids[uint32(touches[i].tid)] = i
	}
	for _, c := range touches {
		c.waits(t)
	}
	msgs := make([]Msg, 2*pages)
	n, err := u.Read(msgs[:3])
	if err != nil || n != 3 {
		t.Fatalf("read %d messages, %v; want 3", n, err)
	}
	rest, err := u.Read(msgs[3:])
	if err != nil || n+rest < pages {
		t.Fatalf("read %d messages more, %v; want %d", rest, err, pages-3)
	}
	seen := map[int]bool{}
	for _, msg := range msgs[:n+rest] {
		i, ok := tids[msg.ThreadID()]
		if !ok || msg.Address() != m.at(i) {
			t.Errorf("%v: thread of page %d", &msg, i)
		}
		seen[i] = true
	}
	if len(seen) != pages {
		t.Errorf("messages of %d threads, want %d", len(seen), pages)
	}
	if n, err := u.Read(nil); n != 0 || err != nil {
		t.Errorf("read into nothing: %d, %v", n, err)
	}
	if _, err := u.Zeropage(m.addr, m.size, 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range touches {
		c.ok(t)
	}
	if n, err := u.Read(msgs); n != 0 || err != nil {
		t.Errorf("read when there is nothing: %d, %v", n, err)
	}
}

// TestExactAddress compares the address with and without the feature; and without THREAD_ID there is no thread.
func TestExactAddress(t *testing.T) {
	need(t, HaveExactAddress())
	for _, f := range []Features{0, FeatureExactAddress | FeatureThreadID} {
		each(t, allKinds, func(t *testing.T, k kind) {
			u := open(t, &OpenOptions{Features: f})
			m := k.memory(t)
			register(t, u, m, RegisterMissing)
			const off = 1234
			c := start(func(c *touch) { _, c.err = pipeFrom(m.at(2) + off) })
			msg := next(t, u)
			wantAddr, wantTid := m.at(2), 0
			if f != 0 {
				wantAddr, wantTid = m.at(2)+off, c.tid
			}
			if msg.Address() != wantAddr || int(msg.ThreadID()) != wantTid {
				t.Errorf("features %v: %v; want %#x by thread %d", f, msg, wantAddr, wantTid)
			}
			if _, err := u.Copy(m.at(2), fill(m.page, 2), 0); err != nil {
				t.Fatal(err)
			}
			c.ok(t)
		})
	}
}

// TestTaskTouches has another process touch its memory with plain loads and stores.
func TestTaskTouches(t *testing.T) {
	each(t, allKinds, func(t *testing.T, k kind) {
		c := startTask(t, k, OpenOptions{Features: FeatureThreadID | FeatureExactAddress}, RegisterMissing)
		u, m := c.uffd, &c.mem
		tid := c.do(t, order{Op: "tid"}).Val

		c.send(t, "load", m.at(1)+99)
		msg := nextFault(t, u, 0, m.at(1), m.page)
		if msg.Address() != m.at(1)+99 || uint64(msg.ThreadID()) != tid {
			t.Errorf("%v; want %#x by thread %d", msg, m.at(1)+99, tid)
		}
		c.waits(t)
		want := fill(m.page, 1)
		done, err := u.Copy(m.at(1), want, 0)
		wantDone(t, "copy into another process", done, err, m.page, nil)
		if r := c.reply(t); r.Val != uint64(want[99]) || r.Sigbus {
			t.Errorf("loaded %+v, want %d", r, want[99])
		}

		c.send(t, "store", m.at(2), 5)
		nextFault(t, u, FaultWrite, m.at(2), m.page)
		if _, err = u.Copy(m.at(2), want, 0); err != nil {
			t.Fatal(err)
		}
		c.reply(t)
		if r := c.do(t, order{Op: "load", Args: [4]uint64{m.at(2)}}); r.Val != 5 {
			t.Errorf("loaded %d after a store of 5", r.Val)
		}

		// When the task is gone, its memory is.
		c.cmd.Process.Kill()
		c.cmd.Wait()
		done, err = u.Copy(m.at(3), want, 0)
		wantDone(t, "copy into a dead process", done, err, 0, unix.ESRCH)
		wantErr(t, "write-protect a dead process", u.WriteProtect(m.at(0), m.page, 0), unix.ESRCH)
	})
}
