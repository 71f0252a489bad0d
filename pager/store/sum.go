package store

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"unsafe"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Sum is the CRC-32C of one slot's contents.
func Sum(slot []byte) uint32 {
	if wide && len(slot) == SlotSize {
		return sumWide(unsafe.SliceData(slot))
	}
	return crc32.Update(0, castagnoli, slot)
}

// PutSums writes the checksums of data's slots to sums, four bytes for each.
func PutSums(sums, data []byte) {
	for i := 0; len(data) > 0; i++ {
		binary.LittleEndian.PutUint32(sums[4*i:], Sum(data[:SlotSize]))
		data = data[SlotSize:]
	}
}

// CheckSums compares data's slots with what PutSums wrote. It returns how many leading slots are right, and an error that wraps ErrCorrupt if
// not all are. s is the first slot, for the message.
func CheckSums(sums, data []byte, s Slot) (good int, err error) {
	for ; len(data) > 0; good++ {
		want, got := binary.LittleEndian.Uint32(sums[4*good:]), Sum(data[:SlotSize])
		if want != got {
			return good, fmt.Errorf("check slot %d: CRC-32C is %08x, was %08x when written: %w", s+Slot(good), got, want, ErrCorrupt)
		}
		data = data[SlotSize:]
	}
	return good, nil
}
