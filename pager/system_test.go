package pager

import (
	"fmt"
	"sync"
	"testing"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/memory"
)

func memoryStore(t testing.TB, o *memory.Options) *memory.Store {
	t.Helper()
	mem, err := store.NewAnonymous(0)
	if err != nil {
		t.Fatal(err)
	}
	s, err := memory.New(mem, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func fileStore(t testing.TB) *file.Store {
	t.Helper()
	s, err := file.New(&file.Options{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func newPager(t testing.TB, s store.Store) *Pager {
	t.Helper()
	p, err := New(Options{Store: s})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	return p
}

// system is a pager on a store, for emmtest.
func system(t testing.TB, s store.Store, mayFail bool) emmtest.System {
	p := newPager(t, s)
	return emmtest.System{
		Manager: p,
		Object: func(size int64, pageSize int) emm.Port {
			port := emm.NewPort()
			if err := p.ObjectCreate(port, size, pageSize); err != nil {
				t.Fatal(err)
			}
			return port
		},
		MayFail: mayFail,
		Close: func() {
			if err := p.Close(); err != nil {
				t.Errorf("close: %v", err)
			}
			if used := s.Info().Used; used != 0 {
				t.Errorf("%d bytes of paging space leaked", used)
			}
			s.Close()
		},
	}
}

// attach makes an object of so many pages and a vm for it.
func attach(t testing.TB, p *Pager, pages int64, pageSize int) (*emmtest.Kernel, emm.Port) {
	t.Helper()
	port := emm.NewPort()
	if err := p.ObjectCreate(port, pages*int64(pageSize), pageSize); err != nil {
		t.Fatal(err)
	}
	k := emmtest.NewKernel(t, p, port, pageSize)
	t.Cleanup(k.Check)
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	return k, port
}

const ps = 4096

func run(page, n int64) emm.Run { return emm.Run{Off: page * ps, Size: n * ps} }

// supplies counts the DataSupply calls.
type supplies struct {
	*emmtest.Kernel
	mu     sync.Mutex
	supply []emm.Run
	none   []emm.Run
	failed []emm.Run
}

func (c *supplies) DataSupply(off int64, data []byte, lock emm.Prot, precious, reply bool) emm.KernReturn {
	c.mu.Lock()
	c.supply = append(c.supply, emm.Run{Off: off, Size: int64(len(data))})
	c.mu.Unlock()
	return c.Kernel.DataSupply(off, data, lock, precious, reply)
}

func (c *supplies) DataUnavailable(r emm.Run) emm.KernReturn {
	c.mu.Lock()
	c.none = append(c.none, r)
	c.mu.Unlock()
	return c.Kernel.DataUnavailable(r)
}

func (c *supplies) DataError(r emm.Run, reason emm.KernReturn) emm.KernReturn {
	c.mu.Lock()
	c.failed = append(c.failed, r)
	c.mu.Unlock()
	return c.Kernel.DataError(r, reason)
}

// recording is a manager that gives the pager a control that counts.
type recording struct {
	*Pager
	control *supplies
}

func (r *recording) Init(h emm.Head, pageSize int) emm.KernReturn {
	r.control = &supplies{Kernel: h.Control.(*emmtest.Kernel)}
	h.Control = r.control
	return r.Pager.Init(h, pageSize)
}

func record(t testing.TB, p *Pager, pages int64) (*emmtest.Kernel, *supplies) {
	t.Helper()
	port := emm.NewPort()
	if err := p.ObjectCreate(port, pages*ps, ps); err != nil {
		t.Fatal(err)
	}
	r := &recording{Pager: p}
	k := emmtest.NewKernel(t, r, port, ps)
	t.Cleanup(k.Check)
	if kr := k.Init(); kr != emm.Success {
		t.Fatal(kr)
	}
	return k, r.control
}

func expectRuns(t *testing.T, what string, got []emm.Run, want ...emm.Run) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: %v, want %v", what, got, want)
	}
}
