package store

import "golang.org/x/sys/cpu"

// wide: the processor multiplies without carries 64 bytes at a time. The checksum of a slot that is not in a cache then costs little more than to bring it there, where
// hash/crc32 takes as long as the copy of a fault.
var wide = cpu.X86.HasAVX512F && cpu.X86.HasAVX512VPCLMULQDQ && cpu.X86.HasPCLMULQDQ && cpu.X86.HasSSE42

// sumWide is Sum of SlotSize bytes, by folding: Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009. It
// reads nothing else.
//
//go:noescape
func sumWide(slot *byte) uint32
