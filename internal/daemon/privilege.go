package daemon

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// tier is what this pager and its tasks are allowed to do.
type tier struct {
	letter byte   // 'A', 'B' or 'C'
	text   string // what it means, and what would give more
}

// privilege finds out the tier of this process. It is told to tasks, which may be allowed less or more than the pager.
func privilege() tier {
	admin, ptrace := hasCap(unix.CAP_SYS_ADMIN), hasCap(unix.CAP_SYS_PTRACE)
	if admin && ptrace {
		return tier{'A', "privileged (CAP_SYS_PTRACE and CAP_SYS_ADMIN): everything"}
	}
	var why []string
	if ptrace {
		why = append(why, "CAP_SYS_PTRACE")
	}
	if b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err == nil && strings.TrimSpace(string(b)) == "1" {
		why = append(why, "vm.unprivileged_userfaultfd=1")
	}
	if unix.Access(uffd.DevicePath, unix.R_OK|unix.W_OK) == nil {
		why = append(why, "permission on "+uffd.DevicePath)
	}
	if len(why) > 0 {
		return tier{'B', fmt.Sprintf("unprivileged with userfaultfd (%s): everything, on frames of a user namespace or memfds "+
			"(run as root for a tmpfs whose size the kernel enforces and that is not swapped)", strings.Join(why, ", "))}
	}
	return tier{'C', "unprivileged: user mode only, where system calls on missing memory fail with EFAULT (run as root, or set the sysctl " +
		"vm.unprivileged_userfaultfd=1, or give read and write permission on " + uffd.DevicePath + ")"}
}

// hasCap reports whether a capability is effective. capget(2)
func hasCap(c uint) bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&h, &data[0]); err != nil {
		return false
	}
	return data[c/32].Effective&(1<<(c%32)) != 0
}
