package checked

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
)

// WriteAt writes contents; after an error some of them may be. A part of a unit is written by reading the rest of it first, which must be in order.
func (f *File) WriteAt(p []byte, off int64) (int, error) {
	switch {
	case f.readOnly:
		return 0, fmt.Errorf("write at %d: checked file is open read-only: %w", off, unix.EBADF)
	case off < 0 || int64(len(p)) > f.head.size-off:
		return 0, fmt.Errorf("write %d bytes at %d of %d: %w", len(p), off, f.head.size, unix.EINVAL)
	}
	for done := 0; done < len(p); {
		n, err := f.writeSome(p[done:], off+int64(done))
		if err != nil {
			return done, err
		}
		done += n
	}
	return len(p), nil
}

// writeSome writes units of one group, or a part of one unit.
func (f *File) writeSome(p []byte, off int64) (int, error) {
	in := int(off % Unit)
	if in == 0 && len(p) >= Unit {
		n := min(len(p)&^(Unit-1), int(areaSize-off%areaSize))
		return n, f.writeUnits(p[:n], off)
	}
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	unit := b[:Unit]
	clear(unit)
	n := min(len(p), Unit-in)
	if in > 0 || off+int64(n) < f.head.size {
		if _, err := f.reader(off, false).units(unit, off-int64(in)); err != nil {
			return 0, fmt.Errorf("write %d bytes at %d: the rest of the unit: %w", n, off, err)
		}
	}
	return copy(unit[in:], p[:n]), f.writeUnits(unit, off-int64(in))
}

// enter begins a write of units [a, b) of a group: it waits until none of them is being sealed. No Sync begins before gate is let go of. own are those that
// this File has made pending.
func (f *File) enter(group int64, a, b int) (own units) {
	for {
		f.gate.RLock()
		f.mu.Lock()
		u, ended := f.sealing[group], f.sealed
		if busy := u != nil && u.overlaps(a, b); !busy {
			if v := f.pending[group]; v != nil {
				own = *v
			}
			f.mu.Unlock()
			return own
		}
		f.mu.Unlock()
		f.gate.RUnlock()
		<-ended // a Sync ends when the device has written
	}
}

// errLeft says that what another File has left must be sealed first.
var errLeft = errors.New("another process has left it pending")

// writeUnits writes whole units of one group.
func (f *File) writeUnits(p []byte, off int64) error {
	err := f.tryWrite(p, off)
	if errors.Is(err, errLeft) {
		if err = f.recoverFirst(); err == nil {
			err = f.tryWrite(p, off)
		}
	}
	if err != nil {
		return fmt.Errorf("write %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

func (f *File) recoverFirst() error {
	f.syncMu.Lock()
	defer f.syncMu.Unlock()
	return f.recover()
}

// tryWrite writes the contents, then the entries. Whichever came first: who finds one without the other takes what is sealed.
func (f *File) tryWrite(p []byte, off int64) error {
	group, first, n := off/areaSize, int(off%areaSize/Unit), len(p)/Unit
	own := f.enter(group, first, first+n)
	defer f.gate.RUnlock()
	if err := f.whole(); err != nil {
		return err
	}
	r := &reader{f: f, group: group}
	var all [groupUnits]entry
	var change units
	entries := all[:n]
	for i := 0; i < n; { // a damaged one is made anew
		good, err := r.entries(entries[i:], first+i)
		if err != nil {
			return fmt.Errorf("table: %w", err)
		}
		if i += good; i < n {
			entries[i] = entry{state: lost}
			i++
		}
	}
	for i := range entries {
		e, sum := entries[i], sumOf(p[i*Unit:][:Unit])
		if e.state&pending != 0 && !own.has(first+i) && f.left.Load() {
			return errLeft
		}
		if sum != 0 || e.state&pending != 0 || !e.zeros(e.sealed()) {
			entries[i] = e.write(sum)
			change.put(i)
		}
	}
	failpoint.Here("checked.write")
	if err := f.writePlaces(p, entries, &change, group, first); err != nil {
		f.forget(group, first, n)
		return err
	}
	failpoint.Here("checked.written")
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	for i, j := change.run(0); i < j; i, j = change.run(j) {
		for k := i; k < j; k++ {
			entries[k].put(b[k*entrySize:], f.head.identity, off/Unit+int64(k))
		}
		if _, err := f.d.WriteAt(b[i*entrySize:j*entrySize], tableAt(group)+int64(first+i)*entrySize); err != nil {
			f.forget(group, first, n)
			return fmt.Errorf("table: %w", err)
		}
	}
	failpoint.Here("checked.entered")
	f.mu.Lock()
	defer f.mu.Unlock()
	var done units
	for i := range n {
		if change.has(i) {
			done.put(first + i)
		}
	}
	f.addPending(group, &done)
	return nil
}

// writePlaces writes the contents of units that change, each run of one place at once. Zeros are not written.
func (f *File) writePlaces(p []byte, entries []entry, change *units, group int64, first int) error {
	for i := 0; i < len(entries); {
		e, j := entries[i], i+1
		place := e.other()
		if !change.has(i) || e.sum[place] == 0 {
			i++
			continue
		}
		for j < len(entries) && change.has(j) && entries[j].other() == place && entries[j].sum[place] != 0 {
			j++
		}
		if _, err := f.d.WriteAt(p[i*Unit:j*Unit], placeAt(group, first+i, place)); err != nil {
			return err
		}
		i = j
	}
	return nil
}

// forget is for units of which a write has failed: what is pending of them may be half of it, so it must not be sealed.
func (f *File) forget(group int64, first, n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if u := f.pending[group]; u != nil {
		for i := first; i < first+n; i++ {
			u.drop(i)
		}
	}
}
