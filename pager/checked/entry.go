package checked

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"

	"machpager/pager/store"
)

// entry is what a table says of a unit. The zero value: never written.
type entry struct {
	sum   [2]uint32 // by place
	state uint32
}

const (
	sealedPlace = 1 << iota // the place that counts is place 1, not 0
	pending                 // the other place has what was written later, if its sum is right
	lost                    // what the sealed place had was lost: nothing tells any more what it was
	states      = sealedPlace | pending | lost
)

func (e entry) sealed() int { return int(e.state & sealedPlace) }
func (e entry) other() int  { return 1 - e.sealed() }

// latest is the place that was written last.
func (e entry) latest() int {
	if e.state&pending != 0 {
		return e.other()
	}
	return e.sealed()
}

// gone reports whether it says that what the place had was lost.
func (e entry) gone(place int) bool { return e.state&lost != 0 && place == e.sealed() }

// zeros reports whether it says that the place is zeros.
func (e entry) zeros(place int) bool { return e.sum[place] == 0 && !e.gone(place) }

// write is the entry when the other place has contents with a sum.
func (e entry) write(sum uint32) entry {
	e.sum[e.other()] = sum
	e.state |= pending
	return e
}

// seal is the entry when the other place counts. Called of pending ones.
func (e entry) seal() entry {
	n := e.other()
	if e.sum[n] == 0 {
		return entry{}
	}
	s := entry{state: uint32(n)}
	s.sum[n] = e.sum[n]
	return s
}

// back is the entry when what is pending does not count.
func (e entry) back() entry {
	e.sum[e.other()] = 0
	e.state &^= pending
	return e
}

// put encodes the entry of a unit of a file.
func (e entry) put(b []byte, identity uint64, unit int64) {
	if e == (entry{}) {
		clear(b[:entrySize])
		return
	}
	binary.LittleEndian.PutUint32(b, e.sum[0])
	binary.LittleEndian.PutUint32(b[4:], e.sum[1])
	binary.LittleEndian.PutUint32(b[8:], e.state)
	binary.LittleEndian.PutUint32(b[12:], checkOf(b, identity, unit))
}

// getEntry decodes it. false: it is damaged, or another's.
func getEntry(b []byte, identity uint64, unit int64) (e entry, ok bool) {
	if [entrySize]byte(b) == ([entrySize]byte{}) {
		return entry{}, true
	}
	e = entry{sum: [2]uint32{binary.LittleEndian.Uint32(b), binary.LittleEndian.Uint32(b[4:])}, state: binary.LittleEndian.Uint32(b[8:])}
	if binary.LittleEndian.Uint32(b[12:]) != checkOf(b, identity, unit) || e.state&^states != 0 || e == (entry{}) {
		return entry{}, false
	}
	return e, true
}

func checkOf(b []byte, identity uint64, unit int64) uint32 {
	var c [28]byte
	copy(c[:], b[:12])
	binary.LittleEndian.PutUint64(c[12:], identity)
	binary.LittleEndian.PutUint64(c[20:], uint64(unit))
	return crc32.Checksum(c[:], castagnoli)
}

var zeros [Unit]byte

// sumOfZeros is the checksum that zeros have.
var sumOfZeros = store.Sum(zeros[:])

// sumOf is the sum of a unit's contents: 0 for zeros, and for nothing else.
func sumOf(unit []byte) uint32 {
	switch s := store.Sum(unit); {
	case s == sumOfZeros && bytes.Equal(unit, zeros[:]):
		return 0
	case s == 0:
		return 1
	default:
		return s
	}
}
