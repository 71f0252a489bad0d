package emm

import "strconv"

// KernReturn is a Mach kern_return_t. As an error it tells what it means; Success is no error and must not be returned as one: use Err.
type KernReturn int32

// The values of mach/kern_return.h and mach/mig_errors.h that can occur here.
const (
	Success           KernReturn = 0
	InvalidAddress    KernReturn = 1
	ProtectionFailure KernReturn = 2
	NoSpace           KernReturn = 3
	InvalidArgument   KernReturn = 4
	Failure           KernReturn = 5
	ResourceShortage  KernReturn = 6
	NoAccess          KernReturn = 8
	MemoryFailure     KernReturn = 9
	MemoryError       KernReturn = 10
	InvalidName       KernReturn = 15
	InvalidTask       KernReturn = 16
	InvalidHost       KernReturn = 22
	MemoryPresent     KernReturn = 23
	MemoryDataMoved   KernReturn = 24
	MemoryRestartCopy KernReturn = 25
	InvalidObject     KernReturn = 29
	MIGNoReply        KernReturn = -305
)

var kernReturnText = map[KernReturn][2]string{
	Success:           {"KERN_SUCCESS", "success"},
	InvalidAddress:    {"KERN_INVALID_ADDRESS", "invalid address"},
	ProtectionFailure: {"KERN_PROTECTION_FAILURE", "protection failure"},
	NoSpace:           {"KERN_NO_SPACE", "no space"},
	InvalidArgument:   {"KERN_INVALID_ARGUMENT", "invalid argument"},
	Failure:           {"KERN_FAILURE", "failure"},
	ResourceShortage:  {"KERN_RESOURCE_SHORTAGE", "resource shortage"},
	NoAccess:          {"KERN_NO_ACCESS", "no access"},
	MemoryFailure:     {"KERN_MEMORY_FAILURE", "memory failure: the contents are lost for ever"},
	MemoryError:       {"KERN_MEMORY_ERROR", "memory error: the contents cannot be had at the moment"},
	InvalidName:       {"KERN_INVALID_NAME", "invalid name"},
	InvalidTask:       {"KERN_INVALID_TASK", "invalid task"},
	InvalidHost:       {"KERN_INVALID_HOST", "invalid host"},
	MemoryPresent:     {"KERN_MEMORY_PRESENT", "the page is resident already"},
	MemoryDataMoved:   {"KERN_MEMORY_DATA_MOVED", "memory data moved"},
	MemoryRestartCopy: {"KERN_MEMORY_RESTART_COPY", "restart copy"},
	InvalidObject:     {"KERN_INVALID_OBJECT", "invalid object"},
	MIGNoReply:        {"MIG_NO_REPLY", "no reply"},
}

// String is the value's name in Mach's headers.
func (k KernReturn) String() string {
	if t, ok := kernReturnText[k]; ok {
		return t[0]
	}
	return "kern_return_t " + strconv.Itoa(int(k))
}

// Error says what the value means and its name.
func (k KernReturn) Error() string {
	if t, ok := kernReturnText[k]; ok {
		return t[1] + " (" + t[0] + ")"
	}
	return k.String()
}

// Err is nil for Success and MIGNoReply, and k otherwise.
func (k KernReturn) Err() error {
	if k == Success || k == MIGNoReply {
		return nil
	}
	return k
}
