package guardian_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

const taskRole = "guardian-test-task"

const (
	page        = 4096
	smallPages  = 64
	sparseBytes = 64 << 30
	copiers     = 8
	mark        = 0x5a // what the resident page is full of
)

// Pages of the small range.
const (
	residentPage = 0 // filled by the pager, write-protected
	markerPage   = 1 // absent, with a write-protect marker
	readPage     = 2 // read(2) goes there
	firstCopy    = 8
	laterPage    = 40
)

// report is what a task has seen.
type report struct {
	Touches, Faults int    // of missing pages, at the same time
	Read            string // the error of read(2) into a missing page
	Later           int    // faults of touches made afterwards
	Resident        bool   // the resident page is as it was
	Written         bool   // and could be written, by a thread that waited for that
	Hangup          bool   // the socket was shut down
}

// taskMain registers memory, hands its userfaultfd to the pager on fd 3, touches everything, and reports.
func taskMain() error {
	time.AfterFunc(patience, func() { os.Exit(9) }) // cannot help while the world stands still: then the test's patience ends
	runtime.GOMAXPROCS(32)                          // a fault keeps its P
	fmt.Println("task", os.Getpid())
	fd, err := uffd.Open(&uffd.OpenOptions{Features: uffd.RequiredFeatures})
	if err != nil {
		return err
	}
	small, smallFile, err := mapMemfd(smallPages*page, false)
	if err != nil {
		return err
	}
	sparse, _, err := mapMemfd(sparseBytes, false)
	if err != nil {
		return err
	}
	private, _, err := mapMemfd(16*page, true)
	if err != nil {
		return err
	}
	all := uffd.RegisterMissing | uffd.RegisterMinor | uffd.RegisterWP
	for _, r := range []struct {
		b    []byte
		mode uffd.RegisterMode
	}{{small, all}, {sparse, all}, {private, uffd.RegisterMissing | uffd.RegisterMinor}} {
		if _, err := fd.Register(addr(r.b), uint64(len(r.b)), r.mode); err != nil {
			return err
		}
	}
	// One page is in the file, and in no mapping: a MINOR fault.
	if _, err := unix.Pwrite(smallFile, make([]byte, page), (firstCopy)*page); err != nil {
		return err
	}
	msg := fmt.Sprintf("%d %d %d %d", os.Getpid(), addr(small), addr(sparse), addr(private))
	if err := unix.Sendmsg(3, []byte(msg), unix.UnixRights(fd.Fd()), nil, 0); err != nil {
		return err
	}
	var b [16]byte
	if n, err := unix.Read(3, b[:]); n == 0 || err != nil { // the pager has prepared everything
		return fmt.Errorf("no word from the pager: %w", err)
	}

	var r report
	var faults atomic.Int64
	var wg sync.WaitGroup
	touch := func(f func()) {
		r.Touches++
		wg.Go(func() {
			if faulted(f) {
				faults.Add(1)
			}
		})
	}
	for i := range copiers {
		touch(func() { copy(make([]byte, page), small[(firstCopy+i)*page:]) })
	}
	touch(func() { load(&private[3*page]) })
	touch(func() { sparse[sparseBytes/2] = 1 })
	touch(func() { load(&small[markerPage*page]) })
	wg.Go(func() { // in assembly: not preemptible
		r.Written = !faulted(func() { copy(small[residentPage*page+1:], "written") })
	})
	pr, pw, err := os.Pipe()
	if err != nil {
		return err
	}
	pw.Write([]byte("something"))
	wg.Go(func() {
		_, err := unix.Read(int(pr.Fd()), small[readPage*page:(readPage+1)*page])
		if err != nil {
			r.Read = err.Error()
		}
	})
	// The pager has read all these faults. Now the world stops, until they end.
	if n, err := unix.Read(3, b[:]); n == 0 || err != nil {
		return fmt.Errorf("no word from the pager: %w", err)
	}
	fmt.Println("waiting", os.Getpid())
	runtime.GC()
	wg.Wait()
	r.Faults = int(faults.Load())
	for _, f := range []func(){func() { load(&small[laterPage*page]) }, func() { sparse[7*page] = 1 }, func() { load(&private[15*page]) }} {
		if faulted(f) {
			r.Later++
		}
	}
	r.Resident = small[residentPage*page] == mark && string(small[residentPage*page+1:][:7]) == "written"
	n, err := unix.Read(3, b[:])
	r.Hangup = n == 0 && err == nil
	out, err := json.Marshal(r)
	if err != nil {
		return err
	}
	for _, b := range [][]byte{small, sparse, private} {
		if err := unix.Munmap(b); err != nil {
			return err
		}
	}
	fmt.Println("report", string(out))
	os.Stdout.Close()
	time.Sleep(patience)
	return errors.New("nobody ended this task")
}

// faulted reports whether f met a memory fault.
func faulted(f func()) (yes bool) {
	debug.SetPanicOnFault(true)
	defer func() {
		if e := recover(); e != nil {
			if _, ok := e.(interface{ Addr() uintptr }); !ok {
				panic(e)
			}
			yes = true
		}
	}()
	f()
	return false
}

// load really loads.
//
//go:noinline
func load(p *byte) byte { return *p }

func mapMemfd(n int, readOnly bool) ([]byte, int, error) {
	fd, err := unix.MemfdCreate("guardian-test", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, -1, err
	}
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		return nil, -1, err
	}
	if !readOnly {
		b, err := unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
		return b, fd, err
	}
	ro, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, -1, err
	}
	b, err := unix.Mmap(ro, 0, n, unix.PROT_READ, unix.MAP_PRIVATE)
	return b, fd, err
}

func addr(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&b[0]))) }
