// Package arena is memory in a memfd that outlives the process: page tables, store maps and object tables live in arenas, another process
// holds a copy of the fd, and a restarted pager opens it and finds every word as it was.
//
// # Layout
//
// A file is one header page and, behind it, the data. Numbers are in the machine's byte order.
//
//	0   magic      "MPARENA1"
//	8   kind       what the data is, 1 to 8 bytes, padded with zeros
//	16  version    32 bits, of the data's layout; the kind's owner counts it up with every change
//	20  reserved   zeros up to the end of the page, but for:
//	24  committed  64 bits: bytes of data, a multiple of the page
//
// # Contract
//
// The data is valid at every instant, also for a process that was killed between any two instructions: whoever writes here makes one
// 64-bit store the commit of each change. The arena itself holds to that: [Arena.Grow] makes the file longer first (zeros) and then stores
// the committed size, so memory behind it is either unused zeros or committed. There is no journal and nothing to repair.
//
// The mapping is made once, for the largest size the arena may reach; the base never moves and growth maps nothing. The file is sealed
// against shrinking, so no holder of the fd can raise SIGBUS here. Memory that is never touched costs nothing; when the machine or the memory
// cgroup has none left for a first touch, the kernel kills somebody, as with any other memory.
//
// One process at a time writes an arena. That is for its users to see to: a new pager opens it when the old one is certainly gone.
//
// Lock order: an Arena has one lock, held over its own system calls only.
package arena
