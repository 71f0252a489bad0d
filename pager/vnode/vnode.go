// Package vnode is the memory manager of objects whose contents are elsewhere already: in a file, or behind an io.ReaderAt and io.WriterAt. Mach's name for
// it is the vnode pager.
//
// A [Pager] manages one object. Its pages come on demand, a request of several pages by one read; what was changed goes back by one write for each
// run of pages that is returned: at page-out, at Sync, and when the object ends. A return is completed when the write has returned; a Synchronize when the
// contents are on stable storage as well.
//
// # Crashes
//
// Nothing but the contents themselves outlives a Pager. When its process is killed, the vm still has every page whose return was not completed, dirty, and returns it to the
// next Pager over the same file; so a write that was cut short is made again. When the vm and its frames are lost as well, what was synchronised is in the file, and of other pages
// the old contents or the new. When the machine dies, that holds for what was synchronised; a page that was being written to the device then may be
// torn, half of it old and half new, where the device does not write 4096 bytes as one. A plain file ([File]) cannot tell: there is no place for a checksum in it, and none is kept beside it, for it would have to be on the
// device before each write. A file of a format of its own can: that of [Checked] (package checked) has for each page a checksum and two places, so that what was synchronised is never
// written over; it is there after the death of the machine, and what the device loses of it later is an error. Paging space (package store) has checksums for every slot.
//
// # Ends
//
// An object ends where its contents do, mostly within a page. What the last page has beyond the end reads as zeros and is never written. For a file see
// [File]; for others the end is the size they are made with, and a page that lies beyond is a memory failure.
//
// # Errors
//
// A read that fails, or comes short, is emm.MemoryError on the pages it was for: the next touch asks again, and so does the vm. If the page that a
// thread waits for lies behind the one that failed, it is read by itself. A write that fails leaves the pages resident and dirty. An error
// that has an emm.KernReturn in it is passed on as that. A panic in a ReadAt or WriteAt is such an error, and so is runtime.Goexit there, or a memory fault in
// a mapped file. One error in ten seconds is logged.
//
// # Who runs what
//
// The methods of emm.Manager only queue; but a short read of a file that is in the page cache is answered at once (preadv2(2) with RWF_NOWAIT, which does not wait
// for I/O): another thread would take many times as long to wake as the bytes take to copy. Reads and writes run in goroutines of the Pager's own, at most Options.Workers, started when there is work:
// first reads that a thread waits for, then writes, then reads ahead; one worker is kept from writing. Synchronisations that come together are
// one call. Pager.mu is a leaf: no call of the control, nor one of the contents, is made under it.
package vnode

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
)

// DefaultWorkers is how many reads and writes run at once, unless Options say otherwise.
const DefaultWorkers = 8

// maxCluster is the largest request that a Pager takes, in bytes: the vm's limit.
const maxCluster = 2 << 20

// Options of a Pager. nil and zero values mean the defaults.
type Options struct {
	Workers int          // reads and writes at once; 0: DefaultWorkers
	Log     *slog.Logger // nil: slog.Default, whose text a spawned pager hands to its parent's log

	// For File: OnLost is called when Sync fails for the first time, before that is told. The kernel will not tell it again, so who hands the file to another File after a crash says so
	// with Lost, and Sync fails there from the beginning.
	OnLost func()
	Lost   bool
}

// Pager is the manager of one object. It holds what it was made of until Close.
type Pager struct {
	contents contents     // immutable
	peeker   peeker       // immutable; the same contents, or nil
	writable bool         // immutable
	workers  int          // immutable
	log      *slog.Logger // immutable
	warned   atomic.Int64 // when an error was logged last, in ns since 1970

	mu      sync.Mutex
	now     *attachment // guarded by mu; nil: no vm has the object
	urgent  []task      // guarded by mu; reads that a thread waits for
	writes  []task      // guarded by mu
	ahead   []task      // guarded by mu; reads that nobody waits for
	running int         // guarded by mu; workers
	writing int         // guarded by mu; of them
	syncs   []task      // guarded by mu
	syncing bool        // guarded by mu; a goroutine does the syncs
	closed  bool        // guarded by mu
	ended   bool        // guarded by mu; contents were closed
}

var (
	_ emm.Manager      = (*Pager)(nil)
	_ emm.Synchronizer = (*Pager)(nil)
	_ io.Closer        = (*Pager)(nil)
)

// contents is what is behind an object. Its methods are called from any number of goroutines, for ranges that do not overlap where one of them writes.
type contents interface {
	// limit is where the contents end, in bytes; no byte beyond is read or written.
	limit() int64
	// read fills p from off on and returns how many bytes it did. Less than all with no error: what follows is zeros.
	read(p []byte, off int64) (int, error)
	// write keeps p for off, all of it or an error.
	write(p []byte, off int64) error
	// sync makes safe what was written.
	sync() error
	close() error
}

// peeker is contents of which a part can be had without waiting, if it is in the kernel's memory.
type peeker interface {
	// peek fills all of p that is not beyond limit, or reports false and has done nothing.
	peek(p []byte, off int64) bool
}

func newPager(c contents, writable bool, o *Options) *Pager {
	if o == nil {
		o = &Options{}
	}
	peek, _ := c.(peeker)
	p := &Pager{contents: c, peeker: peek, writable: writable, workers: o.Workers, log: o.Log}
	if p.workers <= 0 {
		p.workers = DefaultWorkers
	}
	if p.log == nil {
		p.log = slog.Default()
	}
	return p
}

// ReaderAt makes a manager of r: its bytes up to size, read-only. Only read-only mappings can be made of the object. A ReadAt must give all it is asked for, which never
// goes beyond size; io.EOF before is an error. If r is an io.Closer, it is closed after the object's end.
func ReaderAt(r io.ReaderAt, size int64, o *Options) *Pager {
	return newPager(&readWriter{r: r, size: size}, false, o)
}

// ReadWriterAt is what ReaderWriterAt needs.
type ReadWriterAt interface {
	io.ReaderAt
	io.WriterAt
}

// ReaderWriterAt is ReaderAt for contents that can be written. sync is called when the object is to be safe, after the writes it is for, and one call at a
// time; nil: a WriteAt that has returned is safe.
func ReaderWriterAt(rw ReadWriterAt, size int64, sync func() error, o *Options) *Pager {
	return newPager(&readWriter{r: rw, w: rw, flush: sync, size: size}, true, o)
}

// MaxProtection says which mappings can be made of the object.
func (p *Pager) MaxProtection() emm.Prot {
	if p.writable {
		return emm.ProtRead | emm.ProtWrite
	}
	return emm.ProtRead
}

// Close lets go of what the Pager was made of: at once, or when the last read or write under way has returned. It waits for none, for they may never
// return. After Terminate.
func (p *Pager) Close() error {
	p.mu.Lock()
	p.closed = true
	p.urgent, p.ahead = nil, nil
	end := p.end()
	p.mu.Unlock()
	if !end {
		return nil
	}
	return p.closeContents()
}

// end reports, once, that the contents are to be closed. Called with mu.
func (p *Pager) end() bool {
	if !p.closed || p.ended || p.running > 0 || p.syncing {
		return false
	}
	p.ended = true
	return true
}

func (p *Pager) closeContents() error {
	if err := contain(p.contents.close); err != nil {
		return fmt.Errorf("close contents of object: %w", err)
	}
	return nil
}

// warnEvery is how often errors are logged at most.
const warnEvery = 10 * time.Second

// note logs an error, if there is one and none was logged lately.
func (p *Pager) note(what string, r emm.Run, err error) {
	if err == nil {
		return
	}
	now, last := time.Now().UnixNano(), p.warned.Load()
	if now-last >= int64(warnEvery) && p.warned.CompareAndSwap(last, now) {
		p.log.Warn(what, "off", r.Off, "size", r.Size, "err", err)
	}
}

// reason is what the vm is told about an error.
func reason(err error) emm.KernReturn {
	var kr emm.KernReturn
	switch {
	case errors.As(err, &kr) && kr.Err() != nil:
		return kr
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return emm.NoSpace
	}
	return emm.MemoryError
}
