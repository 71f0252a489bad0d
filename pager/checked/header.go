package checked

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"

	"golang.org/x/sys/unix"
)

// Unit is what has a checksum of its own, in bytes.
const Unit = 4096

const (
	version    = 1
	headerSize = 4096
	groupUnits = 512
	entrySize  = 16
	tableSize  = groupUnits * entrySize
	areaSize   = groupUnits * Unit // contents of a group
	groupSize  = tableSize + 2*areaSize
	headerUsed = 44 // bytes of the header; within one sector, so that the device writes it as one
)

// MaxSize is the largest size of contents, in bytes.
const MaxSize = math.MaxInt64/groupSize*areaSize - areaSize

var (
	// ErrFormat says that a file is none that this package can open, and why. Nothing in it was changed.
	ErrFormat = errors.New("not a checked file that can be used")
	// ErrTorn says that contents are not what was written.
	ErrTorn = errors.New("what is in the file is not what was written")
)

var magic = [8]byte{'M', 'P', 'C', 'H', 'E', 'C', 'K', 'D'}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// header is what a file begins with.
type header struct {
	identity uint64 // random; not 0
	size     int64  // of the contents, in bytes
}

func (h header) encode() []byte {
	b := make([]byte, headerSize)
	copy(b, magic[:])
	for i, v := range []uint32{version, Unit, groupUnits, 0} {
		binary.LittleEndian.PutUint32(b[8+4*i:], v)
	}
	binary.LittleEndian.PutUint64(b[24:], h.identity)
	binary.LittleEndian.PutUint64(b[32:], uint64(h.size))
	binary.LittleEndian.PutUint32(b[40:], sumHeader(b))
	return b
}

func sumHeader(b []byte) uint32 { return crc32.Checksum(b[:40], castagnoli) }

// decodeHeader reads the header of a file that is not empty; b is what it begins with, length its length in bytes.
func decodeHeader(b []byte, length int64) (h header, err error) {
	bad := func(format string, args ...any) (header, error) {
		return header{}, fmt.Errorf(format+": %w: %w", append(args, ErrFormat, unix.EINVAL)...)
	}
	var word [4]uint32
	if len(b) >= headerUsed {
		for i := range word {
			word[i] = binary.LittleEndian.Uint32(b[8+4*i:])
		}
	}
	switch {
	case !bytes.HasPrefix(b, magic[:]):
		return bad("the file begins with something else (for one that is as it is, use the manager \"file\"; for a new one, give an empty file)")
	case len(b) < headerUsed || length < headerSize:
		return bad("the file has %d bytes, less than its header (it was truncated: bring it back from a copy)", length)
	case word[0] != version:
		return bad("the file's format is of version %d, this program knows %d (use the program that made it)", word[0], version)
	case sumHeader(b) != binary.LittleEndian.Uint32(b[40:]):
		return bad("the header's checksum is not right: it is damaged (bring the file back from a copy)")
	}
	h = header{identity: binary.LittleEndian.Uint64(b[24:]), size: int64(binary.LittleEndian.Uint64(b[32:]))}
	switch {
	case word[1] != Unit || word[2] != groupUnits || word[3] != 0 || h.identity == 0 || h.size < 0 || h.size > MaxSize:
		return bad("the header says units of %d bytes, %d in a group, flags %#x, size %d, which version %d does not have (use the program that made it)", word[1], word[2], word[3], h.size, version)
	case length < fileLength(h.size):
		return bad("the file has %d bytes, and must have %d for contents of %d: it was truncated (bring it back from a copy)", length, fileLength(h.size), h.size)
	}
	return h, nil
}

// fileLength is how long a file with contents of size bytes is.
func fileLength(size int64) int64 {
	return headerSize + (size+areaSize-1)/areaSize*groupSize
}

func tableAt(group int64) int64 { return headerSize + group*groupSize }

// placeAt is where a unit of a group has a place.
func placeAt(group int64, unit, place int) int64 {
	return tableAt(group) + tableSize + int64(place)*areaSize + int64(unit)*Unit
}
