//go:build linux

package region

import (
	"fmt"
	"sort"
	"sync"
	"unsafe"
)

// regions knows which addresses of this process are region memory, of all Pagers.
type regions struct {
	mu   sync.RWMutex
	list []*Region // guarded by mu; by address
}

// mapped are the Regions between their registration and their end.
var mapped regions

// above is the index of the first region that ends above addr. The caller holds mu.
func (m *regions) above(addr uint64) int {
	return sort.Search(len(m.list), func(i int) bool { return m.list[i].address()+uint64(len(m.list[i].mem)) > addr })
}

func (m *regions) add(r *Region) {
	m.mu.Lock()
	defer m.mu.Unlock()
	i := m.above(r.address())
	m.list = append(m.list, nil)
	copy(m.list[i+1:], m.list[i:])
	m.list[i] = r
}

// remove forgets r; one that was never added is no error.
func (m *regions) remove(r *Region) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if i := m.above(r.address()); i < len(m.list) && m.list[i] == r {
		m.list = append(m.list[:i], m.list[i+1:]...)
	}
}

// find is the region that addr lies in, and its offset from the start of Bytes (it can lie before and behind them, on a page they share).
func (m *regions) find(addr uintptr) (*Region, int64) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	i := m.above(uint64(addr))
	if i == len(m.list) || m.list[i].address() > uint64(addr) {
		return nil, 0
	}
	r := m.list[i]
	return r, int64(uint64(addr)-r.address()) - r.delta
}

// overlaps reports whether p has a byte of region memory.
func (m *regions) overlaps(p []byte) bool {
	start := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p))))
	m.mu.RLock()
	defer m.mu.RUnlock()
	i := m.above(start)
	return i < len(m.list) && m.list[i].address() < start+uint64(len(p))
}

// reason is why an access at b failed, if it lies in a region; otherwise err.
func (m *regions) reason(b *byte, err error) error {
	r, off := m.find(uintptr(unsafe.Pointer(b)))
	if r == nil {
		return err
	}
	return fmt.Errorf("%w: %w", r.caught(off), err)
}
