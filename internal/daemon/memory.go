package daemon

import (
	"fmt"
	"os"
	"sync"

	"machpager/internal/arena"
	"machpager/internal/failpoint"
	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/internal/vm"
	"machpager/pager/store"
)

// Kinds of arena, in their headers. A layout that changes gets a new version.
const (
	tableKind, tableVersion   = "pagetabl", 1
	memoryKind, memoryVersion = "paging", 1
)

// How far arenas can grow, in bytes of address space, of which a process has 128 TiB.
const (
	maxMap      = 16 << 30 // a page map: objects of up to 8 TiB with pages of 4 KiB, some thousand of them
	maxContents = 1 << 44  // contents in memory
)

// arenas are the memory that outlives this process: each is held by the guardian under its name, until it is closed.
type arenas struct {
	mu   sync.Mutex
	last uint64                   // guarded by mu; number of the last one made
	left map[string]guardian.Item // guarded by mu; of an earlier pager, nobody has asked for them yet
}

// kept is an arena that the guardian holds.
type kept struct {
	*arena.Arena
	d    *Daemon
	id   uint64
	once sync.Once
}

// Close gives the memory up: the next of its name is a new one.
func (k *kept) Close() error {
	k.once.Do(func() { k.d.letGo(ipc.ItemArena, k.id) })
	return k.Arena.Close()
}

// memory finds what an earlier pager left under the name, or makes it.
func (d *Daemon) memory(name, kind string, version uint32, most int64) (*kept, error) {
	d.arenas.mu.Lock()
	i, found := d.arenas.left[name]
	delete(d.arenas.left, name)
	if !found {
		d.arenas.last++
		i.ID = d.arenas.last
	}
	d.arenas.mu.Unlock()
	if found {
		f := os.NewFile(uintptr(i.FD), name)
		a, err := arena.Open(f, kind, version, most)
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("take over memory %s: %w", name, err)
		}
		return &kept{Arena: a, d: d, id: i.ID}, nil
	}
	a, err := arena.Create("machpager-"+name, kind, version, most)
	if err != nil {
		return nil, err
	}
	failpoint.Here("daemon.arena.made")
	// Without a guardian there is no next pager; what is resident must still find its way out.
	if err := d.hold(guardian.Item{Kind: ipc.ItemArena, ID: i.ID, Tail: []byte(name), FD: int(a.File().Fd())}); err != nil && d.guardianPID() != 0 {
		a.Close()
		return nil, fmt.Errorf("make memory %s: %w", name, err)
	}
	failpoint.Here("daemon.arena.held")
	return &kept{Arena: a, d: d, id: i.ID}, nil
}

// has reports whether an earlier pager left memory of this name that nobody has asked for.
func (t *arenas) has(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	_, ok := t.left[name]
	return ok
}

// dropLeft gives up what nobody has asked for.
func (d *Daemon) dropLeft() (n int) {
	d.arenas.mu.Lock()
	left := d.arenas.left
	d.arenas.left = nil
	d.arenas.mu.Unlock()
	for _, i := range left {
		guardian.CloseItems([]guardian.Item{i})
		d.letGo(ipc.ItemArena, i.ID)
	}
	return len(left)
}

func tableName(object uint64) string { return fmt.Sprintf("table.%d", object) }

// newTable makes the memory of an object's page table, or finds it.
func (d *Daemon) newTable(object uint64, n int64) (vm.Table, error) {
	a, err := d.memory(tableName(object), tableKind, tableVersion, n)
	if err != nil {
		return nil, err
	}
	if err := a.Grow(n); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// newMap makes memory of the default pager's, or finds it.
func (d *Daemon) newMap(name string) (store.Memory, error) { return d.newMemory("pager."+name, maxMap) }

func (d *Daemon) newMemory(name string, most int64) (store.Memory, error) {
	k, err := d.memory(name, memoryKind, memoryVersion, most)
	if err != nil {
		return nil, err // and no *kept in an interface
	}
	return k, nil
}
