package checked

import (
	"bytes"
	"encoding/binary"
	"errors"
	"maps"
	"math/rand/v2"
	"strings"
	"testing"
)

func newDisk() *simDisk { return newSimDisk(rand.New(rand.NewPCG(1, 1))) }

func mustOpen(t *testing.T, d *simDisk, size int64) *File {
	t.Helper()
	f, err := Open(d, size, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func put(t *testing.T, f *File, v uint64, unit int) {
	t.Helper()
	if _, err := f.WriteAt(contents(v, unit), int64(unit)*Unit); err != nil {
		t.Fatal(err)
	}
}

func has(t *testing.T, f *File, unit int, vs ...uint64) {
	t.Helper()
	b := make([]byte, Unit)
	_, err := f.ReadAt(b, int64(unit)*Unit)
	for _, v := range vs {
		if bytes.Equal(b, contents(v, unit)) && err == nil {
			return
		}
	}
	t.Errorf("unit %d has %x, want of versions %d: %v", unit, b[:8], vs, err)
}

// A process dies when it has sealed a unit and the device does not know; the next one writes the other place, and the machine dies. The device has the pending entry, and of the other place a
// half. What is pending is then all there is, and must not be written before it is sealed.
func TestSealForgotten(t *testing.T) {
	d := newDisk()
	f := mustOpen(t, d, 4*Unit)
	put(t, f, 1, 2)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	put(t, f, 2, 2)
	d.left = 3 // fdatasync, entry, fdatasync
	if err := f.Sync(); !errors.Is(err, errDead) {
		t.Fatal(err)
	}
	d.revive()
	f = mustOpen(t, d, 0)
	has(t, f, 2, 2)
	put(t, f, 3, 2)
	table := int64(tableAt(0)) / sector
	d.powerBut(func(s int64, n int) int {
		if s == table {
			return 0 // as it was when the first fdatasync returned
		}
		return (n - 1) * int(s%2)
	})
	f = mustOpen(t, d, 0)
	has(t, f, 2, 2)
	for left := 1; left < 100; left++ {
		again := d.copy()
		f := mustOpen(t, again, 0)
		again.left = left
		_, err := f.WriteAt(contents(4, 2), 2*Unit)
		again.powerBut(func(s int64, n int) int { return (n - 1) * int(s%2) })
		has(t, mustOpen(t, again, 0), 2, 2, 4)
		if err == nil {
			return
		}
	}
	t.Error("the unit cannot be written")
}

// Files that cannot be opened say why, and what to do; nothing in them is changed.
func TestRefuses(t *testing.T) {
	good := newDisk()
	f := mustOpen(t, good, 5*Unit)
	put(t, f, 1, 0)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	edit := func(off int64, b ...byte) func(*simDisk) {
		return func(d *simDisk) {
			if _, err := d.WriteAt(b, off); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		change func(*simDisk)
		says   string
	}{
		"foreign":     {edit(0, 'x'), "begins with something else"},
		"version":     {edit(8, 2), "version 2"},
		"damaged":     {edit(32, 1), "checksum"},
		"truncated":   {func(d *simDisk) { d.length-- }, "truncated"},
		"header only": {func(d *simDisk) { d.length = headerSize }, "truncated"},
		"less":        {func(d *simDisk) { d.length = 100 }, "truncated"},
		"zeros":       {func(d *simDisk) { clear(d.now); d.length = headerSize + 1 }, "begins with something else"},
	} {
		t.Run(name, func(t *testing.T) {
			d := good.copy()
			c.change(d)
			was, length := maps.Clone(d.now), d.length
			for _, size := range []int64{0, Unit, 10 * areaSize} {
				if _, err := Open(d, size, nil); !errors.Is(err, ErrFormat) || !strings.Contains(err.Error(), c.says) {
					t.Errorf("open: %v", err)
				}
			}
			if _, err := Size(d); !errors.Is(err, ErrFormat) {
				t.Errorf("size: %v", err)
			}
			if d.length != length || len(d.now) != len(was) {
				t.Error("it was changed")
			}
			for s, b := range was {
				if !bytes.Equal(d.now[s], b) {
					t.Errorf("sector %d was changed", s)
				}
			}
		})
	}
	for name, c := range map[string]struct {
		d    *simDisk
		size int64
	}{"empty, and no size": {newDisk(), 0}, "negative": {newDisk(), -1}, "too large": {newDisk(), MaxSize + 1}} {
		if _, err := Open(c.d, c.size, nil); err == nil {
			t.Errorf("%s: opened", name)
		}
		if c.d.length != 0 {
			t.Errorf("%s: it was changed", name)
		}
	}
}

// A File that is open read-only changes nothing, and reads what is right of what was left pending.
func TestReadOnly(t *testing.T) {
	if _, err := Open(newDisk(), Unit, &Options{ReadOnly: true}); !errors.Is(err, ErrFormat) {
		t.Errorf("an empty file: %v", err)
	}
	d := newDisk()
	f := mustOpen(t, d, 3*Unit)
	put(t, f, 1, 0)
	put(t, f, 2, 1)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	put(t, f, 3, 0)
	put(t, f, 4, 1)
	d.damage(placeAt(0, 1, 0))
	d.left = 0
	d.revive()
	d.left = 1 // nothing may be changed
	r, err := Open(d, 0, &Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	has(t, r, 0, 3)
	has(t, r, 1, 2) // what was written later is damaged, and was never synchronised
	has(t, r, 2, 0)
	if err := r.Sync(); err != nil {
		t.Error(err)
	}
	if _, err := r.WriteAt(contents(5, 0), 0); err == nil {
		t.Error("written")
	}
	if _, err := Open(d, 4*Unit, &Options{ReadOnly: true}); err == nil {
		t.Error("grown")
	}
	if d.left != 1 {
		t.Error("something was changed")
	}
}

// A file that somebody truncates is an error, and is not written.
func TestTruncated(t *testing.T) {
	d := newDisk()
	f := mustOpen(t, d, 2*areaSize)
	put(t, f, 1, 0)
	put(t, f, 2, groupUnits)
	d.length = tableAt(1)
	has(t, f, 0, 1)
	b := make([]byte, Unit)
	if _, err := f.ReadAt(b, areaSize); err == nil {
		t.Error("what was cut off is read")
	}
	if f.PeekAt(b, areaSize) {
		t.Error("what was cut off is peeked at")
	}
	if _, err := f.WriteAt(b, 0); err == nil {
		t.Error("written")
	}
	if err := f.Sync(); err == nil {
		t.Error("synchronised")
	}
	if d.length != tableAt(1) {
		t.Error("the file has grown")
	}
	d.length = fileLength(2 * areaSize) // it is whole again
	if err := f.Sync(); err != nil {
		t.Error(err)
	}
	has(t, f, groupUnits, 2)
}

// Any bytes can be read and written; parts of units keep the rest.
func TestParts(t *testing.T) {
	const size = areaSize + 3*Unit + 1000
	rng := rand.New(rand.NewPCG(7, 7))
	f := mustOpen(t, newDisk(), size)
	want := make([]byte, size)
	for i := range 600 {
		off := rng.Int64N(size)
		if i%2 == 0 {
			off = areaSize - 2*Unit + rng.Int64N(4*Unit)
		}
		n := int(min(rng.Int64N(3*Unit), size-off))
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if m, err := f.WriteAt(b, off); m != n || err != nil {
			t.Fatal(m, err)
		}
		copy(want[off:], b)
		off = rng.Int64N(size)
		b = make([]byte, min(rng.Int64N(20*Unit), size-off))
		if m, err := f.ReadAt(b, off); m != len(b) || err != nil || !bytes.Equal(b, want[off:][:m]) {
			t.Fatalf("%d bytes at %d: %d, %v", len(b), off, m, err)
		}
		if i%50 == 0 {
			if err := f.Sync(); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n, err := f.ReadAt(make([]byte, 10), size-4); n != 4 || err == nil {
		t.Error(n, err)
	}
	if _, err := f.WriteAt(make([]byte, 10), size-4); err == nil {
		t.Error("written beyond the end")
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil || !bytes.Equal(b, want) {
		t.Error(err)
	}
}

func FuzzHeader(f *testing.F) {
	f.Add(header{identity: 1, size: 5}.encode()[:headerUsed], int64(1<<30))
	f.Add([]byte("MPCHECKD"), int64(8))
	f.Fuzz(func(t *testing.T, b []byte, length int64) {
		fix := bytes.Clone(b)
		if len(fix) >= headerUsed { // so that the checksum is no barrier
			binary.LittleEndian.PutUint32(fix[40:], sumHeader(fix))
		}
		for _, b := range [][]byte{b, fix} {
			h, err := decodeHeader(b, length)
			if err != nil {
				if !errors.Is(err, ErrFormat) || h != (header{}) {
					t.Fatalf("%+v, %v", h, err)
				}
				continue
			}
			if h.size < 0 || h.size > MaxSize || fileLength(h.size) > length || fileLength(h.size) < h.size || !bytes.Equal(h.encode()[:headerUsed], b[:headerUsed]) {
				t.Fatalf("%+v of %x", h, b)
			}
		}
	})
}

func FuzzEntry(f *testing.F) {
	b := make([]byte, entrySize)
	f.Add(b, uint64(1), int64(0))
	entry{sum: [2]uint32{5, 6}, state: pending}.put(b, 3, 4)
	f.Add(b, uint64(3), int64(4))
	f.Fuzz(func(t *testing.T, b []byte, identity uint64, unit int64) {
		if len(b) < entrySize {
			return
		}
		fix := bytes.Clone(b)
		binary.LittleEndian.PutUint32(fix[12:], checkOf(fix, identity, unit))
		for _, b := range [][]byte{b, fix} {
			e, ok := getEntry(b, identity, unit)
			if !ok {
				continue
			}
			back := make([]byte, entrySize)
			if e.put(back, identity, unit); !bytes.Equal(back, b[:entrySize]) {
				t.Fatalf("%+v: %x of %x", e, back, b)
			}
			if e.latest() == e.sealed() && e.state&pending != 0 || e.state&pending != 0 && e.seal().sum[e.seal().sealed()] != e.sum[e.other()] {
				t.Fatalf("%+v", e)
			}
		}
	})
}

// moody is a Disk whose n-th operation panics.
type moody struct {
	*simDisk
	n int
}

func (m *moody) mood() {
	if m.n--; m.n == 0 {
		panic("in a bad mood")
	}
}

func (m *moody) ReadAt(p []byte, off int64) (int, error) {
	m.mood()
	return m.simDisk.ReadAt(p, off)
}

func (m *moody) WriteAt(p []byte, off int64) (int, error) {
	m.mood()
	return m.simDisk.WriteAt(p, off)
}

func (m *moody) Sync() error {
	m.mood()
	return m.simDisk.Sync()
}

// Whatever a Disk does, nobody waits for ever, and what was written again after it is there.
func TestPanic(t *testing.T) {
	for n := 1; n < 40; n++ {
		d := newDisk()
		f := mustOpen(t, d, 4*Unit)
		put(t, f, 1, 0)
		m := &moody{d, n}
		f, err := Open(m.simDisk, 0, nil)
		if err != nil {
			t.Fatal(err)
		}
		f.d = m
		panics := 0
		try := func(what func() error) {
			defer func() {
				if recover() != nil {
					panics++
				}
			}()
			if err := what(); err != nil {
				t.Errorf("operation %d: %v", n, err)
			}
		}
		for v := uint64(2); v < 5; v++ {
			for range 2 { // it is returned again
				try(func() error { _, err := f.WriteAt(contents(v, 0), 0); return err })
				try(f.Sync)
			}
		}
		has(t, mustOpen(t, d, 0), 0, 4)
		if panics > 1 {
			t.Errorf("operation %d: %d panics", n, panics)
		}
	}
}
