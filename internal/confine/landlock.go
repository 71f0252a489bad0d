package confine

import (
	"errors"
	"fmt"
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Access is what may be done with files: a set of the LANDLOCK_ACCESS_FS_ bits of landlock(7).
type Access uint64

// Sets of accesses.
const (
	Read   Access = unix.LANDLOCK_ACCESS_FS_READ_FILE
	Write  Access = unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE
	Make   Access = unix.LANDLOCK_ACCESS_FS_MAKE_REG    // regular files; O_TMPFILE needs Write alone
	Remove Access = unix.LANDLOCK_ACCESS_FS_REMOVE_FILE // whatever is no directory
)

// Rule allows access to what lies beneath a directory.
type Rule struct {
	Dir    int    // an open directory, O_PATH will do, or a mount; -1: Path
	Path   string // a directory
	Access Access
}

// oldestABI is the Landlock that is needed: that of Linux 6.2, which knows of truncation. The minimum kernel of this program is newer.
const oldestABI = 3

// byABI are the accesses to files that each version of Landlock can deny: what it does not know it allows. landlock(7).
var byABI = []struct {
	abi    int
	access uint64
}{
	{1, 1<<13 - 1},
	{2, unix.LANDLOCK_ACCESS_FS_REFER},
	{3, unix.LANDLOCK_ACCESS_FS_TRUNCATE},
	{5, unix.LANDLOCK_ACCESS_FS_IOCTL_DEV},
	{9, unix.LANDLOCK_ACCESS_FS_RESOLVE_UNIX},
}

const (
	netABI   = 4 // from here on it can deny TCP
	scopeABI = 6 // and abstract unix sockets of others
	tsyncABI = 8 // and be told to take all threads (Linux 7.0)
)

// ABI is the version of Landlock that this kernel has. errors.ErrUnsupported: none, or one too old, or it is switched off.
func ABI() (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	switch errno {
	case 0:
	case unix.ENOSYS, unix.EOPNOTSUPP, unix.EPERM:
		return 0, fmt.Errorf("ask for landlock: %w: %w (CONFIG_SECURITY_LANDLOCK, and landlock in the boot parameter lsm=; in a container its seccomp filter must allow it)",
			errno, errors.ErrUnsupported)
	default:
		return 0, fmt.Errorf("ask for landlock: %w", errno)
	}
	if int(n) < oldestABI {
		return 0, fmt.Errorf("landlock of version %d, want %d (Linux 6.2): %w", n, oldestABI, errors.ErrUnsupported)
	}
	return int(n), nil
}

// Have is nil if Files can be had in this process.
func Have() error {
	abi, err := ABI()
	if err == nil && linkedWithCgo && abi < tsyncABI {
		err = fmt.Errorf("this program is linked with cgo, whose threads landlock reaches from Linux 7.0 on: %w", errors.ErrUnsupported)
	}
	return err
}

// Files denies this process, for good and on all threads, every file by name but what the rules allow. What is open stays open, and files that come in over a
// socket are as their sender opened them; memory files and pipes are not touched by it. It also denies TCP, changes of mounts, and ptrace(2) of whoever is not
// confined by it, as far as the kernel can. no_new_privs must be set: see Capabilities.
func Files(rules []Rule) error {
	abi, err := ABI()
	if err != nil {
		return fmt.Errorf("confine files: %w", err)
	}
	if err := Have(); err != nil {
		return fmt.Errorf("confine files: %w", err)
	}
	set, err := newRuleset(abi, rules)
	if err != nil {
		return fmt.Errorf("confine files: %w", err)
	}
	defer unix.Close(set)
	if abi >= tsyncABI {
		if _, _, errno := unix.Syscall(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(set), unix.LANDLOCK_RESTRICT_SELF_TSYNC, 0); errno != 0 {
			return fmt.Errorf("confine files: %w", errno)
		}
		return nil
	}
	if err := allThreads(unix.SYS_LANDLOCK_RESTRICT_SELF, uintptr(set), 0, 0); err != nil {
		return fmt.Errorf("confine files: %w", err)
	}
	return nil
}

// newRuleset is the rules as a file descriptor.
func newRuleset(abi int, rules []Rule) (int, error) {
	var a unix.LandlockRulesetAttr
	size := unsafe.Sizeof(a.Handled_access_fs)
	for _, v := range byABI {
		if v.abi <= abi {
			a.Handled_access_fs |= v.access
		}
	}
	if abi >= netABI {
		a.Handled_access_net = unix.LANDLOCK_ACCESS_NET_BIND_TCP | unix.LANDLOCK_ACCESS_NET_CONNECT_TCP
		size += unsafe.Sizeof(a.Handled_access_net)
	}
	if abi >= scopeABI {
		a.Scoped = unix.LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET
		size += unsafe.Sizeof(a.Scoped)
	}
	n, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, uintptr(unsafe.Pointer(&a)), size, 0)
	if errno != 0 {
		return -1, fmt.Errorf("make ruleset: %w", errno)
	}
	set := int(n)
	for _, r := range rules {
		if err := addRule(set, r, a.Handled_access_fs); err != nil {
			unix.Close(set)
			return -1, err
		}
	}
	return set, nil
}

func addRule(set int, r Rule, handled uint64) error {
	if extra := uint64(r.Access) &^ handled; extra != 0 {
		return fmt.Errorf("allow %s: access bit %d is unknown here: %w", r.Path, bits.TrailingZeros64(extra), unix.EINVAL)
	}
	dir := r.Dir
	if r.Path != "" {
		var err error
		if dir, err = unix.Open(r.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("allow %s: %w", r.Path, err)
		}
		defer unix.Close(dir)
	}
	// Packed in the kernel: 12 bytes, which lie at the beginning of the padded struct.
	b := unix.LandlockPathBeneathAttr{Allowed_access: uint64(r.Access), Parent_fd: int32(dir)}
	_, _, errno := unix.Syscall6(unix.SYS_LANDLOCK_ADD_RULE, uintptr(set), unix.LANDLOCK_RULE_PATH_BENEATH, uintptr(unsafe.Pointer(&b)), 0, 0, 0)
	if errno != 0 {
		return fmt.Errorf("allow %s (descriptor %d): %w", r.Path, dir, errno)
	}
	return nil
}
