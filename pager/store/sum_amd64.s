#include "textflag.h"

// x^(2048+32), x^(2048-32) modulo the polynomial, reflected and shifted by one: what carries 16 bytes 256 bytes on.
DATA fold256<>+0(SB)/8, $0xdcb17aa4
DATA fold256<>+8(SB)/8, $0xb9e02b86
GLOBL fold256<>(SB), RODATA, $16

// The same for 64 bytes.
DATA fold64<>+0(SB)/8, $0x740eef02
DATA fold64<>+8(SB)/8, $0x9e4addf8
GLOBL fold64<>(SB), RODATA, $16

// FOLD carries acc on by the constants in k, and takes in what lies there.
#define FOLD(k, acc, next, t) \
	VPCLMULQDQ $0x00, k, acc, t   \
	VPCLMULQDQ $0x11, k, acc, acc \
	VPTERNLOGQ $0x96, next, t, acc

// func sumWide(slot *byte) uint32
//
// Four accumulators of 64 bytes are carried over the slot, then into the last one. What is left is 64 bytes with the checksum of all.
TEXT ·sumWide(SB), NOSPLIT, $64-12
	MOVQ slot+0(FP), SI
	VBROADCASTI32X4 fold256<>(SB), Z10
	VBROADCASTI32X4 fold64<>(SB), Z11
	MOVL   $0xffffffff, AX
	VMOVD  AX, X4
	VPXORQ 0(SI), Z4, Z0
	VMOVDQU64 64(SI), Z1
	VMOVDQU64 128(SI), Z2
	VMOVDQU64 192(SI), Z3
	MOVQ   $15, CX

loop:
	// The slot behind this one is often the next: the processor itself does not look beyond a page.
	PREFETCHT0 1280(SI)
	PREFETCHT0 1344(SI)
	PREFETCHT0 1408(SI)
	PREFETCHT0 1472(SI)
	ADDQ $256, SI
	FOLD(Z10, Z0, 0(SI), Z5)
	FOLD(Z10, Z1, 64(SI), Z6)
	FOLD(Z10, Z2, 128(SI), Z7)
	FOLD(Z10, Z3, 192(SI), Z8)
	DECQ CX
	JNZ  loop

	FOLD(Z11, Z0, Z1, Z5)
	FOLD(Z11, Z0, Z2, Z5)
	FOLD(Z11, Z0, Z3, Z5)
	VMOVDQU64 Z0, sum-64(SP)
	VZEROUPPER
	XORQ AX, AX
	CRC32Q sum-64(SP), AX
	CRC32Q sum-56(SP), AX
	CRC32Q sum-48(SP), AX
	CRC32Q sum-40(SP), AX
	CRC32Q sum-32(SP), AX
	CRC32Q sum-24(SP), AX
	CRC32Q sum-16(SP), AX
	CRC32Q sum-8(SP), AX
	NOTL AX
	MOVL AX, ret+8(FP)
	RET
