package frames

import (
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// punches bounds how often Punch tries. The first retries only yield; the later ones sleep, so that a reader that holds a folio finishes.
const punches, punchYields = 10, 4

// noCachestat is set where cachestat(2) cannot be had, though the minimum kernel has it (6.5): a seccomp filter. Then SEEK_DATA must do, which does
// not see frames that fallocate made and nobody wrote.
var noCachestat atomic.Bool

// Punch takes the pages of [off, off+n) out of the file and verifies it: a punch of part of a large folio can succeed and leave pages, zeroed, in the
// file and charged, while somebody holds the folio. It punches again, a bounded number of times, within 2 ms. left is how many bytes would not
// go; their frames are not to be released. off and n are whole pages. The caller owns the pages: what somebody fills meanwhile goes too, or
// counts as left.
func (f *File) Punch(off, n int64) (left int64, err error) {
	if err := aligned("punch", off, n); err != nil {
		return 0, err
	}
	for try := 1; ; try++ {
		if err := f.punch(off, n); err != nil {
			return 0, err
		}
		if left, err = f.Occupied(off, n); err != nil || left == 0 || try == punches {
			return left, err
		}
		if try <= punchYields {
			runtime.Gosched()
		} else {
			time.Sleep(20 * time.Microsecond << (try - punchYields))
		}
	}
}

func (f *File) punch(off, n int64) error {
	fd, err := f.use("punch")
	if err != nil {
		return err
	}
	defer f.done()
	if n == 0 {
		return nil
	}
	for {
		err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("punch frame file at %d, %d bytes: %w", off, n, err)
		}
	}
}

// Occupied is how many bytes of frames lie in [off, off+n), whole pages. It costs half a microsecond and 35 ns for each of them.
func (f *File) Occupied(off, n int64) (int64, error) {
	if err := aligned("count pages in", off, n); err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, nil // cachestat takes it for "to the end"
	}
	if !noCachestat.Load() {
		got, err := f.cachestat(off, n)
		if !errors.Is(err, errors.ErrUnsupported) {
			return got, err
		}
		noCachestat.Store(true)
	}
	var sum int64
	err := f.seekRuns(off, off+n, func(_, n int64) bool { sum += n; return true })
	return sum, err
}

func (f *File) cachestat(off, n int64) (int64, error) {
	fd, err := f.use("count pages in")
	if err != nil {
		return 0, err
	}
	defer f.done()
	var st unix.Cachestat_t
	err = unix.Cachestat(uint(fd), &unix.CachestatRange{Off: uint64(off), Len: uint64(n)}, &st, 0)
	if errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
		return 0, errors.ErrUnsupported
	}
	if err != nil {
		return 0, fmt.Errorf("count pages in frame file at %d, %d bytes: %w", off, n, err)
	}
	return int64(st.Cache+st.Evicted) * PageSize, nil // evicted: in swap
}

// Present calls fn for every run of pages in [off, off+n) that occupy frames, in order, until it returns false. Whose they are it cannot say.
// Neighbouring runs are one. It finds also what fallocate made and nobody wrote. No lock is held while fn runs.
func (f *File) Present(off, n int64, fn func(off, n int64) bool) error {
	if err := aligned("look for pages in", off, n); err != nil {
		return err
	}
	w := walk{f: f, fn: fn}
	if err := w.present(off, off+n); err != nil {
		return err
	}
	w.flush()
	return nil
}

// walk collects runs.
type walk struct {
	f          *File
	fn         func(off, n int64) bool
	start, end int64 // the run not told yet; empty: none
	stopped    bool
}

func (w *walk) add(start, end int64) {
	if w.end != start || w.start == w.end {
		w.flush()
		w.start = start
	}
	w.end = end
}

func (w *walk) flush() {
	if w.start < w.end && !w.stopped {
		w.stopped = !w.fn(w.start, w.end-w.start)
	}
	w.start, w.end = 0, 0
}

// present takes the runs from SEEK_DATA, which is cheap in large files, and looks between them with cachestat, which sees all.
func (w *walk) present(off, end int64) error {
	got, err := w.f.Occupied(off, end-off)
	if err != nil || got == 0 {
		return err
	}
	if got == end-off { // not a matter of speed alone: SEEK_HOLE would walk past end
		w.add(off, end)
		return nil
	}
	var gapErr error
	err = w.f.seekRuns(off, end, func(start, n int64) bool {
		gapErr = w.gap(off, start)
		w.add(start, start+n)
		off = start + n
		return gapErr == nil && !w.stopped
	})
	if err = errors.Join(err, gapErr); err != nil || w.stopped {
		return err
	}
	return w.gap(off, end)
}

// gap halves a range that SEEK_DATA takes for a hole until every part is empty or full.
func (w *walk) gap(off, end int64) error {
	if off == end || w.stopped || noCachestat.Load() {
		return nil
	}
	got, err := w.f.Occupied(off, end-off)
	if err != nil || got == 0 {
		return err
	}
	if got == end-off {
		w.add(off, end)
		return nil
	}
	mid := off + ((end-off)/2)&^(PageSize-1)
	if mid == off { // one page that says neither: it changes right now
		return nil
	}
	if err := w.gap(off, mid); err != nil {
		return err
	}
	return w.gap(mid, end)
}

// seekRuns calls fn for the runs of pages in [off, end) that hold data, until it returns false.
func (f *File) seekRuns(off, end int64, fn func(off, n int64) bool) error {
	for off < end {
		start, stop, err := f.seekRun(off, end)
		if err != nil || start == stop || !fn(start, stop-start) {
			return err
		}
		off = stop
	}
	return nil
}

// seekRun is the first run of pages with data in [off, end); start == stop: none.
func (f *File) seekRun(off, end int64) (start, stop int64, err error) {
	fd, err := f.use("look for pages in")
	if err != nil {
		return 0, 0, err
	}
	defer f.done()
	start, err = unix.Seek(fd, off, unix.SEEK_DATA)
	if err == nil && start >= end {
		return 0, 0, nil
	}
	if err == nil {
		stop, err = unix.Seek(fd, start, unix.SEEK_HOLE)
	}
	if errors.Is(err, unix.ENXIO) { // nothing behind off, or truncated meanwhile
		return 0, 0, nil
	}
	if err != nil {
		return 0, 0, fmt.Errorf("look for pages in frame file at %d: %w", off, err)
	}
	return start, min((stop+PageSize-1)&^(PageSize-1), end), nil
}

func aligned(what string, off, n int64) error {
	if off < 0 || n < 0 || (off|n)%PageSize != 0 || off+n < off {
		return fmt.Errorf("%s frame file at %d, %d bytes: %w (whole pages of %d)", what, off, n, unix.EINVAL, PageSize)
	}
	return nil
}
