package emm

// SyncFlags say how a range is to be synchronised (Mach: vm_sync_t).
type SyncFlags uint8

// SyncSynchronous asks that the contents have reached stable storage when SynchronizeCompleted is called (Mach: VM_SYNC_SYNCHRONOUS). So far
// the vm always sets it, and nothing else.
const SyncSynchronous SyncFlags = 2

// Synchronizer is implemented by managers that keep contents where they are not safe at once. It is looked for by type assertion; for a manager without it the vm
// completes a synchronisation itself, when the manager has all pages.
type Synchronizer interface {
	// Synchronize asks to make everything safe that was returned for the range so far (memory_object_synchronize). It follows the DataReturns of the range's dirty
	// and precious pages, each of them completed. It is answered once, by SynchronizeCompleted or SynchronizeError with exactly this run;
	// what is under way when the object ends needs no answer. Like every method of a manager it must not block; a return value other than
	// Success and MIGNoReply is an answer too: it failed.
	Synchronize(h Head, r Run, f SyncFlags) KernReturn
}
