package checked

import (
	"bytes"
	"errors"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const sector = 512

// errDead is what a disk says when process or machine have died.
var errDead = errors.New("dead")

// simDisk is a file on a disk with a cache. What is written is in the cache until a Sync. When the machine dies, each sector has any one of the contents
// that it had since the last Sync. When only the process dies, the cache stays.
type simDisk struct {
	mu     sync.Mutex
	rng    *rand.Rand
	length int64
	lens   []int64            // lengths since the last Sync, and the one it made safe
	now    map[int64][]byte   // by sector, as it is read; absent: zeros
	was    map[int64][][]byte // by sector that was written since the last Sync: all that it had, oldest first; nil: zeros
	left   int                // operations until the death; negative: never
	lie    func(n int) bool   // nil, or whether the n-th Sync, from 1 on, does nothing
	syncs  int
	bad    func(off, n int64) error // nil, or what is wrong with a read
	full   bool                     // writes end after a part, with ENOSPC
	slow   bool                     // operations take a while, others' go on
}

func newSimDisk(rng *rand.Rand) *simDisk {
	return &simDisk{rng: rng, lens: []int64{0}, now: map[int64][]byte{}, was: map[int64][][]byte{}, left: -1}
}

// dawdle is called without mu.
func (d *simDisk) dawdle() {
	if d.slow && rand.IntN(3) == 0 {
		time.Sleep(time.Duration(rand.IntN(50)) * time.Microsecond)
	}
}

// step is called with mu before each operation that changes something. dying: it is the last one, and comes to nothing or to a part.
func (d *simDisk) step() (dying bool, err error) {
	if d.left == 0 {
		return false, errDead
	}
	if d.left > 0 {
		d.left--
	}
	return d.left == 0, nil
}

func (d *simDisk) get(s int64) []byte {
	if b := d.now[s]; b != nil {
		return b
	}
	return zeros[:sector]
}

// put changes a part of a sector.
func (d *simDisk) put(s int64, in int, p []byte) {
	old := d.now[s]
	if d.was[s] == nil {
		d.was[s] = [][]byte{old}
	}
	b := bytes.Clone(d.get(s))
	copy(b[in:], p)
	d.now[s] = b
	d.was[s] = append(d.was[s], b)
}

func (d *simDisk) read(p []byte, off int64) (int, error) {
	if d.bad != nil {
		if err := d.bad(off, int64(len(p))); err != nil {
			return 0, err
		}
	}
	n := int(min(int64(len(p)), max(0, d.length-off)))
	for i := 0; i < n; {
		at := off + int64(i)
		i += copy(p[i:n], d.get(at / sector)[at%sector:])
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (d *simDisk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left == 0 {
		return 0, errDead
	}
	return d.read(p, off)
}

func (d *simDisk) PeekAt(p []byte, off int64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	n, err := d.read(p, off)
	return n == len(p) && err == nil && d.left != 0
}

func (d *simDisk) WriteAt(p []byte, off int64) (int, error) {
	d.dawdle()
	defer d.dawdle()
	d.mu.Lock()
	defer d.mu.Unlock()
	dying, err := d.step()
	if err != nil {
		return 0, err
	}
	n := len(p)
	if d.full {
		n, err = d.rng.IntN(n+1)&^(sector-1), unix.ENOSPC
	}
	if dying { // of contents whole units; of entries any
		n, err = d.rng.IntN(n+1), errDead
		if len(p) >= Unit {
			n &^= Unit - 1
		} else {
			n &^= entrySize - 1
		}
	}
	for i := 0; i < n; {
		at := off + int64(i)
		m := min(n-i, int(sector-at%sector))
		d.put(at/sector, int(at%sector), p[i:i+m])
		i += m
	}
	d.grown(max(d.length, off+int64(n)))
	return n, err
}

func (d *simDisk) grown(n int64) {
	if n != d.length {
		d.length = n
		d.lens = append(d.lens, n)
	}
}

func (d *simDisk) Sync() error {
	d.dawdle()
	defer d.dawdle()
	d.mu.Lock()
	defer d.mu.Unlock()
	dying, err := d.step()
	if err != nil || dying {
		return errDead
	}
	if d.syncs++; d.lie != nil && d.lie(d.syncs) {
		return nil
	}
	d.was, d.lens = map[int64][][]byte{}, []int64{d.length}
	return nil
}

func (d *simDisk) Length() (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.length, nil
}

func (d *simDisk) Truncate(n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dying, err := d.step(); err != nil || dying {
		return errDead
	}
	d.grown(n)
	return nil
}

func (d *simDisk) Punch(off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if dying, err := d.step(); err != nil || dying && d.rng.IntN(2) == 0 {
		return errDead
	}
	for s := off / sector; s < (off+n)/sector; s++ {
		d.put(s, 0, zeros[:sector])
	}
	return nil
}

func (d *simDisk) Data(off int64) (int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	next := int64(-1)
	for s, b := range d.now {
		if end := (s + 1) * sector; end > off && (next < 0 || s*sector < next) && !bytes.Equal(b, zeros[:sector]) {
			next = s * sector
		}
	}
	if next < 0 {
		return 0, io.EOF
	}
	return max(next, off), nil
}

// power is the death of the machine: what is on the device is what there is, and the next Sync finds nothing to do.
func (d *simDisk) power() { d.powerBut(func(_ int64, n int) int { return d.rng.IntN(n) }) }

// powerBut has choose say which of the n contents that a sector had is on the device.
func (d *simDisk) powerBut(choose func(sector int64, n int) int) {
	for _, s := range slices.Sorted(maps.Keys(d.was)) {
		all := d.was[s]
		d.now[s] = all[choose(s, len(all))]
	}
	d.length = d.lens[d.rng.IntN(len(d.lens))]
	d.revive()
	d.was, d.lens = map[int64][][]byte{}, []int64{d.length}
}

// copy is another disk with the same on it, all of it safe.
func (d *simDisk) copy() *simDisk {
	c := newSimDisk(rand.New(rand.NewPCG(1, 1)))
	c.now, c.length, c.lens = maps.Clone(d.now), d.length, []int64{d.length}
	return c
}

// revive lets a new process use what is left.
func (d *simDisk) revive() { d.left = -1 }

// damage changes a byte of a file by hand.
func (d *simDisk) damage(off int64) {
	b := bytes.Clone(d.get(off / sector))
	b[off%sector] ^= 1 << d.rng.IntN(8)
	d.now[off/sector] = b
}
