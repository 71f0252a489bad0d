package pager

import (
	"bytes"
	"sync"
	"testing"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
	"machpager/pager/store"
	"machpager/pager/store/memory"
	"machpager/pager/store/storetest"
)

// world is all that outlives a pager: memory by name.
type world struct {
	mu  sync.Mutex
	mem map[string]*lasting
}

// lasting is memory that only its name's Close ends.
type lasting struct {
	store.Memory
	w    *world
	name string
}

func (l *lasting) Close() error {
	l.w.mu.Lock()
	defer l.w.mu.Unlock()
	delete(l.w.mem, l.name)
	return nil // kept mapped: a killed pager's goroutines may still look at it
}

func newWorld() *world { return &world{mem: make(map[string]*lasting)} }

func (w *world) open(name string) (store.Memory, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if m := w.mem[name]; m != nil {
		return m, nil
	}
	m, err := store.NewAnonymous(1 << 30)
	if err != nil {
		return nil, err
	}
	w.mem[name] = &lasting{m, w, name}
	return w.mem[name], nil
}

// copy is the world as it is at this instant: what a process killed now leaves.
func (w *world) copy(t testing.TB) *world {
	w.mu.Lock()
	defer w.mu.Unlock()
	c := newWorld()
	for name, m := range w.mem {
		a, err := store.NewAnonymous(1 << 30)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { a.Close() })
		if err := a.Grow(int64(len(m.Bytes()))); err != nil {
			t.Fatal(err)
		}
		from, to := m.Words(), a.Words()
		for i := range from {
			if v := from[i].Load(); v != 0 {
				to[i].Store(v)
			}
		}
		c.mem[name] = &lasting{a, c, name}
	}
	return c
}

// boot starts a store and a pager on what is there.
func (w *world) boot(t testing.TB) (*Pager, *storetest.Faulty) {
	t.Helper()
	mem, err := w.open("contents")
	if err != nil {
		t.Fatal(err)
	}
	s, err := memory.New(mem, &memory.Options{Slack: -1, Capacity: 256 * ps})
	if err != nil {
		t.Fatal(err)
	}
	f := storetest.NewFaulty(s)
	p, err := New(Options{Store: f, NewMemory: w.open})
	if err != nil {
		t.Fatal(err)
	}
	return p, f
}

// collector takes contents without a model.
type collector struct {
	*emmtest.Kernel
	mu    sync.Mutex
	pages map[int64][]byte
	bad   []emm.Run
}

func (c *collector) DataSupply(off int64, data []byte, _ emm.Prot, _, _ bool) emm.KernReturn {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i := 0; i < len(data); i += ps {
		c.pages[off/ps+int64(i/ps)] = bytes.Clone(data[i : i+ps])
	}
	return emm.Success
}

func (c *collector) DataUnavailable(r emm.Run) emm.KernReturn {
	return c.DataSupply(r.Off, make([]byte, r.Size), 0, false, false)
}

func (c *collector) DataError(r emm.Run, _ emm.KernReturn) emm.KernReturn {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.bad = append(c.bad, r)
	return emm.Success
}

// readRaw reads an object of a pager on a memory store.
func readRaw(t testing.TB, p *Pager, k *emmtest.Kernel, port emm.Port, pages int64) [][]byte {
	t.Helper()
	k.Terminate()
	c := &collector{Kernel: k, pages: make(map[int64][]byte)}
	h := emm.Head{Object: port, Control: c}
	if kr := p.Init(h, ps); kr != emm.Success {
		t.Fatalf("Init: %v", kr)
	}
	p.DataRequest(h, emm.Run{Size: pages * ps}, 0, emm.ProtRead)
	p.Terminate(h)
	if len(c.bad) > 0 || len(c.pages) != int(pages) {
		t.Fatalf("%d of %d pages answered, errors for %v", len(c.pages), pages, c.bad)
	}
	b := make([][]byte, pages)
	for i := range b {
		b[i] = c.pages[int64(i)]
	}
	return b
}

func (c *collector) ChangeAttributes(emm.Attributes, bool) emm.KernReturn { return emm.Success }
