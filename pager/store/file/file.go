// Package file is a store that keeps slots in an unlinked file: nobody else can open it, and it is gone with its last descriptor.
//
// Slot s is the bytes from (s-1)*4096. The CRC-32C of each is kept in memory, four bytes by slot, so that what comes back from the disk is
// checked against something that was not there. I/O is done by a bounded number of workers, never on the caller's goroutine; operations somebody waits
// for go before prefetches. Short transfers and interrupted calls go on where they stopped; a file that ends too early is an error.
//
// A restarted pager gives New the same file (Options.File) and the same memory of checksums, and calls Rebuild.
//
// # Locks
//
// Store.mu (queues) and growMu (the memory of checksums) are leaves.
package file

import (
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
)

// Options of a file store. nil or zero values are the defaults.
type Options struct {
	// Dir is where the file is made. "": os.TempDir().
	Dir string
	// File is taken over instead of making one. It becomes the store's.
	File *os.File
	// Sums is the memory of checksums. It becomes the store's. nil: anonymous memory, which ends with the process.
	Sums store.Memory
	// Capacity is how many bytes of contents may be stored, rounded down to slots. 0: what the file system has.
	Capacity int64
	// Slack is how many bytes of freed slots may keep their place in the file. 0: 64 MiB. Negative: none.
	Slack int64
	// Preallocate takes the file system's space for all of Capacity, which must be given, when the file is made, and keeps it. Then no write fails
	// for lack of space on the file system. false: the file grows and shrinks.
	Preallocate bool
	// Workers is how many operations run at once. 0: 4.
	Workers int
}

// Store is a store in a file.
type Store struct {
	file  *os.File     // immutable
	io    transfer     // immutable
	sums  store.Memory // grown under growMu
	alloc *store.Allocator
	slack uint64 // immutable; slots

	growMu sync.Mutex
	table  atomic.Pointer[[]byte] // all of sums; replaced under growMu

	trim      atomic.Bool   // a trim is wanted or under way
	scattered atomic.Uint64 // so many free slots are backed that a trim leaves
	timer     *time.Timer   // immutable; runs trimDue
	workers   sync.WaitGroup
	mu        sync.Mutex
	more      sync.Cond     // with mu; something is queued, or closed
	demand    store.Queue   // guarded by mu
	ahead     store.Queue   // guarded by mu; prefetches
	trims     bool          // guarded by mu; a worker is to trim
	closed    bool          // guarded by mu
	done      chan struct{} // closed when the file is
	err       error         // of closing it; written before done is closed
}

var _ store.Store = (*Store)(nil)

// transfer is the two system calls, so that tests can make them fail.
type transfer interface {
	pread(b []byte, off int64) (int, error)
	pwrite(b []byte, off int64) (int, error)
}

type descriptor int

func (fd descriptor) pread(b []byte, off int64) (int, error) {
	if err := failpoint.Fail("file.pread"); err != nil {
		return 0, err
	}
	return unix.Pread(int(fd), b, off)
}

func (fd descriptor) pwrite(b []byte, off int64) (int, error) {
	if err := failpoint.Fail("file.pwrite"); err != nil {
		return 0, err
	}
	return unix.Pwrite(int(fd), b, off)
}

// New makes a file store, or takes one over.
func New(o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	if o.Capacity < 0 || o.Capacity > 0 && o.Capacity < store.SlotSize {
		return nil, fmt.Errorf("make file store: capacity of %d bytes: need at least one slot of %d: %w", o.Capacity, store.SlotSize, unix.EINVAL)
	}
	if o.Preallocate && o.Capacity == 0 {
		return nil, fmt.Errorf("make file store: preallocate what: no capacity given: %w", unix.EINVAL)
	}
	sums, f := o.Sums, o.File
	var err error
	if sums == nil {
		if sums, err = store.NewAnonymous(0); err != nil {
			return nil, fmt.Errorf("make file store: checksums: %w", err)
		}
	}
	if f == nil {
		if f, err = create(o.Dir); err != nil {
			sums.Close()
			return nil, fmt.Errorf("make file store: %w", err)
		}
	}
	if o.Preallocate {
		if err = allocate(f, o.Capacity/store.SlotSize*store.SlotSize); err != nil {
			if o.File == nil {
				f.Close()
			}
			if o.Sums == nil {
				sums.Close()
			}
			return nil, fmt.Errorf("make file store: preallocate %d bytes: %w (make room on the file system, or name another directory)", o.Capacity, err)
		}
	}
	return start(o, f, sums, descriptor(f.Fd())), nil
}

// start runs a store on its parts.
func start(o *Options, f *os.File, sums store.Memory, t transfer) *Store {
	slack, workers := o.Slack, o.Workers
	switch {
	case slack == 0:
		slack = 64 << 20
	case slack < 0:
		slack = 0
	}
	if o.Preallocate {
		slack = o.Capacity
	}
	if workers <= 0 {
		workers = 4
	}
	s := &Store{file: f, io: t, sums: sums, alloc: store.NewAllocator(uint64(o.Capacity / store.SlotSize)), slack: uint64(slack / store.SlotSize)}
	s.more.L = &s.mu
	s.done = make(chan struct{})
	s.timer = time.AfterFunc(time.Hour, s.trimDue)
	s.timer.Stop()
	b := sums.Bytes()
	s.table.Store(&b)
	for range workers {
		s.workers.Go(s.work)
	}
	return s
}

// create makes a file without a name: by O_TMPFILE, or where the file system lacks that by unlinking it.
func create(dir string) (*os.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC|unix.O_EXCL, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), filepath.Join(dir, "(paging file)")), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("create paging file in %s: %w (name another directory)", dir, err)
	}
	f, err := os.CreateTemp(dir, "paging.*")
	if err != nil {
		return nil, fmt.Errorf("create paging file: %w (name another directory)", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("unlink paging file: %w", err)
	}
	return f, nil
}

// allocate takes space for the first size bytes of f. What is there already stays.
func allocate(f *os.File, size int64) error {
	for {
		if err := unix.Fallocate(int(f.Fd()), 0, 0, size); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// File is the paging file, for who keeps it for a restarted pager. It stays the store's.
func (s *Store) File() *os.File { return s.file }

// Read queues a read.
func (s *Store) Read(op *store.Op) { s.submit(op, false) }

// Write queues a write.
func (s *Store) Write(op *store.Op) { s.submit(op, true) }

// View lends nothing: the contents are in a file.
func (s *Store) View(store.Slot, int) ([]byte, error) { return nil, nil }

// submit checks an operation and queues it.
func (s *Store) submit(op *store.Op, write bool) {
	if len(op.Data) == 0 || len(op.Data)%store.SlotSize != 0 || op.Slot == store.None || op.Slot > store.MaxSlot || s.sumsOf(op) == nil {
		op.Finish(0, fmt.Errorf("access slot %d, %d bytes: beyond the store, or no whole number of slots: %w", op.Slot, len(op.Data), unix.EINVAL))
		return
	}
	op.SetWrite(write)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		op.Finish(0, fmt.Errorf("access slot %d: %w", op.Slot, store.ErrClosed))
		return
	}
	if op.Prefetch {
		s.ahead.Push(op)
	} else {
		s.demand.Push(op)
	}
	s.mu.Unlock()
	s.more.Signal()
}

// sumsOf is where the checksums of an operation's slots are, or nil if the store does not reach that far.
func (s *Store) sumsOf(op *store.Op) []byte {
	t := *s.table.Load()
	off := int64(op.Slot-1) * 4
	end := off + int64(op.Slots())*4
	if end > int64(len(t)) {
		return nil
	}
	return t[off:end]
}

// work is a worker: it serves until the store is closed and nothing is queued.
func (s *Store) work() {
	for {
		s.mu.Lock()
		var op *store.Op
		for {
			if op = s.demand.Pop(); op == nil {
				op = s.ahead.Pop()
			}
			if op != nil || s.trims || s.closed {
				break
			}
			s.more.Wait()
		}
		trims := op == nil && s.trims
		if trims {
			s.trims = false
		}
		s.mu.Unlock()
		switch {
		case trims:
			s.trimNow()
		case op == nil:
			return
		case op.IsWrite():
			op.Finish(s.write(op))
		default:
			op.Finish(s.read(op))
		}
	}
}

func offset(s store.Slot) int64 { return int64(s-1) * store.SlotSize }

func (s *Store) read(op *store.Op) (good int, err error) {
	n, err := full(s.io.pread, op.Data, offset(op.Slot), io.ErrUnexpectedEOF)
	whole := n / store.SlotSize
	good, bad := store.CheckSums(s.sumsOf(op), op.Data[:whole*store.SlotSize], op.Slot)
	if bad != nil {
		return good, fmt.Errorf("read paging file: %w", bad)
	}
	if err != nil {
		return good, fmt.Errorf("read paging file: slot %d: %w", op.Slot+store.Slot(good), err)
	}
	return good, nil
}

func (s *Store) write(op *store.Op) (good int, err error) {
	failpoint.Here("file.write")
	store.PutSums(s.sumsOf(op), op.Data)
	failpoint.Here("file.summed")
	n, err := full(s.io.pwrite, op.Data, offset(op.Slot), io.ErrShortWrite)
	failpoint.Here("file.written")
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, unix.EFBIG):
		err = fmt.Errorf("write paging file: %w: %w", store.ErrNoSpace, err)
	case err != nil:
		err = fmt.Errorf("write paging file: slot %d: %w", op.Slot+store.Slot(n/store.SlotSize), err)
	}
	return n / store.SlotSize, err
}

// full repeats a transfer until all of b went. nothing is the error for a transfer of nothing.
func full(call func([]byte, int64) (int, error), b []byte, off int64, nothing error) (n int, err error) {
	for n < len(b) {
		m, err := call(b[n:], off+int64(n))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return n, err
		case m <= 0:
			return n, nothing
		}
		n += m
	}
	return n, nil
}

// Alloc takes slots, and room for their checksums.
func (s *Store) Alloc(n, unit int) (store.Slot, int, error) {
	if s.isClosed() {
		return store.None, 0, fmt.Errorf("allocate %d slots: %w", n, store.ErrClosed)
	}
	return s.alloc.AllocReaching(n, unit, s.reach)
}

// reach makes the memory of checksums reach to the group of slot last.
func (s *Store) reach(last store.Slot) error {
	if int64(last)*4 <= int64(len(*s.table.Load())) {
		return nil
	}
	s.growMu.Lock()
	defer s.growMu.Unlock()
	groups := int64(last-1)/store.GroupSlots + 1
	if err := s.sums.Grow(groups * store.GroupSlots * 4); err != nil {
		return err
	}
	failpoint.Here("file.grown")
	b := s.sums.Bytes()
	s.table.Store(&b)
	return nil
}

// Free gives slots back. A worker gives their place in the file back, when it is more than the slack.
func (s *Store) Free(slot store.Slot, n int) {
	s.alloc.Free(slot, n, true)
	s.trimLater()
}

// A punch writes back what is dirty in its range, and locks the file against all reads and writes meanwhile: so there are few at a time, and they are of many slots. What lies between is not lost: it is the
// first to be allocated again.
const (
	punchLeast = 32                     // slots; a shorter run keeps its place, unless the slack is next to nothing
	punchMost  = 16                     // punches at once
	punchEvery = 100 * time.Millisecond // unless there is no slack
)

// trimLater has a worker trim in a while, if there is what to.
func (s *Store) trimLater() {
	if _, _, backed := s.alloc.Counts(); backed <= max(s.slack, s.scattered.Load()) || s.trim.Swap(true) {
		return
	}
	if s.slack > 0 {
		s.timer.Reset(punchEvery)
	} else {
		s.trimDue()
	}
}

func (s *Store) trimDue() {
	s.mu.Lock()
	s.trims = !s.closed
	s.mu.Unlock()
	s.more.Signal()
}

var errEnough = errors.New("the rest comes later")

// trimNow punches some free slots out of the file. An error (not every file system can) leaves them: they are reused, or punched later.
func (s *Store) trimNow() {
	punches, failed := 0, false
	_, _, before := s.alloc.Counts()
	s.alloc.TrimRuns(s.slack/2, int(min(punchLeast, s.slack/4+1)), func(slot store.Slot, n int) error {
		if punches++; punches > punchMost {
			return errEnough
		}
		failpoint.Here("file.punch")
		defer failpoint.Here("file.punched")
		err := unix.Fallocate(int(s.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset(slot), int64(n)*store.SlotSize)
		failed = err != nil
		return err
	})
	scattered := uint64(0)
	if punches == 0 || failed { // all is in short runs, or cannot be punched: not to be looked at again before there is clearly more
		scattered = before + s.slack/4
	}
	s.scattered.Store(scattered)
	s.trim.Store(false)
	s.trimLater() // also what was freed meanwhile
}

// Rebuild takes over what an earlier store left in the file.
func (s *Store) Rebuild(used iter.Seq2[store.Slot, int]) error {
	st, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("rebuild file store: %w", err)
	}
	high := (st.Size() + store.SlotSize - 1) / store.SlotSize
	var last store.Slot
	err = s.alloc.Reset(uint64(high), func(yield func(store.Slot, int) bool) {
		for slot, n := range used {
			last = max(last, slot+store.Slot(n)-1)
			if !yield(slot, n) {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	if int64(last)*4 > int64(len(*s.table.Load())) {
		return fmt.Errorf("rebuild file store: slot %d has no checksum: %w", last, store.ErrCorrupt)
	}
	s.trimLater()
	return nil
}

// Room is what a store can still take, in bytes.
type Room struct {
	Bound  int64  // what its capacity leaves
	Held   int64  // of the file's place on the file system, what no slot uses
	Device uint64 // the file system
	Avail  int64  // what the file system has free, for all who are on it
}

// Room tells what there is room for.
func (s *Store) Room() Room {
	capacity, used, _ := s.alloc.Counts()
	r := Room{Bound: int64(capacity-used) * store.SlotSize}
	var fs unix.Statfs_t
	var st unix.Stat_t
	if s.isClosed() || unix.Fstatfs(int(s.file.Fd()), &fs) != nil || unix.Fstat(int(s.file.Fd()), &st) != nil {
		r.Avail = r.Bound
		return r
	}
	r.Device, r.Avail = st.Dev, int64(fs.Bavail)*fs.Bsize
	r.Held = max(0, st.Blocks*512-int64(used)*store.SlotSize) // freed slots may have their place still, and new ones none yet
	return r
}

// Info tells what is used, and what the capacity, the file and its file system have room for.
func (s *Store) Info() store.Info {
	_, used, _ := s.alloc.Counts()
	r := s.Room()
	i := store.Info{Used: int64(used) * store.SlotSize, Free: min(r.Bound, r.Held+r.Avail) &^ (store.SlotSize - 1)}
	i.Total = i.Used + i.Free
	return i
}

func (s *Store) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// Close serves what is queued, ends the workers, and closes the file.
func (s *Store) Close() error {
	s.mu.Lock()
	first := !s.closed
	s.closed = true
	s.mu.Unlock()
	s.timer.Stop()
	s.more.Broadcast()
	if first {
		s.workers.Wait()
		if err := errors.Join(s.file.Close(), s.sums.Close()); err != nil {
			s.err = fmt.Errorf("close file store: %w", err)
		}
		close(s.done)
	}
	<-s.done
	return s.err
}
