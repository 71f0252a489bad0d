//go:build linux

package demo

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/bits"
	"math/rand/v2"
)

// format is how memory is divided into records.
type format struct {
	lines  bool // each ends with a newline, and all before it is the key
	record int  // bytes of each, if they are no lines
	key    int  // bytes at the beginning of each to sort by, if they are no lines
}

// end is where the record ends that begins at off.
func (f format) end(b []byte, off int64) int64 {
	if !f.lines {
		return off + int64(f.record)
	}
	return off + int64(bytes.IndexByte(b[off:], '\n')) + 1
}

// begin is the first beginning of a record at or behind off.
func (f format) begin(b []byte, off int64) int64 {
	if !f.lines {
		return (off + int64(f.record) - 1) / int64(f.record) * int64(f.record)
	}
	if off == 0 || b[off-1] == '\n' {
		return off
	}
	return f.end(b, off)
}

// back is the beginning of the record that the byte at off is part of, where lo is the beginning of a record.
func (f format) back(b []byte, lo, off int64) int64 {
	if !f.lines {
		return off - (off-lo)%int64(f.record)
	}
	return lo + int64(bytes.LastIndexByte(b[lo:off], '\n')) + 1
}

// keyOf is the key of a whole record.
func (f format) keyOf(record []byte) []byte {
	if f.lines {
		return record[:len(record)-1]
	}
	return record[:f.key]
}

// cuts divides [0, len(b)) into parts of at least each bytes, but for the last, at beginnings of records: the ends of the parts, none of them empty.
func (f format) cuts(b []byte, each int64) (ends []int64) {
	size := int64(len(b))
	for at := int64(0); at < size; {
		at = min(size, f.begin(b, min(size, at+max(1, each))))
		ends = append(ends, at)
	}
	return ends
}

// prefix is the first eight bytes of a key as a number that is ordered as they are.
func prefix(key []byte) uint64 {
	if len(key) >= 8 {
		return binary.BigEndian.Uint64(key)
	}
	var b [8]byte
	copy(b[:], key)
	return binary.BigEndian.Uint64(b[:])
}

// multiset is a checksum of records that does not depend on their order: their number and the sum of their hashes. What differs in anything but order has the same
// sum with a chance of 1 in 2^64, if nobody is clever.
type multiset struct {
	Records int64
	Sum     uint64
}

func (m *multiset) add(record []byte) {
	m.Records++
	m.Sum += hashOf(record)
}

func (m *multiset) join(o multiset) {
	m.Records += o.Records
	m.Sum += o.Sum
}

func (m multiset) String() string { return fmt.Sprintf("%016x", m.Sum) }

// hashOf mixes eight bytes at a time by multiplication; the length counts too.
func hashOf(b []byte) uint64 {
	const k0, k1 = 0x9e3779b97f4a7c15, 0xd6e8feb86659fd93
	h := uint64(len(b)) ^ k1
	mix := func(v uint64) {
		hi, lo := bits.Mul64(h^v^k0, k1)
		h = hi ^ lo ^ v
	}
	for ; len(b) >= 8; b = b[8:] {
		mix(binary.LittleEndian.Uint64(b))
	}
	var last [8]byte
	copy(last[:], b)
	mix(binary.LittleEndian.Uint64(last[:]))
	mix(k0)
	return h
}

// generator makes the same records each time.
type generator struct {
	format
	seed uint64
}

// generatedPart is how many bytes the generator makes at once, or a little less with records that do not fit evenly.
const generatedPart = 1 << 20

// part makes the records of part i of an input.
func (g generator) part(i int64, dst []byte) (m multiset) {
	rng := rand.New(rand.NewPCG(g.seed, uint64(i)))
	const letters = "abcdefghijklmnopqrstuvwxyz234567"
	if !g.lines {
		for n := int64(0); len(dst) > 0; n++ {
			r := dst[:g.record]
			for j := 0; j < len(r); j += 8 {
				v := rng.Uint64()
				if j >= g.key { // text behind the key: it can be compressed, as most data can
					v = v&0x0f0f0f0f0f0f0f0f | 0x4040404040404040
				}
				var b [8]byte
				binary.LittleEndian.PutUint64(b[:], v)
				copy(r[j:], b[:])
			}
			m.add(r)
			dst = dst[g.record:]
		}
		return m
	}
	for len(dst) > 0 {
		n := 11 + rng.IntN(80)
		if n+11 > len(dst) {
			n = len(dst)
		}
		for j := range n - 1 {
			dst[j] = letters[rng.Uint32()>>27]
		}
		dst[n-1] = '\n'
		m.add(dst[:n])
		dst = dst[n:]
	}
	return m
}

// partSize is how many bytes each part has but the last.
func (g generator) partSize() int64 {
	if g.lines {
		return generatedPart
	}
	return max(1, generatedPart/int64(g.record)) * int64(g.record)
}

// loader copies a file into memory and computes its multiset on the way, from what it read, not from memory.
type loader struct {
	format
	m     multiset
	carry []byte // of a record that is not complete yet
}

// copy reads all of src into dst and calls done for what has been copied. A last line without a newline gets one; dst has room for it.
func (l *loader) copy(dst []byte, src io.Reader, done func(n int) error) error {
	buf := make([]byte, 1<<20)
	at := 0
	for at < len(dst) {
		n, err := io.ReadFull(src, buf)
		if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
			return err
		}
		b := buf[:n]
		if err != nil && at+n == len(dst)-1 && l.lines {
			b = append(b, '\n')
		}
		if err != nil && at+len(b) != len(dst) || err == nil && at+n > len(dst) {
			return fmt.Errorf("the file has changed its size: %w", ErrDiffers)
		}
		l.feed(b)
		at += copy(dst[at:], b)
		if err := done(len(b)); err != nil {
			return err
		}
	}
	return nil
}

// feed takes the next bytes of the file.
func (l *loader) feed(b []byte) {
	for len(b) > 0 {
		have, n := len(l.carry), 0
		if l.lines {
			n = bytes.IndexByte(b, '\n') + 1
		} else if n = l.record - have; n > len(b) {
			n = 0
		}
		if n == 0 {
			l.carry = append(l.carry, b...)
			return
		}
		if have > 0 {
			l.carry = append(l.carry, b[:n]...)
			l.m.add(l.carry)
			l.carry = l.carry[:0]
		} else {
			l.m.add(b[:n])
		}
		b = b[n:]
	}
}
