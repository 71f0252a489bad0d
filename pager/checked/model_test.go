package checked

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// seedEnv is the seed of the one history that TestModel is to run.
const seedEnv = "MACHPAGER_SEED"

// model is what may be in a File. A version is contents of a unit: 0 is zeros.
type model struct {
	rng   *rand.Rand
	d     *simDisk
	f     *File
	units []modelUnit
	ends  []int // by version, from 1 on: how many bytes of a unit it has, for the contents may have ended there
	sizes []int64
}

// modelUnit is what is known of a unit.
type modelUnit struct {
	safe  uint64   // what Sync has made safe, or something later
	now   uint64   // what was written last
	later []uint64 // what may have been written since it was made safe
	open  bool     // a write of it failed: it may have anything of what was written since it was made safe
	mine  bool     // the last was written in this life
	lost  bool     // what was safe was damaged: until a Sync it may be torn
}

func (u *modelUnit) wrote(v uint64) {
	u.later = append(u.later, v)
	u.now = v
}

const modelSize = 2*areaSize + 5*Unit + 100

// contents is a version with a mark in each sector, so that every mixture tells.
func contents(v uint64, unit int) []byte {
	b := make([]byte, Unit)
	if v != 0 {
		for i := 0; i < Unit; i += 8 {
			binary.LittleEndian.PutUint64(b[i:], v*0x9e3779b97f4a7c15+uint64(unit))
		}
	}
	return b
}

// of is what a unit has of a version.
func (m *model) of(v uint64, unit int) []byte {
	b := contents(v, unit)
	if v > 0 {
		clear(b[m.ends[v-1]:])
	}
	return b
}

func newModel(seed uint64) *model {
	rng := rand.New(rand.NewPCG(seed, seed))
	return &model{rng: rng, d: newSimDisk(rng), units: make([]modelUnit, (modelSize+Unit-1)/Unit)}
}

// open opens the file, at a size that only grows.
func (m *model) open() error {
	size := int64(modelSize)
	if m.rng.IntN(4) > 0 && len(m.sizes) == 0 {
		size = int64(1 + m.rng.IntN(modelSize))
	}
	if n := len(m.sizes); n > 0 {
		size = max(size, m.sizes[n-1])
	}
	f, err := Open(m.d, size, nil)
	if err == nil {
		m.f, m.sizes = f, append(m.sizes, size)
	}
	return err
}

func (m *model) size() int64 { return m.f.Size() }

// somewhere is a run of units, mostly one of few, about the edge of a group.
func (m *model) somewhere() (first, n int) {
	count := int((m.size() + Unit - 1) / Unit)
	first = m.rng.IntN(min(count, 6))
	switch m.rng.IntN(4) {
	case 0:
		first = max(0, min(count, groupUnits+3)-6) + m.rng.IntN(min(count, 6))
		first = min(first, count-1)
	case 1:
		first = count - 1
	}
	return first, min(1+m.rng.IntN(4), count-first)
}

// write writes new versions.
func (m *model) write(first, n int) error {
	var p []byte
	vs := make([]uint64, n)
	for i := range n {
		if m.rng.IntN(6) > 0 {
			m.ends = append(m.ends, int(min(Unit, m.size()-int64(first+i)*Unit)))
			vs[i] = uint64(len(m.ends))
		}
		p = append(p, contents(vs[i], first+i)...)
	}
	off := int64(first) * Unit
	p = p[:min(int64(len(p)), m.size()-off)]
	_, err := m.f.WriteAt(p, off)
	for i, v := range vs {
		m.units[first+i].wrote(v)
		m.units[first+i].open, m.units[first+i].mine = err != nil, true
	}
	return err
}

// sync synchronises. What it must make safe is what was written before.
func (m *model) sync() error {
	if m.d.left > 0 && m.rng.IntN(6) == 0 {
		m.d.left = min(m.d.left, 1+m.rng.IntN(6)) // to die in here
	}
	if err := m.f.Sync(); err != nil {
		return err
	}
	for i := range m.units {
		if u := &m.units[i]; !u.open {
			u.safe, u.later, u.lost = u.now, nil, false
		}
	}
	return nil
}

// check reads all units that were ever written. exact: those that no failed write has touched must be what was written last.
func (m *model) check(exact bool) error {
	count := int((m.size() + Unit - 1) / Unit)
	for i := range m.units[:count] {
		u := &m.units[i]
		if u.now == 0 && u.safe == 0 && u.later == nil {
			continue
		}
		off := int64(i) * Unit
		b := make([]byte, min(Unit, m.size()-off))
		if _, err := m.f.ReadAt(b, off); err != nil {
			if u.lost && errors.Is(err, ErrTorn) && (!exact || u.open) {
				continue
			}
			return fmt.Errorf("unit %d: %w", i, err)
		}
		may := append([]uint64{u.safe}, u.later...)
		if exact && !u.open {
			may = []uint64{u.now}
		}
		at := slices.IndexFunc(may, func(v uint64) bool { return bytes.Equal(b, m.of(v, i)[:len(b)]) })
		if at < 0 {
			return fmt.Errorf("unit %d has %x, want of versions %d (safe %d, last %d)", i, b[:8], may, u.safe, u.now)
		}
		if p := make([]byte, len(b)); m.f.PeekAt(p, off) && !bytes.Equal(p, b) {
			return fmt.Errorf("unit %d: PeekAt gives something else", i)
		}
	}
	return nil
}

// died takes what is there after a death for what there is.
func (m *model) died() error {
	count := int((m.size() + Unit - 1) / Unit)
	for i := range m.units {
		u := &m.units[i]
		if u.later == nil {
			continue
		}
		if i >= count { // the machine died before the file had grown
			u.open, u.mine = true, false
			continue
		}
		off := int64(i) * Unit
		b := make([]byte, min(Unit, m.size()-off))
		if _, err := m.f.ReadAt(b, off); errors.Is(err, ErrTorn) && u.lost {
			if err := m.write(i, 1); err != nil { // as its user would heal it
				return err
			}
			continue
		} else if err != nil {
			return fmt.Errorf("unit %d: %w", i, err)
		}
		for _, v := range append([]uint64{u.safe}, u.later...) {
			if bytes.Equal(b, m.of(v, i)[:len(b)]) {
				u.now = v
			}
		}
		u.open, u.mine = false, false
	}
	return nil
}

// torn damages what was synchronised, or written in this life, and sees to it that it is an error; then it heals.
func (m *model) torn() error {
	first, _ := m.somewhere()
	u := &m.units[first]
	off := int64(first) * Unit
	if u.later != nil && !u.mine || u.open || u.now == 0 || m.size()-off < Unit {
		return nil
	}
	group, unit := off/areaSize, int(off%areaSize/Unit)
	at := tableAt(group) + int64(unit)*entrySize
	var raw [entrySize]byte
	if _, err := m.d.ReadAt(raw[:], at); err != nil {
		return err
	}
	e, ok := getEntry(raw[:], m.f.head.identity, int64(first))
	if !ok {
		return errors.New("the entry is damaged")
	}
	if m.rng.IntN(3) == 0 {
		m.d.damage(at + m.rng.Int64N(entrySize))
	} else {
		m.d.damage(placeAt(group, unit, e.latest()) + m.rng.Int64N(Unit))
	}
	b := make([]byte, Unit)
	if _, err := m.f.ReadAt(b, off); !errors.Is(err, ErrTorn) {
		return fmt.Errorf("unit %d was damaged (entry %+v), and reads as %x, version %d is %x: %w", first, e, b[:8], u.now, contents(u.now, first)[:8], err)
	}
	if m.f.PeekAt(b, off) {
		return fmt.Errorf("unit %d was damaged, and PeekAt gives it", first)
	}
	if _, err := m.f.WriteAt(b[:7], off); !errors.Is(err, ErrTorn) {
		return fmt.Errorf("a part of unit %d, which is damaged, was written: %w", first, err)
	}
	u.lost = true
	return m.write(first, 1)
}

// run is a history: lives that end with the death of process or machine.
func (m *model) run(steps int) error {
	for life := range 4 {
		m.d.left = -1
		if life < 3 {
			m.d.left = 1 + m.rng.IntN(60)
		}
		err := m.open()
		if err == nil && life > 0 {
			if err = m.check(false); err != nil && !errors.Is(err, errDead) {
				return fmt.Errorf("life %d: opened again: %w", life, err)
			}
		}
		for i := 0; i < steps && err == nil; i++ {
			err = m.step()
		}
		if err != nil && !errors.Is(err, errDead) {
			return fmt.Errorf("life %d: %w", life, err)
		}
		dead := m.d.left == 0
		power := m.rng.IntN(2) == 0
		if power && (dead || m.rng.IntN(2) == 0) {
			m.d.power()
		}
		m.d.revive()
		if m.f == nil {
			continue
		}
		size := m.sizes[len(m.sizes)-1]
		if power {
			if m.f, err = Open(m.d, size, nil); err != nil {
				return fmt.Errorf("life %d: open after the death of the machine: %w", life, err)
			}
			if err := m.check(false); err != nil {
				return fmt.Errorf("life %d: after the death of the machine: %w", life, err)
			}
		} else {
			if m.f, err = Open(m.d, size, nil); err != nil {
				return fmt.Errorf("life %d: open after the death of the process: %w", life, err)
			}
			if err := m.check(true); err != nil {
				return fmt.Errorf("life %d: after the death of the process: %w", life, err)
			}
		}
		if err := m.died(); err != nil {
			return err
		}
	}
	return nil
}

func (m *model) step() error {
	switch m.rng.IntN(10) {
	case 0, 1:
		return m.sync()
	case 2:
		return m.check(true)
	case 3:
		return m.torn()
	case 4: // no room, for a while
		m.d.full = true
		first, n := m.somewhere()
		err := m.write(first, n)
		m.d.full = false
		switch {
		case errors.Is(err, errDead):
			return err
		case m.rng.IntN(3) == 0: // another time
			return nil
		}
		return m.write(first, n) // the vm returns it again
	default:
		return m.write(m.somewhere())
	}
}

// TestModel runs random histories on a disk that tears and reorders. A unit is what was synchronised last, or what was written later; what completed before the death of the
// process alone is there; and what is damaged by hand is an error.
func TestModel(t *testing.T) {
	if seed, err := strconv.ParseUint(os.Getenv(seedEnv), 10, 64); err == nil {
		if err := newModel(seed).run(40); err != nil {
			t.Fatal(err)
		}
		return
	}
	base, begun := uint64(time.Now().UnixNano()), time.Now()
	soak, _ := time.ParseDuration(os.Getenv("MACHPAGER_SOAK"))
	n := uint64(0)
	for ; n < 1000 && time.Since(begun) < 3*time.Second || time.Since(begun) < soak; n++ {
		if err := newModel(base + n).run(40); err != nil {
			t.Fatalf("%v\n%s=%d go test -run TestModel", err, seedEnv, base+n)
		}
	}
	t.Logf("%d histories in %v, from seed %d on", n, time.Since(begun), base)
}

// together is units that several write while another one synchronises. The versions of a unit count up; every fifth is zeros.
type together struct {
	begun, done [12]atomic.Uint64
	safe        [12]uint64
}

func (g *together) contents(v uint64, unit int) []byte {
	if v%5 == 0 {
		v = 0
	}
	return contents(v, unit)
}

// live writes and synchronises until the disk is dead.
func (g *together) live(t *testing.T, f *File, seed uint64) {
	var wg sync.WaitGroup
	const writers = 3
	for w := range writers {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(seed, uint64(w)))
			for {
				first := rng.IntN(len(g.begun) / writers)
				n := 1 + rng.IntN(len(g.begun)/writers-first)
				first += w * len(g.begun) / writers
				var p []byte
				for i := first; i < first+n; i++ {
					p = append(p, g.contents(g.begun[i].Add(1), i)...)
				}
				if _, err := f.WriteAt(p, int64(first)*Unit); err != nil {
					if !errors.Is(err, errDead) {
						t.Error(err)
					}
					return
				}
				for i := first; i < first+n; i++ {
					g.done[i].Store(g.begun[i].Load())
				}
				b := make([]byte, Unit)
				if _, err := f.ReadAt(b, int64(first)*Unit); err == nil && !bytes.Equal(b, p[:Unit]) {
					t.Errorf("unit %d is not what was written", first)
				} else if err != nil && !errors.Is(err, errDead) {
					t.Error(err)
				}
				if b := make([]byte, Unit); f.PeekAt(b, int64(first)*Unit) && !bytes.Equal(b, p[:Unit]) {
					t.Errorf("unit %d is not what was written, by PeekAt", first)
				}
			}
		})
	}
	wg.Go(func() {
		for {
			var now [len(g.safe)]uint64
			for i := range now {
				now[i] = g.done[i].Load()
			}
			if err := f.Sync(); err != nil {
				if !errors.Is(err, errDead) {
					t.Error(err)
				}
				return
			}
			g.safe = now
		}
	})
	wg.Wait()
}

// TestTogether has writers and Sync run side by side until process or machine dies.
func TestTogether(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	for begun := time.Now(); time.Since(begun) < 3*time.Second; {
		seed++
		rng := rand.New(rand.NewPCG(seed, 0))
		d, g := newSimDisk(rng), &together{}
		f, err := Open(d, int64(len(g.safe))*Unit, nil)
		if err != nil {
			t.Fatal(err)
		}
		for life := range 4 {
			d.mu.Lock()
			d.left, d.slow = 1+rng.IntN(150), true
			d.mu.Unlock()
			g.live(t, f, seed)
			power := rng.IntN(2) == 0
			if power {
				d.power()
			}
			d.revive()
			if f, err = Open(d, 0, nil); err != nil {
				t.Fatal(err)
			}
			for i := range g.safe {
				b := make([]byte, Unit)
				if _, err := f.ReadAt(b, int64(i)*Unit); err != nil {
					t.Fatalf("seed %d, life %d, power %t: unit %d: %v", seed, life, power, i, err)
				}
				begun, done := g.begun[i].Load(), g.done[i].Load()
				v := begun
				for v > g.safe[i] && !bytes.Equal(b, g.contents(v, i)) {
					v--
				}
				if !bytes.Equal(b, g.contents(v, i)) {
					t.Fatalf("seed %d, life %d, power %t: unit %d has %x; version %d was safe, %d written, %d begun", seed, life, power, i, b[:8], v, done, begun)
				}
				if v < done && !power && begun == done {
					t.Fatalf("seed %d, life %d: unit %d has version %d, %d was written before the process died", seed, life, i, v, done)
				}
				g.begun[i].Store(v)
				g.done[i].Store(v)
			}
		}
	}
}
