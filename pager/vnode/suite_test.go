package vnode

import (
	"io"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

// mux is the managers of several objects as one, as the suite wants it.
type mux struct {
	mu     sync.Mutex
	pagers map[emm.Port]*Pager // guarded by mu
}

func (x *mux) of(h emm.Head) *Pager {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pagers[h.Object]
}

func (x *mux) Init(h emm.Head, pageSize int) emm.KernReturn { return x.of(h).Init(h, pageSize) }
func (x *mux) Terminate(h emm.Head) emm.KernReturn          { return x.of(h).Terminate(h) }
func (x *mux) DataRequest(h emm.Head, want emm.Run, need int64, access emm.Prot) emm.KernReturn {
	return x.of(h).DataRequest(h, want, need, access)
}

func (x *mux) DataReturn(h emm.Head, off int64, data []byte, dirty, kernelCopy bool) emm.KernReturn {
	return x.of(h).DataReturn(h, off, data, dirty, kernelCopy)
}

func (x *mux) Synchronize(h emm.Head, r emm.Run, f emm.SyncFlags) emm.KernReturn {
	return x.of(h).Synchronize(h, r, f)
}

// harness runs the suite over the Pagers that open makes.
func harness(mayFail bool, open func(t testing.TB, size int64) *Pager, pageSizes ...int) emmtest.Harness {
	return emmtest.Harness{PageSizes: pageSizes, New: func(t testing.TB) emmtest.System {
		x := &mux{pagers: map[emm.Port]*Pager{}}
		return emmtest.System{Manager: x, MayFail: mayFail, Object: func(size int64, _ int) emm.Port {
			port := emm.NewPort()
			x.mu.Lock()
			defer x.mu.Unlock()
			x.pagers[port] = open(t, size)
			return port
		}, Close: func() {
			for _, p := range x.pagers {
				if err := p.Close(); err != nil {
					t.Error(err)
				}
				waitIdle(t, p)
			}
		}}
	}}
}

func TestSuiteOnFile(t *testing.T) {
	emmtest.Run(t, harness(false, func(t testing.TB, size int64) *Pager {
		return openFile(t, reopen(t, tempFile(t, make([]byte, size)), os.O_RDWR), size)
	}))
}

// An empty file grows with what is written.
func TestSuiteOnEmptyFile(t *testing.T) {
	emmtest.Run(t, harness(false, func(t testing.TB, size int64) *Pager {
		return openFile(t, reopen(t, tempFile(t, nil), os.O_RDWR), size)
	}, 4096, 64<<10))
}

// memory is an io.ReaderAt and io.WriterAt. Before each call it asks trouble, if there is one.
type memory struct {
	mu      sync.Mutex
	b       []byte
	trouble func(off int64) error
	closed  atomic.Int32
	calls   atomic.Int32
	most    atomic.Int32 // calls at once
	now     atomic.Int32
}

func (m *memory) begin(off int64) error {
	m.calls.Add(1)
	if n := m.now.Add(1); n > m.most.Load() {
		m.most.Store(n)
	}
	if m.trouble != nil {
		return m.trouble(off)
	}
	return nil
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	defer m.now.Add(-1)
	if err := m.begin(off); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := copy(p, m.b[min(off, int64(len(m.b))):])
	if n < len(p) || off+int64(n) == int64(len(m.b)) {
		return n, io.EOF
	}
	return n, nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	defer m.now.Add(-1)
	if err := m.begin(off); err != nil {
		return 0, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func (m *memory) Close() error {
	m.closed.Add(1)
	return nil
}

func TestSuiteOnReaderWriterAt(t *testing.T) {
	emmtest.Run(t, harness(false, func(t testing.TB, size int64) *Pager {
		return ReaderWriterAt(&memory{b: make([]byte, size)}, size, func() error { return nil }, &Options{Log: quiet, Workers: 2})
	}))
}

// User's code may do anything.
func TestSuiteOnTrouble(t *testing.T) {
	emmtest.Run(t, harness(true, func(t testing.TB, size int64) *Pager {
		var n atomic.Int32
		trouble := func(int64) error {
			switch n.Add(1) % 11 {
			case 3:
				return unix.EIO
			case 5:
				panic("of the user's code")
			case 7:
				runtime.Goexit()
			case 9:
				time.Sleep(time.Millisecond)
			}
			return nil
		}
		return ReaderWriterAt(&memory{b: make([]byte, size), trouble: trouble}, size, func() error { return trouble(0) }, &Options{Log: quiet, Workers: 3})
	}))
}
