//go:build linux && cgo

package uffd

import (
	"testing"
	"unsafe"

	"github.com/loopholelabs/userfaultfd-go/pkg/constants"
	"golang.org/x/sys/unix"
)

// escape keeps what is assigned to it on the heap, where it has one address.
var escape []byte

// TestABIAgainstUserfaultfdGo compares with an independent implementation, as far as it goes.
func TestABIAgainstUserfaultfdGo(t *testing.T) {
	for _, c := range []struct {
		name         string
		theirs, ours uint64
	}{
		{"NR_userfaultfd", constants.NR_userfaultfd, unix.SYS_USERFAULTFD},
		{"UFFD_API", constants.UFFD_API, apiVersion},
		{"UFFD_EVENT_PAGEFAULT", constants.UFFD_EVENT_PAGEFAULT, uint64(EventPagefault)},
		{"UFFDIO_REGISTER_MODE_MISSING", constants.UFFDIO_REGISTER_MODE_MISSING, uint64(RegisterMissing)},
		{"UFFDIO_API", constants.UFFDIO_API, uint64(uffdioAPI)},
		{"UFFDIO_REGISTER", constants.UFFDIO_REGISTER, uint64(uffdioRegister)},
		{"UFFDIO_COPY", constants.UFFDIO_COPY, uint64(uffdioCopy)},
		{"sizeof uffd_msg", uint64(unsafe.Sizeof(constants.UffdMsg{})), uint64(unsafe.Sizeof(Msg{}))},
		{"sizeof uffdio_api", uint64(unsafe.Sizeof(constants.UffdioAPI{})), uint64(unsafe.Sizeof(apiArg{}))},
		{"sizeof uffdio_register", uint64(unsafe.Sizeof(constants.UffdioRegister{})), uint64(unsafe.Sizeof(registerArg{}))},
		{"sizeof uffdio_range", uint64(unsafe.Sizeof(constants.UffdioRange{})), uint64(unsafe.Sizeof(rangeArg{}))},
		{"sizeof uffdio_copy", uint64(unsafe.Sizeof(constants.UffdioCopy{})), uint64(unsafe.Sizeof(copyArg{}))},
	} {
		if c.theirs != c.ours {
			t.Errorf("%s: %#x there, %#x here", c.name, c.theirs, c.ours)
		}
	}

	// The layout of what they build, seen as our structs.
	src := make([]byte, 4096)
	escape = src
	theirCopy := constants.NewUffdioCopy(src, 0x12345678, 4096, 3, -17)
	ourCopy := copyArg{dst: 0x12345000, src: uint64(uintptr(unsafe.Pointer(&src[0]))), length: 4096, mode: 3, done: -17}
	if got := *(*copyArg)(unsafe.Pointer(&theirCopy)); got != ourCopy {
		t.Errorf("uffdio_copy: %+v there, %+v here", got, ourCopy)
	}
	theirRegister := constants.NewUffdioRegister(1, 2, 3)
	if got, want := *(*registerArg)(unsafe.Pointer(&theirRegister)), (registerArg{rangeArg: rangeArg{1, 2}, mode: 3}); got != want {
		t.Errorf("uffdio_register: %+v there, %+v here", got, want)
	}
	m := Msg{event: EventPagefault, arg: [3]uint64{uint64(FaultWrite), 0x1000, 42}}
	theirs := (*constants.UffdMsg)(unsafe.Pointer(&m))
	arg := constants.GetMsgArg(theirs)
	fault := (*constants.UffdPagefault)(unsafe.Pointer(&arg[0]))
	if constants.GetMsgEvent(theirs) != constants.UFFD_EVENT_PAGEFAULT || uint64(constants.GetPagefaultAddress(fault)) != m.Address() {
		t.Error("a page fault message reads differently there")
	}
}
