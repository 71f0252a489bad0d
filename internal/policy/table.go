package policy

import "math/bits"

const (
	chunkShift = 10 // units are allocated 1024 at a time and never moved: 32 KiB
	chunkSize  = 1 << chunkShift
)

// unit is what is resident or free. Units are named by index, 0 is none.
type unit struct {
	object     uint64
	place      uint64 // frame<<16 | order<<8 | touched | inUse | queue
	chain      uint32 // the next unit in the bucket, or in the free list
	prev, next uint32 // in the queue
	stamp      uint32 // the clock when it entered the queue
}

const (
	touched   = 1 << 7 // seen to be used since it entered the queue
	inUse     = 1 << 6
	queueMask = 1<<6 - 1
)

func placeOf(frame int64, order uint) uint64 { return uint64(frame)<<16 | uint64(order)<<8 }

func (u *unit) frame() int64 { return int64(u.place >> 16) }
func (u *unit) order() uint  { return uint(u.place >> 8 & 0xff) }
func (u *unit) frames() int64 {
	return 1 << u.order()
}
func (u *unit) queue() int { return int(u.place & queueMask) }

func (u *unit) setQueue(q int) { u.place = u.place&^queueMask | uint64(q) }

// table finds units by object, frame and order: a hash table with chains, in memory without pointers.
type table struct {
	seed    uint64
	buckets []uint32 // a power of two of them
	chunks  [][]unit
	used    uint32    // units of chunks that were ever in use, including unit 0
	free    uint32    // list by chain
	live    int64     // units in the buckets
	orders  uint      // bit i: units of order i are there
	count   [10]int64 // units of each order
}

func (t *table) at(i uint32) *unit { return &t.chunks[i>>chunkShift][i&(chunkSize-1)] }

// hash of what names a unit. The last four bits count units in a row, the others are the same for sixteen of them: so runs are looked up in few cache lines.
func (t *table) hash(object, place uint64) uint64 {
	n := place >> 16 >> (place >> 8 & 0xff)
	h := (object ^ t.seed) * 0x9e3779b97f4a7c15
	h = (h ^ h>>32 ^ n>>4<<8 ^ place>>8&0xff) * 0xd6e8feb86659fd93
	h = (h ^ h>>32) * 0xd6e8feb86659fd93
	return (h^h>>32)&^15 | n&15
}

// resize makes as many buckets as units are expected, and puts the units into them.
func (t *table) resize(n int64) {
	size := int64(1) << bits.Len64(uint64(max(n, 64)-1))
	if size == int64(len(t.buckets)) {
		return
	}
	old := t.buckets
	t.buckets = make([]uint32, size)
	for _, i := range old {
		for i != 0 {
			u := t.at(i)
			next := u.chain
			b := t.bucket(u.object, u.place)
			u.chain, *b = *b, i
			i = next
		}
	}
}

func (t *table) bucket(object, place uint64) *uint32 {
	return &t.buckets[t.hash(object, place)&uint64(len(t.buckets)-1)]
}

// find returns the unit, 0 if it is not there.
func (t *table) find(object uint64, frame int64, order uint) uint32 {
	place := placeOf(frame, order)
	i := *t.bucket(object, place)
	for i != 0 {
		u := t.at(i)
		if u.place>>8 == place>>8 && u.object == object {
			return i
		}
		i = u.chain
	}
	return 0
}

// covering returns the unit that the frame lies in, 0 if it is not resident.
func (t *table) covering(object uint64, frame int64) uint32 {
	for m := t.orders; m != 0; m &= m - 1 {
		order := uint(bits.TrailingZeros(m))
		if i := t.find(object, frame>>order<<order, order); i != 0 {
			return i
		}
	}
	return 0
}

// insert makes a unit, which is in no queue yet.
func (t *table) insert(object uint64, frame int64, order uint) uint32 {
	i := t.free
	if i != 0 {
		t.free = t.at(i).chain
	} else {
		if t.used == 0 {
			t.used = 1
		}
		if i = t.used; i>>chunkShift >= uint32(len(t.chunks)) {
			t.chunks = append(t.chunks, make([]unit, chunkSize))
		}
		t.used++
	}
	place := placeOf(frame, order)
	b := t.bucket(object, place)
	*t.at(i) = unit{object: object, place: place | inUse, chain: *b}
	*b = i
	t.live++
	t.count[order]++
	t.orders |= 1 << order
	return i
}

// remove frees a unit that is in no queue.
func (t *table) remove(i uint32) {
	u := t.at(i)
	b := t.bucket(u.object, u.place)
	for *b != i {
		b = &t.at(*b).chain
	}
	*b = u.chain
	order := u.order()
	*u = unit{chain: t.free}
	t.free = i
	t.live--
	if t.count[order]--; t.count[order] == 0 {
		t.orders &^= 1 << order
	}
}

// bytes of memory held.
func (t *table) bytes() int64 { return int64(len(t.buckets))*4 + int64(len(t.chunks))*chunkSize*32 }
