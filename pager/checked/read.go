package checked

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// errWait says that something cannot be had without waiting.
var errWait = errors.New("not without waiting")

// buffers hold entries of a group, or one unit.
var buffers = sync.Pool{New: func() any { return new([tableSize]byte) }}

// ReadAt reads contents. An error is of the first byte that could not be read: [ErrTorn], one of the Disk, or io.EOF beyond the end.
func (f *File) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at %d: %w", off, unix.EINVAL)
	}
	n, eof := len(p), error(nil)
	if left := max(0, f.head.size-off); int64(n) > left {
		n, eof = int(left), io.EOF
	}
	for done := 0; done < n; {
		m, err := f.readSome(p[done:n], off+int64(done))
		done += m
		if err != nil {
			return done, err
		}
	}
	return n, eof
}

// readSome reads units of one group, or a part of one unit.
func (f *File) readSome(p []byte, off int64) (int, error) {
	in := int(off % Unit)
	if in == 0 && len(p) >= Unit {
		return f.reader(off, false).units(p[:min(len(p)&^(Unit-1), int(areaSize-off%areaSize))], off)
	}
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	if _, err := f.reader(off, false).units(b[:Unit], off-int64(in)); err != nil {
		return 0, err
	}
	return copy(p, b[in:Unit]), nil
}

// PeekAt is ReadAt if that needs no wait and all is in order: it fills p, or reports false. Only of whole units.
func (f *File) PeekAt(p []byte, off int64) bool {
	if off < 0 || off%Unit != 0 || len(p)%Unit != 0 || int64(len(p)) > f.head.size-off {
		return false
	}
	for len(p) > 0 {
		n := min(len(p), int(areaSize-off%areaSize))
		if _, err := f.reader(off, true).units(p[:n], off); err != nil {
			return false
		}
		p, off = p[n:], off+int64(n)
	}
	return true
}

// reader reads units of one group.
type reader struct {
	f     *File
	group int64
	peek  bool
	own   units // what was pending by this File before the table was read; what others have left pending need not be right
}

// reader is for units from off on, in one group.
func (f *File) reader(off int64, peek bool) *reader {
	group := off / areaSize
	return &reader{f: f, group: group, peek: peek, own: f.own(group)}
}

// get fills p, or fails.
func (r *reader) get(p []byte, off int64) error {
	if r.peek {
		if !r.f.d.PeekAt(p, off) {
			return errWait
		}
		return nil
	}
	n, err := r.f.d.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err != nil && !errors.Is(err, io.EOF):
		return err
	}
	if err := r.f.whole(); err != nil {
		return err
	}
	return io.ErrUnexpectedEOF
}

// units reads whole units and returns how many bytes are right before an error.
func (r *reader) units(p []byte, off int64) (int, error) {
	first, n := int(off%areaSize/Unit), len(p)/Unit
	var all [groupUnits]entry
	entries := all[:n]
	good, err := r.entries(entries, first)
	if err != nil {
		return 0, fmt.Errorf("read %d bytes at %d: table: %w", len(p), off, err)
	}
	for i := 0; i < good; {
		place, j := entries[i].latest(), i+1
		if entries[i].zeros(place) {
			clear(p[i*Unit:][:Unit])
			i++
			continue
		}
		for j < good && entries[j].latest() == place && !entries[j].zeros(place) {
			j++
		}
		err := r.get(p[i*Unit:j*Unit], placeAt(r.group, first+i, place))
		for ; i < j; i++ {
			if u := p[i*Unit:][:Unit]; err != nil || sumOf(u) != entries[i].sum[place] || entries[i].gone(place) {
				if err := r.latest(u, entries[i], first+i); err != nil {
					return i * Unit, fmt.Errorf("read %d bytes at %d: %w", Unit, off+int64(i)*Unit, err)
				}
			}
		}
	}
	if good < n {
		return good * Unit, fmt.Errorf("read %d bytes at %d: offset %d of the file: the unit's entry is damaged (%s): %w", Unit, off+int64(good)*Unit,
			tableAt(r.group)+int64(first+good)*entrySize, heal, ErrTorn)
	}
	return len(p), nil
}

// heal is what can be done.
const heal = "writing the whole unit anew heals it"

// entries reads entries; good: of so many, up to the first that is damaged.
func (r *reader) entries(to []entry, first int) (good int, err error) {
	b := buffers.Get().(*[tableSize]byte)
	defer buffers.Put(b)
	table := b[:len(to)*entrySize]
	if err := r.get(table, tableAt(r.group)+int64(first)*entrySize); err != nil {
		return 0, err
	}
	if good = r.f.decode(to, table, r.group, first); good == len(to) || r.peek {
		return good, nil
	}
	func() {
		r.f.tableMu.Lock() // what was read may be a half of one that was being sealed
		defer r.f.tableMu.Unlock()
		err = r.get(table, tableAt(r.group)+int64(first)*entrySize)
	}()
	return r.f.decode(to, table, r.group, first), err
}

// decode returns how many are right before one that is damaged.
func (f *File) decode(to []entry, table []byte, group int64, first int) (good int) {
	for ok := false; good < len(to); good++ {
		if to[good], ok = getEntry(table[good*entrySize:], f.head.identity, group*groupUnits+int64(first+good)); !ok {
			break
		}
	}
	return good
}

// latest reads a unit which may not be in order: what was written last, or, if that was never finished by another File, what is sealed.
func (r *reader) latest(p []byte, e entry, unit int) error {
	err := r.place(p, e, e.latest(), unit)
	if err == nil || e.state&pending == 0 || r.own.has(unit) || e.gone(e.sealed()) || errors.Is(err, errWait) || errors.Is(err, io.ErrUnexpectedEOF) {
		return err
	}
	return r.place(p, e, e.sealed(), unit)
}

// place reads what an entry says of a place.
func (r *reader) place(p []byte, e entry, place, unit int) error {
	if e.zeros(place) {
		clear(p)
		return nil
	}
	at := placeAt(r.group, unit, place)
	if err := r.get(p, at); err != nil {
		return err
	}
	if got := sumOf(p); got != e.sum[place] || e.gone(place) {
		return fmt.Errorf("offset %d of the file: CRC-32C %08x, was %08x when written (%s): %w", at, got, e.sum[place], heal, ErrTorn)
	}
	return nil
}
