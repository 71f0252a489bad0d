package daemon

import (
	"fmt"

	"machpager/internal/arena"
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

// newTable makes the memory of an object's page table.
func newTable(object uint64, n int64) (vm.Table, error) {
	a, err := arena.Create(fmt.Sprintf("machpager-table-%d", object), tableKind, tableVersion, n)
	if err != nil {
		return nil, err
	}
	if err := a.Grow(n); err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
}

// newMap makes memory of the default pager's.
func newMap(name string) (store.Memory, error) { return newMemory(name, maxMap) }

func newMemory(name string, most int64) (store.Memory, error) {
	return arena.Create("machpager-"+name, memoryKind, memoryVersion, most)
}
