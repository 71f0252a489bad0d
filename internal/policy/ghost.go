package policy

import "math/bits"

// ghosts remembers units that were evicted, with their level and when, in 8 bytes each: sets of eight, one cache line, in which the oldest gives way.
// Units are known by a fingerprint of 24 bits: one look-up in two million finds a unit that it does not mean.
type ghosts struct {
	sets [][8]uint64 // a power of two of them; fingerprint<<40 | level<<32 | stamp; 0: free
}

// resize makes room for at least n ghosts. It forgets what was there if the room changes.
func (g *ghosts) resize(n int64) {
	size := int64(1) << bits.Len64(uint64((max(n, 8)+7)/8-1))
	if size != int64(len(g.sets)) {
		g.sets = make([][8]uint64, size)
	}
}

func (g *ghosts) set(hash uint64) (*[8]uint64, uint64) {
	return &g.sets[hash&uint64(len(g.sets)-1)], hash >> 40 << 40 // neighbours lie in neighbouring sets, which fills them evenly
}

// add remembers a unit.
func (g *ghosts) add(hash uint64, level int, now uint32) {
	set, print := g.set(hash)
	at, age := 0, uint32(0)
	for i, v := range set {
		if v == 0 || v>>40<<40 == print {
			at = i
			break
		}
		if a := now - uint32(v); a >= age {
			at, age = i, a
		}
	}
	set[at] = print | uint64(level)<<32 | uint64(now)
	if set[at] == 0 { // fingerprint, level and stamp all 0
		set[at] = 1
	}
}

// find returns level and age of a unit that is remembered.
func (g *ghosts) find(hash uint64, now uint32) (level int, age uint32, ok bool) {
	set, print := g.set(hash)
	for _, v := range set {
		if v != 0 && v>>40<<40 == print {
			return int(v >> 32 & 0xff), now - uint32(v), true
		}
	}
	return 0, 0, false
}

func (g *ghosts) bytes() int64 { return int64(len(g.sets)) * 64 }
