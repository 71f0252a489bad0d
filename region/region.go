//go:build linux

// Package region is a task's view of machpager: memory objects, and mappings of them that are ordinary memory.
//
//	pager, err := region.Dial(ctx, "", nil)                                 // or spawn.Start, for a pager of one's own
//	object, err := pager.ObjectCreate(ctx, 1<<30, nil)                      // default_pager_object_create
//	memory, err := object.Map(ctx, nil)                                     // vm_map
//	copy(memory.Bytes(), "touching it is a page fault, and the pager answers")
//
// Every page of a [Region] is absent until touched. A touch is a page fault that the kernel hands to the pager, another process, which fills
// the page with zeros or with what was stored. Whoever presents the object's [emm.Port] can map the same object, and shares the memory.
//
// # What touching memory costs a Go program
//
// A goroutine that waits in a page fault keeps its P (one of GOMAXPROCS), and cannot be preempted while it is inside copy, clear or bytes.Equal: a garbage
// collection waits for it, and everything else waits for the collection. With a pager that answers in microseconds that is nothing; with a slow
// store, call [Region.Populate] first, or use [Region.ReadAt] and [Region.WriteAt], which wait in system calls that give the P away.
//
// # Errors of memory
//
// A page whose contents cannot be had ends a touch with SIGBUS and a system call with EFAULT. ReadAt and WriteAt return a *[FaultError] then; so does [Guard]
// for plain touches. Outside Guard it ends the program. The next touch asks the pager again.
//
// When the pager process dies, its guardian starts another, which goes on: threads in faults and calls under way wait for it, and end as they would have. Advice is
// forgotten, and a Discard may be done twice: see there. When the pager is gone for good, every page that is not resident becomes such a page, and every call fails with [ErrPagerGone]; resident pages keep
// their contents. The pager's guardian does that from outside, for it must work even while this program's Go runtime stands still; this
// package does it a second time.
//
// # What must not be done with region memory
//
//   - Store Go pointers in it: the collector does not look there.
//   - Touch it after Close: like freed memory, it faults, or by then belongs to somebody else. There is no finalizer, and a kept slice does
//     not keep its Region.
//   - Have the kernel or a device pin it (O_DIRECT, io_uring registered buffers, RDMA, vmsplice, process_vm_writev from another process): eviction cannot see
//     pins, and what arrives through them can be lost although the call succeeds. Plain read(2) and write(2) are safe.
//   - Move or resize it with mremap(2), unmap or remap parts of it, or change its protection.
//   - Expect it in a forked child: it is MADV_DONTFORK, and the child has no memory there.
//
// The race detector does not see region memory.
//
// # Lock order
//
// Pager.mu, Pager.setupMu, regions.mu, guards.mu, gate.mu, Region.statsMu: leaves, never held together, nor across a system call that can wait or a call to the pager.
// Whoever uses a Region's addresses is inside its gate; Close shuts it, ends what they wait for, and waits until it is empty.
package region
