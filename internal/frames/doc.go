// Package frames is where resident pages live: one unlinked file per memory object, and the count of the frames they may take.
//
// A [Pool] is a tmpfs that nobody else can see (made with fsopen and fsmount, never attached to a path), or memfds where that cannot be had.
// Its files are for tasks to map; the pager itself never maps them. It fills with UFFDIO_COPY or [File.WriteAt] and reads back with
// [File.ReadAt]: nothing that a task does to a file can raise SIGBUS in the pager, and no hole is instantiated by looking at it.
//
// # Kinds
//
//	Tmpfs        needs CAP_SYS_ADMIN. The kernel enforces the budget (size=) and does not page the frames out a second time (noswap).
//	TmpfsUserNS  any user who may create user namespaces. A helper child ([MountMain]) makes the mount in namespaces of its own and sends it
//	             here. The budget is enforced and can be changed, because the owner of a user namespace has all capabilities in it; noswap is
//	             refused by the kernel there.
//	             No privilege, sysctl or capability is needed beyond that; where namespaces are forbidden (user.max_user_namespaces=0, seccomp,
//	             a security module) the kind cannot be had. A process that changes its effective user afterwards can no longer change the size.
//	Memfd        always works. The budget is this package's count alone, and Linux may swap.
//
// # Counting
//
// Who fills a page reserves its frame first ([Pool.Reserve]) and releases it when the page is verifiably out of the file ([File.Punch]). One
// word holds the free frames; reserving is one compare-and-swap and never exceeds the budget. The kernel's limit stands behind it: a fill
// that finds no frame there fails with ENOMEM (UFFDIO_COPY) or ENOSPC (WriteAt), and that means somebody made frames that nobody reserved.
//
// # Large folios
//
// With huge=within_size a pwrite, or a fallocate, of a page that is not there takes the largest naturally aligned folio that fits between the
// pages around it and the file's size: 512 frames for a byte in an empty 2 MiB extent, 256 for a byte in a file of 1 MiB. UFFDIO_COPY takes
// single 4 KiB folios. So WriteAt whole, empty, aligned extents of [ExtentSize] with [ExtentFrames] reserved, and only if [Pool.Extents] says that
// this kernel keeps to that; COPY everything smaller; WriteAt less only into pages that are present.
//
// Pages that fallocate made and nobody wrote are charged, and UFFDIO_COPY meets EEXIST there, but SEEK_DATA takes them for a hole. [File.Present],
// [File.Occupied] and Punch's verification see them (cachestat). A pwrite of one of them makes its whole folio ordinary zeros.
//
// # A pager that dies
//
// Mount and files outlive it as long as somebody holds their descriptors. The next pool takes them over (adopt.go). What the earlier one had reserved is not
// known any more: the frames that the page tables account for are claimed anew ([Pool.Claim]), and those that lie in files which died with their last holder here are
// counted as nobody's ([Pool.Recount]).
//
// # Errors
//
// They wrap the errno. os.ErrClosed: the file or pool is closed. EINVAL: offsets or sizes that are no whole pages or outside the file where
// that is asked for. EBUSY from [Pool.SetBudget]: more is in use.
//
// Lock order: Pool.mu, File.mu. Neither is held while a caller's function runs. File.mu is held shared across system calls on the fd, so
// that Close waits for them and no number is used after it was closed. Pool.mu is not taken on any path of a fault.
package frames
