//go:build linux

package bench

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// lastCPU is the last of the CPUs allowed: the first takes most interrupts.
func lastCPU(allowed *unix.CPUSet) *unix.CPUSet {
	var one unix.CPUSet
	for i := len(allowed)*64 - 1; i >= 0; i-- {
		if allowed.IsSet(i) {
			one.Set(i)
			break
		}
	}
	return &one
}

// pin lets all threads of a process run on set only. Threads that they make later do too.
func pin(pid int, set *unix.CPUSet) error {
	done := map[int]bool{}
	for { // a thread may have been made while the list was read
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return fmt.Errorf("pin process %d: %w", pid, err)
		}
		fresh := false
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || done[tid] {
				continue
			}
			done[tid], fresh = true, true
			if err := unix.SchedSetaffinity(tid, set); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("pin thread %d of process %d: %w", tid, pid, err)
			}
		}
		if !fresh {
			return nil
		}
	}
}
