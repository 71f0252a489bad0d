package daemon

import (
	"errors"
	"io/fs"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// StatusRefused is the exit status of a process that Refused ended.
const StatusRefused = 4

// Refused reports whether err says that the system does not permit what was wanted, or is too old for it.
func Refused(err error) bool {
	return errors.Is(err, uffd.ErrNotSupported) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ENOSYS)
}
