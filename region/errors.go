//go:build linux

package region

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
)

var (
	// ErrPagerGone says that the pager process ended or was killed, and no other took its place, or that it cut this task off. What was not resident is lost.
	ErrPagerGone = errors.New("the pager is gone (what was not resident is lost; close this Pager, and start or dial another)")
	// ErrClosed is what calls on a closed Pager, Object or Region fail with. It is an fs.ErrClosed (os.ErrClosed) too.
	ErrClosed = fmt.Errorf("region: %w", fs.ErrClosed)
)

// FaultError is a fault that the pager could not resolve, or an access that the mapping does not allow.
type FaultError struct {
	Region *Region
	Offset int64 // of the byte touched, in bytes from the start of Bytes; for ReadAt and WriteAt of the first byte that was not copied
	Err    error // the reason: wraps one of emm.MemoryError (may pass), emm.MemoryFailure (for ever), emm.ProtectionFailure, ErrClosed; perhaps an errno
}

// Error tells where and why.
func (e *FaultError) Error() string {
	return fmt.Sprintf("access region memory at offset %#x: %v", e.Offset, e.Err)
}

// Unwrap gives the reason.
func (e *FaultError) Unwrap() error { return e.Err }

// invalid makes an error about an argument.
func invalid(format string, args ...any) error {
	return fmt.Errorf(format+": %w", append(args, emm.InvalidArgument)...)
}

// failed names the operation in front of an error of a call to the pager, and turns the end of the connection into ErrPagerGone or ErrClosed.
func (p *Pager) failed(what string, err error) error {
	var remote *ipc.RemoteError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &remote):
		return fmt.Errorf("%s: %w", what, remote) // "call Type: " in front of it would tell the user nothing
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s: %w", what, err)
	case errors.Is(err, ipc.ErrClosed):
		return fmt.Errorf("%s: %w", what, ErrClosed)
	case errors.Is(err, ipc.ErrVersion):
		return fmt.Errorf("%s: %w", what, err)
	}
	if p.link.Err() != nil {
		return fmt.Errorf("%s: %w: %w", what, ErrPagerGone, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// dialHint is the remedy for a socket that cannot be reached.
func dialHint(socket string, err error) string {
	switch {
	case errors.Is(err, unix.ENOENT):
		return " (no pager listens there: start one with `machpager serve`, or name its socket with $MACHPAGER_SOCKET)"
	case errors.Is(err, unix.ECONNREFUSED):
		if st, err := os.Stat(socket); err == nil && st.Mode().Type() != os.ModeSocket {
			return " (this is not a socket)"
		}
		return " (the socket is there but nobody listens: the pager ended; start it again with `machpager serve`)"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return " (the socket is for its owner and its group only: run as one of them, or start the pager with `machpager serve --group`)"
	case errors.Is(err, unix.EPROTOTYPE):
		return " (this is not a pager's socket: it is of another type)"
	}
	return ""
}
