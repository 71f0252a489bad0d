package ipc

// The messages a task sends to the pager, and the replies. Every struct is the layout on the wire: little-endian, no padding but the
// fields named Pad, which are zero. Offsets and sizes are bytes. Handles and mappings are numbers of one connection.

// Empty is a body without contents.
type Empty struct{}

// Cancel asks to give up the request Seq of the same sender, if it is still served. Its reply comes all the same. Cancel has none.
type Cancel struct {
	Seq uint32
	Pad uint32
}

// Restarted is the first frame of a pager that took over a connection from one that died. What lies unread on the connection is nobody's: the new pager throws
// away every frame until the reply, and the task, having replied, sends again every request that has no reply yet, with its number and FlagResend. Reply: Empty.
// A pager that dies before the reply leaves the next one to ask anew: the number of the frame, drawn at random, tells the replies apart.
type Restarted struct {
	PagerPID int32
	Pad      uint32
}

// Hello is the first request on a connection.
type Hello struct {
	Features uint64 // userfaultfd features the task's own kernel interface offers and will ask for
	Flags    uint32 // HelloWantDevice, HelloUserModeOnly
	Pad      uint32
}

// Flags of Hello.
const (
	HelloWantDevice   uint32 = 1 << 0 // the task may not open a userfaultfd itself: give it an open /dev/userfaultfd if the pager was told to
	HelloUserModeOnly uint32 = 1 << 1 // the task will use a user-mode-only userfaultfd (tier C)
)

// HelloReply answers Hello. Tail: what the pager's privilege tier is and means, as text. fds: an open /dev/userfaultfd, if the pager
// hands it out and HelloWantDevice was set.
type HelloReply struct {
	Session     uint64 // number of this connection, unique while the connection lives
	Features    uint64 // userfaultfd features the task must enable
	PagerPID    int32
	GuardianPID int32  // 0: the pager has no guardian
	Tier        uint32 // 'A', 'B' or 'C'
	Flags       uint32
}

// TaskUffd hands over a copy of the task's userfaultfd (fd 0). Once per connection, before the first Map. Reply: Empty.
type TaskUffd struct {
	Features uint64 // enabled on it
	Flags    uint32 // HelloUserModeOnly
	Pad      uint32
}

// ObjectCreate makes a memory object (default_pager_object_create); with TypeAllocate a private one, without a port (vm_allocate). Tail:
// two strings, the manager's name ("": the default pager) and its argument. fds: optionally the file behind the object.
type ObjectCreate struct {
	Size        int64  // 1 or more; 0: of the file
	ClusterSize int64  // power of two; 0: the pager's choice
	ResidentMin int64  // bytes that page-out leaves resident for the sake of others; 0: none
	ResidentMax int64  // bytes that may be resident at once; 0: the whole budget
	PageSize    uint32 // power of two, 4096 to 2 MiB; 0: 4096
	Flags       uint32
}

// ObjectReply answers ObjectCreate, Allocate and ObjectOpen: the task holds a right to the object until ObjectClose.
type ObjectReply struct {
	Handle   uint64
	Size     int64
	Port     [16]byte // zero for Allocate
	PageSize uint32
	Pad      uint32
}

// ObjectOpen turns a port into a handle. Reply: ObjectReply.
type ObjectOpen struct{ Port [16]byte }

// ObjectClose gives a right up. Mappings live on. Reply: Empty.
type ObjectClose struct{ Handle uint64 }

// Objects lists the objects of the pager with identifiers above After, in their order (default_pager_objects).
type Objects struct{ After uint64 }

// ObjectsReply answers Objects. Tail: a list of ObjectEntry.
type ObjectsReply struct {
	More uint32 // 1: ask again after the last one
	Pad  uint32
}

// ObjectEntry is one object in a list. It has no port: a list gives no rights.
type ObjectEntry struct {
	ID       uint64
	Size     int64
	Resident int64 // bytes in frames
	Stored   int64 // bytes in paging space
	PageSize uint32
	Mappings uint32
}

// ObjectRight makes a port that gives less than the handle does. Reply: ObjectRightReply.
type ObjectRight struct {
	Handle uint64
	Flags  uint32 // RightReadOnly, RightNoResize: at least one
	Pad    uint32
}

// What a right does not give.
const (
	RightReadOnly uint32 = 1 << 0 // mappings are read-only, and so is the file that comes with them; nor can the size be changed
	RightNoResize uint32 = 1 << 1 // ObjectSetSize is refused
)

// ObjectRightReply answers ObjectRight.
type ObjectRightReply struct{ Port [16]byte }

// ObjectRevoke takes back what ObjectRight made; the handle must give the full right. Reply: Empty, when no mapping that was made by it has a page left.
type ObjectRevoke struct {
	Handle uint64
	Port   [16]byte
}

// MaxPages is how many page states one ObjectPages can carry.
const MaxPages = MaxBody - 256

// ObjectPages asks for the states of the pages from Offset on (default_pager_object_pages), at most MaxPages of them.
type ObjectPages struct {
	Handle uint64
	Offset int64 // multiple of the page size
	Count  uint32
	Pad    uint32
}

// ObjectPagesReply answers ObjectPages. Tail: one byte for each page; fewer than asked where the object ends.
type ObjectPagesReply struct {
	Offset int64
	Count  uint32
	Pad    uint32
}

// A page's byte: the state in the low three bits (numbered as in vm/page), and bits.
const (
	PageStateMask byte = 0x07
	PageBusy      byte = 0x08 // a grant is under way
	PageWired     byte = 0x10
	PagePrecious  byte = 0x20 // the manager keeps no copy
	PageStored    byte = 0x40 // the manager has contents for it
)

// Map prepares a mapping of [Offset, Offset+Size) of an object (vm_map), whole pages. The mapping exists at the pager from the reply on, and takes
// part in the life of pages from MapReady on.
type Map struct {
	Handle uint64
	Offset int64 // multiple of the object's page size
	Size   int64 // multiple of the object's page size
	Flags  uint32
	Pad    uint32
}

// MapReadOnly asks for a mapping that cannot write: the file comes open read-only.
const MapReadOnly uint32 = 1 << 0

// MapReply answers Map. fds: the object's file, open for reading and writing, or read-only.
type MapReply struct {
	Mapping    uint64
	FileOffset int64 // where in the file the mapping begins
}

// MapReady says where the task has mapped and registered it: from now on its faults are served. Reply: Empty. The memory must have
// been inaccessible until the reply.
type MapReady struct {
	Mapping uint64
	Address uint64
}

// Unmap ends a mapping (vm_deallocate), before or after MapReady. The task has made the range inaccessible. Reply: Empty, when the pager
// touches the range no more.
type Unmap struct{ Mapping uint64 }

// Populate makes the pages of a range of a mapping present. Reply: Empty, when they are.
type Populate struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
	Flags   uint32
	Pad     uint32
}

// PopulateWrite makes the pages writable too.
const PopulateWrite uint32 = 1 << 0

// PageOut is a lock request for the pages of a range of a mapping: clean and flush. Reply: Empty, when they are returned and gone.
type PageOut struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
}

// Sync hands the changed pages of a range of a mapping to the manager and has it make them safe (vm_msync). Reply: Empty, when they are.
type Sync struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
}

// Advise says how a range of a mapping will be used (vm_behavior_set). Reply: Empty.
type Advise struct {
	Mapping uint64
	Offset  int64  // from the start of the mapping, multiple of the page size
	Size    int64  // multiple of the page size
	Advice  uint32 // 0 normal, 1 random, 2 sequential, 3 reverse sequential, 4 will need, 5 do not need
	Pad     uint32
}

// Wire keeps a range of a mapping resident (vm_wire). Reply: Empty, when it is.
type Wire struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
}

// Unwire takes one Wire back. Reply: Empty.
type Unwire struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
}

// Discard throws the contents of a range of a mapping away. Reply: Empty, when they read as zeros.
type Discard struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping, multiple of the page size
	Size    int64 // multiple of the page size
}

// ObjectSetSize makes an object smaller, or as large again as it was made (default_pager_object_set_size). Reply: Empty.
type ObjectSetSize struct {
	Handle uint64
	Size   int64 // bytes
}

// ObjectSnapshot makes a new object with the contents that an object of the default pager has at one instant. Reply: ObjectReply.
type ObjectSnapshot struct{ Handle uint64 }

// SetResident changes the budget of resident bytes; for the pager's own user and root. Reply: Empty, when the budget holds.
type SetResident struct{ Bytes int64 }

// BackingStoreCreate adds a paging file (default_pager_backing_store_create); for the pager's own user and root. Tail: its directory, for
// people. fd 0: the file, made by who asks, for the pager opens nothing by name: empty, nameless, open for reading and writing. It is the pager's from then on. Reply:
// BackingStore.
type BackingStoreCreate struct {
	Capacity int64  // bytes; 0: what its file system has
	Priority int32  // files of a higher one are used first
	Flags    uint32 // BackingStorePreallocate
}

// BackingStorePreallocate takes the file system's space for all of the capacity at once.
const BackingStorePreallocate uint32 = 1 << 0

// BackingStore names a paging file. As a request BackingStoreDelete it removes it (default_pager_backing_store_delete); for the pager's own user and
// root; reply: Empty, when its contents are elsewhere. As a request BackingStoreInfo it asks for the next one after it (default_pager_backing_store_info); after 0 for the
// first.
type BackingStore struct {
	ID  uint32 // 1 to 254
	Pad uint32
}

// BackingStoreInfoReply answers BackingStoreInfo. Bytes, and counts since the file was added. Tail: its directory.
type BackingStoreInfoReply struct {
	ID          uint32 // 0: there is none after the one named
	Priority    int32
	Leaving     uint32 // 1: it is being removed
	Pad         uint32
	Total       int64
	Used        int64
	Free        int64
	Read        int64 // bytes read from it
	Written     int64 // bytes written to it
	ReadErrors  int64 // failed reads
	WriteErrors int64 // failed writes
}

// Document answers Dump and Check, for the pager's own user and root: what the pager has, and what is wrong with it. fds: a sealed memfd with so many bytes of JSON.
// What is in a dump is for people, and may change.
type Document struct{ Size int64 }

// FaultReason asks why a touch of a page ended in SIGBUS or EFAULT.
type FaultReason struct {
	Mapping uint64
	Offset  int64 // from the start of the mapping
}

// FaultReasonReply answers FaultReason. Tail: the reason as text.
type FaultReasonReply struct {
	Reason int32 // kern_return_t: MemoryError, MemoryFailure; Success: the page has no error (any more)
	Errno  int32 // of the store or the manager, 0: none
}

// RegionStats asks for the counters of one mapping.
type RegionStats struct{ Mapping uint64 }

// RegionStatsReply answers RegionStats. Counts since the mapping began; bytes now.
type RegionStatsReply struct {
	ZeroFilled   uint64 // faults answered with zeros
	Stored       uint64 // faults answered with contents of the manager
	Minor        uint64 // faults on a page that was resident
	WriteProtect uint64 // first writes to a clean page
	Errors       uint64 // faults answered with an error
	PagesIn      uint64 // pages filled, those nobody waited for included
	PagesOut     uint64 // pages returned to the manager
	Resident     int64  // bytes of the mapped range that are in frames
	Dirty        int64  // bytes of it that the manager does not have
	Latency      Latency
}

// Latency summarises how long faults took, from the read of the message to the wake, as the pager measures it. Nanoseconds.
type Latency struct {
	Count uint64
	P50   uint64
	P99   uint64
	Max   uint64
}

// InfoReply answers Info (default_pager_info). Tail: six strings: kind of frames, privilege tier as text, kernel release, version of machpager,
// how the pager is confined, the quotas of users and tasks.
type InfoReply struct {
	MinPageSize    uint32
	MaxPageSize    uint32
	Budget         int64 // bytes all objects together may occupy
	Resident       int64 // bytes they do, by the pager's count
	KernelResident int64 // bytes they do, by the kernel's count; -1: unknown
	PagingTotal    int64 // bytes of paging space; -1: no limit known
	PagingFree     int64 // bytes of it free; -1: unknown
	Tasks          uint32
	Objects        uint32
	Mappings       uint32
	Tier           uint32 // 'A', 'B' or 'C'
	PagerPID       int32
	GuardianPID    int32 // 0: none
}
