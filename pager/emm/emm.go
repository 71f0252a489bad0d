// Package emm is the contract between the vm, which plays the Mach kernel, and memory managers: the External Memory Management
// interface of Mach, in Go. It holds types and no machinery.
//
// A memory manager answers for the contents of memory objects. The vm tells it what it needs ([Manager]); it answers on the memory
// control it was given ([Control]). In one process both are direct calls: nothing is marshalled, nothing is allocated.
//
// # Who may do what
//
// The vm calls a Manager on a fault reader's own goroutine, holding no lock. A Manager must therefore not block: not on I/O, not on a
// lock held across I/O, not on memory that the pager itself would have to page out. What needs I/O is handed to a worker, which answers
// later on the Control. A Control may be used from any goroutine, also from inside the Manager's methods.
//
// # Errors
//
// What a Manager's method returns tells the receiver loop what to do with the message: [Success] and [MIGNoReply] keep the rights and the
// data that it carried, anything else drops them. The thread that faults learns nothing from it: it learns from DataSupply,
// DataUnavailable and DataError alone. What a Control's method returns is for the manager: [InvalidArgument] for a range that is no whole
// number of pages or a dead control. An answer for pages nobody asked for is ignored, counted, and Success.
//
// Offsets and sizes are bytes, multiples of the page size told in Init.
package emm

// Run is a range of whole pages of one memory object: offset and size in bytes.
type Run struct{ Off, Size int64 }

// End is the offset behind the run.
func (r Run) End() int64 { return r.Off + r.Size }

// Head is what every message to a manager begins with. It is passed by value.
type Head struct {
	Object  Port    // the memory object the message is about; for Create the default pager's own port
	Control Control // the memory control of the calling vm for this object
	Seqno   uint32  // counts the messages of the port this one came in by, from 0
}

// Prot is a set of accesses (Mach: vm_prot_t).
type Prot uint8

const (
	ProtNone  Prot = 0
	ProtRead  Prot = 1
	ProtWrite Prot = 2
	// ProtNoChange in a lock request keeps the lock as it is (Mach: VM_PROT_NO_CHANGE).
	ProtNoChange Prot = 8
)

// Return says which pages a lock request hands back to the manager (Mach: memory_object_return_t).
type Return uint8

const (
	ReturnNone     Return = iota // none: with flush, dirty pages are thrown away
	ReturnDirty                  // pages that were changed
	ReturnAll                    // dirty and precious pages
	ReturnAnything               // every resident page
)

// Flavor names a set of attributes in ChangeCompleted (Mach: memory_object_flavor_t).
type Flavor uint8

// FlavorBehavior is the one flavor there is so far: all of Attributes.
const FlavorBehavior Flavor = 1

// Attributes are what a manager may set of an object (Mach: memory_object_change_attributes). The zero value is an object that is
// not cached after its last unmapping and pages one page at a time.
type Attributes struct {
	// MayCache keeps the resident pages after the last unmapping, until the object ends or frames are wanted.
	MayCache bool
	// Temporary says that the contents end with the object: at termination nothing is returned.
	Temporary bool
	// ClusterSize is the number of bytes the vm may ask for at once, a power of two, at least the page size and at most 2 MiB.
	// 0: one page.
	ClusterSize int64
}

// Manager is a memory manager (Mach: a memory object's receiver, memory_object_server). See the package comment for what its methods may do.
type Manager interface {
	// Init is the first message about an object from this vm (memory_object_init): sent at its first vm_map, and before anything else. The
	// object is ready when the manager has called ChangeAttributes, or when Init returns Success. May come again after Terminate.
	Init(h Head, pageSize int) KernReturn
	// DataRequest asks for the pages of want, which are absent in this vm (memory_object_data_request). Each page gets exactly one of
	// DataSupply, DataUnavailable and DataError, in any order and split. need is the offset of the page a thread waits for, -1 for none; the others
	// may be declined with DataError. access is what the thread wants. Never sent for a resident page, nor twice while one is outstanding; the
	// DataReturn of a page has been completed before the next request for it.
	DataRequest(h Head, want Run, need int64, access Prot) KernReturn
	// DataReturn hands the contents of pages back (memory_object_data_return). dirty: they were changed; otherwise they are precious.
	// kernelCopy: the vm keeps them resident. data is lent: it must not be changed, and ends with ReturnCompleted for the same run,
	// which must come exactly once, whatever happens.
	DataReturn(h Head, off int64, data []byte, dirty, kernelCopy bool) KernReturn
	// Terminate is the last message about the object from this vm (memory_object_terminate). No answer is expected, and none is taken.
	Terminate(h Head) KernReturn
}

// Completer is implemented by managers that want to know when what they asked for with reply set is done. It is looked for once, at Init.
type Completer interface {
	// LockCompleted answers a LockRequest, after all its returns were completed (memory_object_lock_completed).
	LockCompleted(h Head, r Run)
	// SupplyCompleted answers a DataSupply (memory_object_supply_completed): Success, or MemoryPresent with the offset of the first page
	// refused, where the supply stopped.
	SupplyCompleted(h Head, r Run, result KernReturn, errOff int64)
	// ChangeCompleted answers a ChangeAttributes (memory_object_change_completed).
	ChangeCompleted(h Head, f Flavor)
}

// DefaultManager is a manager that can also take over temporary objects that the vm made (memory_object_default_server).
type DefaultManager interface {
	Manager
	// Create hands over a new temporary object (memory_object_create). It is ready at once, all of it reads as zeros until DataInitialize, and
	// Init is not sent. h.Object is the default pager's own port, object the new one, size a hint in bytes. Sent at the first page-out.
	Create(h Head, object Port, size int64, pageSize int) KernReturn
	// DataInitialize is the first hand-over of a page of an object taken by Create (memory_object_data_initialize). It is ignored, page by
	// page, where the manager has contents already. data is lent and answered like DataReturn's.
	DataInitialize(h Head, off int64, data []byte) KernReturn
}

// Control is a memory control: the vm's end of one object (Mach: memory_object_control_t). From any goroutine.
type Control interface {
	// SetCookie stores the manager's own object with the control, Cookie gets it back: no look-up on the hot path. Set it in Init or Create.
	SetCookie(any)
	Cookie() any
	// ChangeAttributes makes the object ready and sets its attributes (memory_object_change_attributes). reply: ChangeCompleted follows.
	ChangeAttributes(a Attributes, reply bool) KernReturn
	// Attributes returns what is set (memory_object_get_attributes).
	Attributes() (Attributes, KernReturn)
	// DataSupply gives the contents of whole pages that were asked for (memory_object_data_supply). data is the caller's again on return. lock is the
	// set of accesses forbidden; so far only ProtNone, else InvalidArgument. precious: the manager keeps no copy, so the vm returns the pages
	// even if clean. reply: SupplyCompleted follows. A page that is resident is never overwritten: there the supply stops, with MemoryPresent.
	DataSupply(off int64, data []byte, lock Prot, precious, reply bool) KernReturn
	// DataUnavailable says that the manager has no contents for these pages: they are zeros (memory_object_data_unavailable).
	DataUnavailable(r Run) KernReturn
	// DataError says that these pages cannot be had (memory_object_data_error). MemoryError may pass: the next touch asks again, and so does the
	// vm. MemoryFailure is for ever. Dropped silently on pages nobody waits for.
	DataError(r Run, reason KernReturn) KernReturn
	// ReturnCompleted ends the loan of one DataReturn or DataInitialize of exactly this run. Only after Success may the vm forget the pages;
	// after anything else they stay resident and dirty. (Mach has no such call: there the page was gone when the message was sent.)
	ReturnCompleted(r Run, result KernReturn) KernReturn
	// LockRequest cleans and flushes resident pages (memory_object_lock_request): per page, first the pages that ret names are returned, then, with flush,
	// they leave memory. Flush with ReturnNone throws changes away. lock: so far ProtNoChange, else InvalidArgument. reply: LockCompleted
	// follows. The call returns at once; the work is done by the vm's own goroutines.
	LockRequest(r Run, ret Return, flush bool, lock Prot, reply bool) KernReturn
	// SynchronizeCompleted answers one Synchronize of exactly this run: everything returned before it is safe (memory_object_synchronize_completed).
	SynchronizeCompleted(r Run) KernReturn
	// SynchronizeError answers it otherwise: contents that were returned may not be safe, and who waits is told reason. (Mach has no such call:
	// there a failure to synchronise could not be told.)
	SynchronizeError(r Run, reason KernReturn) KernReturn
	// Destroy ends the object at once (memory_object_destroy): no more paging, resident pages are dropped, later faults get
	// MemoryFailure, Terminate follows.
	Destroy(reason KernReturn) KernReturn
}
