package checked

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"machpager/internal/failpoint"
)

// Sync makes safe what was written before: it will be there, or what was written later, or [ErrTorn] if the device loses it. It costs two fdatasyncs, one if nothing was
// written; the first of a File that was not empty reads the tables as well, 8 KiB for each 2 MiB of contents that was ever written.
//
// An error of the Disk's Sync is for good. After any other what was written may be safe or not, and Sync can be tried again.
func (f *File) Sync() error {
	if f.readOnly {
		return nil
	}
	f.syncMu.Lock()
	defer f.syncMu.Unlock()
	if err := f.recover(); err != nil {
		return err
	}
	f.gate.Lock() // no write is under way
	f.mu.Lock()
	sealing := f.pending
	f.pending = map[int64]*units{}
	f.beginSealing(sealing)
	f.mu.Unlock()
	f.gate.Unlock()
	defer func() { // also if a Disk panics: writers wait for it
		f.mu.Lock()
		defer f.mu.Unlock()
		for group, u := range sealing { // those that could not be sealed
			f.addPending(group, u)
		}
		f.endSealing()
	}()
	failpoint.Here("checked.sync")
	if err := f.sealAll(sealing, true); err != nil {
		return fmt.Errorf("synchronize: %w", err)
	}
	return nil
}

// beginSealing keeps writers from the units until endSealing. Called with mu, and with gate unless nobody writes them.
func (f *File) beginSealing(all map[int64]*units) { f.sealing, f.sealed = all, make(chan struct{}) }

// endSealing is called with mu.
func (f *File) endSealing() {
	f.sealing = nil
	close(f.sealed)
}

// sealAll has the device know what is pending, and then that it counts. It takes out of all what it has sealed. always: the device is asked even if there is nothing.
func (f *File) sealAll(all map[int64]*units, always bool) error {
	some := len(all) > 0
	if !some && !always {
		return nil
	}
	if err := f.d.Sync(); err != nil || !some {
		return err
	}
	failpoint.Here("checked.safe")
	if err := f.seal(all); err != nil {
		return err
	}
	failpoint.Here("checked.sealed")
	return f.d.Sync()
}

// seal has what is pending and on the device count, and takes it out of all, which nobody else changes.
func (f *File) seal(all map[int64]*units) error {
	if err := f.whole(); err != nil {
		return err
	}
	for _, group := range slices.Sorted(maps.Keys(all)) {
		if err := f.sealGroup(group, all[group]); err != nil {
			return fmt.Errorf("table of the group at %d: %w", group*areaSize, err)
		}
		f.mu.Lock()
		delete(all, group) // also f.sealing
		f.mu.Unlock()
	}
	return nil
}

func (f *File) sealGroup(group int64, u *units) error {
	r := &reader{f: f, group: group}
	var entries [groupUnits]entry
	var freed units
	for i, j := u.run(0); i < j; i, j = u.run(j) {
		good, err := r.entries(entries[i:j], i)
		if err != nil {
			return err
		}
		if i+good < j {
			return fmt.Errorf("the entry of unit %d is not what was written: %w", group*groupUnits+int64(i+good), ErrTorn)
		}
		for k := i; k < j; k++ {
			if entries[k].state&pending != 0 {
				if entries[k] = entries[k].seal(); entries[k] == (entry{}) {
					freed.put(k)
				}
			}
		}
		if err := f.putEntries(entries[i:j], group, i); err != nil {
			return err
		}
	}
	for i, j := freed.run(0); i < j; i, j = freed.run(j) { // before anybody may write there
		for place := range 2 {
			_ = f.d.Punch(placeAt(group, i, place), int64(j-i)*Unit)
		}
	}
	return nil
}

// putEntries writes entries that may be read meanwhile.
func (f *File) putEntries(entries []entry, group int64, first int) error {
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	table := b[:len(entries)*entrySize]
	for i, e := range entries {
		e.put(table[i*entrySize:], f.head.identity, group*groupUnits+int64(first+i))
	}
	f.tableMu.Lock()
	defer f.tableMu.Unlock()
	_, err := f.d.WriteAt(table, tableAt(group)+int64(first)*entrySize)
	return err
}

// recover seals what an earlier process left pending, as far as it is right, and takes back what is not. It is called with syncMu. Until it has succeeded none of those
// units is written: a machine that died between 3 and 4 of a Sync may have forgotten that one is sealed, and its other place have been written since; then the pending
// place is all there is.
func (f *File) recover() error {
	if !f.left.Load() {
		return nil
	}
	found := map[int64]*units{}
	f.mu.Lock()
	f.beginSealing(found)
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.endSealing()
	}()
	err := f.takeOver(found)
	if err == nil {
		failpoint.Here("checked.found")
		err = f.sealAll(found, false)
	}
	if err != nil {
		return fmt.Errorf("synchronize what an earlier process left: %w", err)
	}
	f.left.Store(false)
	return nil
}

// takeOver finds what is pending and right.
func (f *File) takeOver(found map[int64]*units) error {
	groups := (f.head.size + areaSize - 1) / areaSize
	for group := int64(0); group < groups; group++ {
		next, err := f.d.Data(tableAt(group))
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if group = max(group, (next-headerSize)/groupSize); group >= groups {
			return nil
		}
		if err := f.takeOverGroup(group, found); err != nil {
			return fmt.Errorf("group at %d: %w", group*areaSize, err)
		}
	}
	return nil
}

func (f *File) takeOverGroup(group int64, found map[int64]*units) error {
	f.gate.Lock() // no unit is being written
	defer f.gate.Unlock()
	r := f.reader(group*areaSize, false)
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	var entries [groupUnits]entry
	var right units
	for i := 0; i < groupUnits; i++ { // a damaged entry is passed over
		good, err := r.entries(entries[i:], i)
		if err != nil {
			return err
		}
		for end := i + good; i < end; i++ {
			e := entries[i]
			if e.state&pending == 0 || r.own.has(i) {
				continue
			}
			err := r.place(b[:Unit], e, e.other(), i)
			switch {
			case err == nil:
				right.put(i)
			case errors.Is(err, io.ErrUnexpectedEOF):
				return err
			default:
				back := [1]entry{e.back()}
				if err := f.putEntries(back[:], group, i); err != nil {
					return err
				}
			}
		}
	}
	if right != (units{}) {
		f.mu.Lock()
		found[group] = &right // f.sealing
		f.mu.Unlock()
	}
	return nil
}
