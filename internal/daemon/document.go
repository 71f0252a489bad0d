package daemon

import (
	"encoding/json"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
)

// document is v as JSON in a sealed memfd: a reply as long as it needs to be.
func document(name string, v any) (ipc.Reply, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("write %s: %w", name, err)
	}
	fd, err := unix.MemfdCreate("machpager-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_NOEXEC_SEAL)
	if err != nil {
		return ipc.Reply{}, fmt.Errorf("write %s: memfd_create: %w", name, err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err = f.Write(b); err == nil {
		_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL)
	}
	if err != nil {
		f.Close()
		return ipc.Reply{}, fmt.Errorf("write %s: %w", name, err)
	}
	return ipc.Reply{Body: ipc.Document{Size: int64(len(b))}, FDs: []int{fd}, Done: func() { f.Close() }}, nil
}
