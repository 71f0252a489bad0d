package vm

import (
	"errors"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/vm/page"
	"machpager/uffd"
)

// This file holds every ioctl that gives access to a page: COPY, CONTINUE, un-protect. They run only while the caller owns the pages: Requested, or Clean
// or Dirty with Busy. What they meet:
//
//	EAGAIN       an event of the task is unread, or a multi-page COPY stopped at a present page: drain, go on behind what was done
//	EEXIST       COPY: the file has a page there, foreign or a remainder of a punch: overwritten with pwrite, then CONTINUE
//	             CONTINUE: mapped already: nothing to do (un-protected for a write)
//	EFAULT       CONTINUE: the file has no page there: somebody punched it
//	ENOMEM, ENOSPC  no frame although one was reserved: transient, or somebody else's page; deferred, and looked into
//	ENOENT, ESRCH, EBADF, anything else  the mapping is not there any more, or not as it was: nothing can be given to it

// errnoOf is the kernel's answer in err.
func errnoOf(err error) unix.Errno {
	var e unix.Errno
	if err == nil || !errors.As(err, &e) {
		return 0
	}
	return e
}

// fill gives the pages [a, b) their contents: zeros if data is nil. All are Requested, owned by the caller, and have frames reserved. The first mapping to see them is
// r's; afterwards none is Requested any more. stored tells the kind of fault for the statistics.
func (o *Object) fill(r *request, a, b int64, data []byte, precious bool) {
	m := r.m
	if !m.gate.enter() {
		o.abandon(a, b) // its threads are gone; others that wait ask for themselves
		return
	}
	defer m.gate.leave()
	need := int64(-1)
	if a <= r.need && r.need < b {
		need = r.need
	}
	toWrite := r.write && need >= 0 && o.freeze.TryRLock() // in a snapshot: filled for reading, and the write waits
	if toWrite {
		defer o.freeze.RUnlock()
	}
	if toWrite && data == nil && (b-a == 1 || r.stream) {
		o.fillZeros(r, a, b)
		return
	}
	m.account(need, b-a, data != nil)
	failpoint.Here("install.begin")
	bytes, errno := o.place(m, a, b, data, need >= 0 && b-a == 1 && !toWrite && !m.readOnly, uffd.CopyWP, r.mark)
	failpoint.Here("install.copied")
	done := bytes >> o.shift
	if m.readOnly && done > 0 {
		r.mark.cont(m, a, a+done, false)
	}
	if r.heal { // other mappings may have the page poisoned: CONTINUE heals them too
		for _, x := range *o.maps.Load() {
			if x != m && x.gate.enter() {
				x.cont(a, a+done, !x.readOnly)
				x.gate.leave()
			}
		}
	}
	if done > 0 {
		o.filledIn(r, a, a+done, need)
	}
	read, write := page.SupplyRead, page.SupplyWrite
	if precious {
		read, write = page.SupplyPrec, page.SupplyPrecWr
	}
	mid := a + done
	if toWrite && need < mid {
		o.finishRun(a, need, read)
		o.finish(need, write) // Dirty before writable
		failpoint.Here("install.dirty")
		m.unprotect(need) // wakes
		failpoint.Here("install.unprotected")
		o.end(need, page.Granted)
		o.finishRun(need+1, mid, read)
	} else {
		o.finishRun(a, mid, read)
		if need >= 0 && need < mid && b-a > 1 {
			m.wake(need, need+1)
		}
	}
	failpoint.Here("install.done")
	m.accounted(r, need, mid, b, data != nil)
	switch {
	case mid == b:
	case errno == unix.ENOENT && need > mid: // the mapping has a hole before need
		o.abandon(mid, need)
		o.abandon(need+1, b)
		if data != nil {
			data = data[(need-a)<<o.shift:][:o.pageSize]
		}
		o.fill(r, need, need+1, data, precious)
	default:
		o.abandon(mid, b)
		o.again(r, need, mid, errno)
	}
}

// fillZeros gives the pages [a, b) zeros for a write: one page, or the run ahead of a stream of writes, which will be written too, and if not, zeros are stored as nothing.
// Here the words become Dirty first, and then one ioctl makes the pages present and writable. A pager that dies in between leaves pages that are Dirty and
// not there: they read as zeros, which is what they are. (Contents other than zeros would be lost that way: they take two ioctls, see fill.)
func (o *Object) fillZeros(r *request, a, b int64) {
	m := r.m
	o.filledIn(r, a, b, r.need)
	for p := a; p < b; p++ {
		o.finish(p, page.SupplyWrite)
	}
	m.account(r.need, b-a, false)
	failpoint.Here("install.zeros-dirty")
	bytes, errno := o.place(m, a, b, nil, true, 0, mark{})
	failpoint.Here("install.zeros-copied")
	mid := a + (bytes+o.pageSize-1)>>o.shift  // of the last page a part may be there, and written to already: the rest follows when it is touched
	if r.need > mid && errno == unix.ENOENT { // the mapping has a hole before need
		o.finishRun(a, mid, page.Granted)
		o.lose(mid, r.need)
		o.lose(r.need+1, b)
		m.accounted(r, -1, mid+1, b, false)
		a, b = r.need, r.need+1
		bytes, errno = o.place(m, a, b, nil, true, 0, mark{})
		mid = a + (bytes+o.pageSize-1)>>o.shift
	}
	if a <= r.need && r.need < mid && (b-a > 1 || errno != 0) {
		m.wake(a, mid)
	}
	o.finishRun(a, mid, page.Granted)
	m.accounted(r, r.need, mid, b, false)
	if mid < b {
		o.lose(mid, b)
		o.again(r, r.need, mid, errno)
	}
}

// lose gives up pages that are Dirty and Busy, owned by the caller, and of which nothing could be put into the file.
func (o *Object) lose(a, b int64) {
	o.vm.policy.Forget(o.frameRun(a, b))
	o.release(b - a)
	o.finishRun(a, b, page.Lost)
}

// again is for a thread whose page need could not be filled, if it is not before mid.
func (o *Object) again(r *request, need, mid int64, errno unix.Errno) {
	m := r.m
	refused := errno == unix.ENOMEM || errno == unix.ENOSPC
	if refused {
		o.vm.noFrame()
	}
	switch {
	case need < mid:
	case refused:
		o.vm.deferFault(m, need, r.f)
	default:
		m.wake(need, need+1) // it faults again where it is now
	}
}

// noFrame notes that the kernel had no frame though one was reserved: the page-out daemon looks for frames that nobody accounts for.
func (v *VM) noFrame() {
	v.counters.noMemory.Add(1)
	v.refused.Store(true)
	v.kickNow()
}

// filledIn tells who must know that the pages [a, b) are resident now, before anybody can evict them.
func (o *Object) filledIn(r *request, a, b, need int64) {
	unit, frame := int64(o.framesOf(1)), int64(-1)
	if o.isExtent(a, b) {
		unit = extentSize / frameSize
	}
	if a <= need && need < b {
		frame = need << o.shift / frameSize
		o.vm.token.got(r.m.task, r.f.tid, o, need)
		o.used(need)
	}
	o.vm.policy.Fill(o.frameRun(a, b), unit, frame)
}

// isExtent reports whether the pages [a, b) are filled as one folio.
func (o *Object) isExtent(a, b int64) bool {
	return (b-a)<<o.shift == extentSize && a<<o.shift%extentSize == 0 && o.vm.frames.Extents()
}

// abandon gives up pages that could not be filled.
func (o *Object) abandon(a, b int64) {
	o.release(b - a)
	o.finishRun(a, b, page.Abandon)
}

// place puts contents into the file and entries into m, write-protected if mode says so, or, for a read-only mapping, into the vm's own. It returns how many bytes it
// did. wake: threads that wait are woken by the same ioctl. k is left out of the entries of a whole extent.
func (o *Object) place(m *Mapping, a, b int64, data []byte, wake bool, mode uffd.CopyMode, k mark) (int64, unix.Errno) {
	if m.readOnly {
		own, err := o.ownMapping()
		if err != nil {
			o.vm.log.Error("fill for a read-only mapping", "object", o.id, "err", err)
			return 0, errnoOf(err)
		}
		m, k = own, mark{}
	}
	if o.isExtent(a, b) {
		return o.placeExtent(m, a, b, data, mode&uffd.CopyWP != 0, k)
	}
	if !wake {
		mode |= uffd.CopyDontWake
	}
	bytes, errno := int64(0), unix.Errno(0)
	m.each(a, b, func(addr uint64, off, n int64) bool {
		if off != a<<o.shift+bytes {
			errno = unix.ENOENT // a hole in the mapping
			return false
		}
		var did int64
		did, errno = o.copyTo(m, addr, off, o.piece(data, off-a<<o.shift, n), mode, false)
		bytes += did
		return errno == 0
	})
	return bytes, errno
}

// piece is n bytes of data, or of zeros.
func (o *Object) piece(data []byte, off, n int64) []byte {
	if data == nil {
		return o.vm.zero[:n]
	}
	return data[off : off+n]
}

// copyTo is UFFDIO_COPY over what comes in its way: what is in the file already is overwritten, or left if keep says so. It returns the bytes done.
func (o *Object) copyTo(m *Mapping, addr uint64, off int64, data []byte, mode uffd.CopyMode, keep bool) (int64, unix.Errno) {
	done, total := int64(0), int64(len(data))
	most := total // a range that meets the end of one of the kernel's areas is refused as a whole: then smaller ones
	for done < total {
		n, err := m.fd.Copy(addr+uint64(done), data[done:min(done+most, total)], mode)
		if n > 0 {
			done += n
		}
		if err == nil {
			continue
		}
		switch e := errnoOf(err); e {
		case unix.EAGAIN:
			if n <= 0 && !m.again(addr+uint64(done), off+done) {
				return done, unix.ENOENT
			}
		case unix.ENOENT:
			if most <= frameSize {
				return done, e
			}
			most = frameSize
		case unix.EEXIST: // foreign, or what a punch left: never "done"
			if keep {
				done += frameSize
				continue
			}
			o.overlay(off + done)
			if _, err := o.file.WriteAt(data[done:done+frameSize], off+done); err != nil {
				return done, errnoOf(err)
			}
			failpoint.Here("install.overwritten")
			if e := m.contBytes(addr+uint64(done), off+done, frameSize, uffd.ContinueMode(mode)); e != 0 && e != unix.EEXIST {
				return done, e
			}
			done += frameSize
		default:
			return done, e
		}
	}
	return done, 0
}

// overlay counts a frame that lay in the file at off under a page of ours. If it was one of those that a punch left there, it is accounted for twice now.
func (o *Object) overlay(off int64) {
	o.vm.counters.foreign.Add(1)
	p := off >> o.shift
	o.unstick(p, p+1, 1)
}

// placeExtent fills a whole aligned extent: one folio by pwrite, then CONTINUE. The caller owns all of it, so nothing of ours lies under the pwrite.
func (o *Object) placeExtent(m *Mapping, a, b int64, data []byte, wp bool, k mark) (int64, unix.Errno) {
	n, err := o.file.WriteAt(o.piece(data, 0, extentSize), a<<o.shift)
	bytes := int64(n) &^ (o.pageSize - 1)
	done := bytes >> o.shift
	failpoint.Here("install.extent-written")
	o.unstick(a, a+done, int64(o.framesOf(1))) // what was stuck there is part of it
	if done > 0 {
		k.cont(m, a, a+done, wp) // whatever it says, it is in the file and ours: a MINOR fault will tell
	}
	o.vm.counters.extents.Add(1)
	return bytes, errnoOf(err)
}

// cont maps pages [a, b), which are in the file, into m, without access to write if wp (a read-only mapping has none anyway), and wakes. It
// goes on behind errors and returns the most telling one: EFAULT (not in the file) before others, EEXIST (mapped already) last.
func (m *Mapping) cont(a, b int64, wp bool) unix.Errno {
	mode := uffd.ContinueMode(0)
	if wp && !m.readOnly {
		mode = uffd.ContinueWP
	}
	worst := unix.Errno(0)
	m.each(a, b, func(addr uint64, off, n int64) bool {
		e := m.contBytes(addr, off, n, mode)
		if e != 0 && (worst == 0 || worst == unix.EEXIST || e == unix.EFAULT) {
			worst = e
		}
		return true
	})
	return worst
}

func (m *Mapping) contBytes(addr uint64, off, n int64, mode uffd.ContinueMode) unix.Errno {
	worst := unix.Errno(0)
	most := n // as in copyTo
	for n > 0 {
		did, err := m.fd.Continue(addr, uint64(min(n, most)), mode)
		if did > 0 {
			addr, off, n = addr+uint64(did), off+did, n-did
		}
		if err == nil {
			continue
		}
		e := errnoOf(err)
		switch e {
		case unix.EAGAIN:
			if did <= 0 && !m.again(addr, off) {
				return unix.ENOENT
			}
			continue
		case unix.ENOENT:
			if most > frameSize {
				most = frameSize
				continue
			}
			if worst != unix.EFAULT {
				worst = e
			}
		case unix.EEXIST:
			if worst == 0 {
				worst = e
			}
			m.fd.Wake(addr, frameSize)
		case unix.EFAULT:
			worst = e
		default: // ESRCH: not there any more
			return e
		}
		addr, off, n = addr+frameSize, off+frameSize, n-frameSize
	}
	return worst
}

// unprotect gives access to write to page p, which the caller owns and which is Dirty, and wakes.
func (m *Mapping) unprotect(p int64) { m.unprotectRun(p, p+1) }

func (m *Mapping) unprotectRun(a, b int64) {
	if m.readOnly {
		m.wake(a, b)
		return
	}
	m.each(a, b, func(addr uint64, off, n int64) bool {
		m.writeProtect(addr, off, n, 0)
		return true
	})
}

// writeProtect is UFFDIO_WRITEPROTECT over what comes in its way. A range that meets another VMA stops there with ENOENT and leaves the rest as it
// was: then it is repeated page by page. An error says that not all of it is there any more.
func (m *Mapping) writeProtect(addr uint64, off, n int64, mode uffd.WriteProtectMode) unix.Errno {
	for {
		switch e := errnoOf(m.fd.WriteProtect(addr, uint64(n), mode)); {
		case e == 0:
			return 0
		case e == unix.EAGAIN:
			if !m.again(addr, off) {
				return unix.ENOENT
			}
			continue
		case e == unix.ENOENT && n > frameSize:
			e = 0
			for i := int64(0); i < n; i += frameSize {
				e = max(e, m.writeProtect(addr+uint64(i), off+i, frameSize, mode))
			}
			return e
		default:
			if mode&uffd.WriteProtectWP == 0 {
				m.fd.Wake(addr, uint64(n))
			}
			return e
		}
	}
}

// protect takes access to write away from the pages [a, b) in m: when it returns, their contents change no more through m.
func (m *Mapping) protect(a, b int64) {
	if m.readOnly || m.task == nil {
		return
	}
	for {
		spans, all := m.spans.Load(), true
		m.each(a, b, func(addr uint64, off, n int64) bool {
			all = m.writeProtect(addr, off, n, uffd.WriteProtectWP) == 0 && all
			return true
		})
		if !all { // it may have moved, with its entries as they were, and whoever has read the event may be about to say where to
			m.task.drain(nil, false)
		}
		if m.spans.Load() == spans {
			return
		}
	}
}

// wake makes the threads that wait on pages [a, b) of m fault again.
func (m *Mapping) wake(a, b int64) {
	m.each(a, b, func(addr uint64, _, n int64) bool {
		m.fd.Wake(addr, uint64(n))
		return true
	})
}

// poison makes every access to page p through m end in SIGBUS or EFAULT, until COPY or CONTINUE heals it or the task drops it. It fails on whatever
// has an entry, also on the marker that protection leaves behind: that is taken away first. The caller owns the page, or it is in Error.
func (m *Mapping) poison(p int64) {
	m.each(p, p+1, func(addr uint64, off, n int64) bool {
		for end := addr + uint64(n); addr < end; addr, off = addr+frameSize, off+frameSize {
			for try := 0; ; try++ {
				_, err := m.fd.Poison(addr, frameSize, 0)
				e := errnoOf(err)
				if e == unix.EAGAIN && m.again(addr, off) {
					continue
				}
				if e == unix.EEXIST && try == 0 && !m.readOnly {
					m.writeProtect(addr, off, frameSize, uffd.WriteProtectDontWake)
					continue
				}
				if e != 0 {
					m.fd.Wake(addr, frameSize)
				}
				break
			}
		}
		return true
	})
}
