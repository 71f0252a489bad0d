package e2e

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"
)

// parents maps every process to its parent.
func parents() map[int]int {
	m := map[int]int{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		// pid (comm) state ppid: comm may contain anything.
		i := bytes.LastIndexByte(b, ')')
		fields := strings.Fields(string(b[i+1:]))
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		m[pid], _ = strconv.Atoi(fields[1])
	}
	return m
}

// descendants are the children of pid, and theirs; parents come before children.
func descendants(pid int) []int {
	up := parents()
	var all []int
	for queue := []int{pid}; len(queue) > 0; queue = queue[1:] {
		for child, parent := range up {
			if parent == queue[0] {
				all = append(all, child)
				queue = append(queue, child)
			}
		}
	}
	return all
}

func cmdline(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return strings.TrimSpace(string(bytes.ReplaceAll(b, []byte{0}, []byte{' '})))
}

// threads tells where in the kernel the threads of a process wait: handle_userfault is a page fault nobody has answered.
func threads(pid int) string {
	var s strings.Builder
	dirs, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
	for _, d := range dirs {
		w, _ := os.ReadFile(d + "/wchan")
		if st, err := os.ReadFile(d + "/stack"); err == nil && bytes.Contains(st, []byte("handle_userfault")) {
			w = []byte("handle_userfault")
		}
		fmt.Fprintf(&s, "  thread %s in %s\n", filepath.Base(d), w)
	}
	return s.String()
}

// stacks has a child of a task print its stacks, which ends it. They go into a pipe that the task reads, if it can; so they are read here, too.
func stacks(pid int) string {
	var b bytes.Buffer
	fmt.Fprintf(&b, "watchdog: process %d: %s\n%s", pid, cmdline(pid), threads(pid))
	pipe, err := os.OpenFile(fmt.Sprintf("/proc/%d/fd/2", pid), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		fmt.Fprintln(&b, err)
	}
	syscall.Kill(pid, syscall.SIGQUIT)
	if err == nil {
		pipe.SetReadDeadline(time.Now().Add(time.Second))
		b.ReadFrom(pipe)
		pipe.Close()
	}
	return b.String()
}

// faulting counts the threads of a process that wait in a userfaultfd fault.
func faulting(pid int) int { return strings.Count(threads(pid), "handle_userfault") }

// alive reports whether pid is a process that has not ended (a zombie has).
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	i := bytes.LastIndexByte(b, ')')
	return i >= 0 && i+2 < len(b) && b[i+2] != 'Z' && b[i+2] != 'X'
}

// pagersOf are the living pagers below a process, in the order in which they were started: the one that serves, and the one that stands by.
func pagersOf(pid int) (pids []int) {
	at := map[int]uint64{}
	for _, pid := range descendants(pid) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		i := bytes.LastIndexByte(b, ')')
		if f := strings.Fields(string(b[i+1:])); len(f) > 19 && alive(pid) && strings.HasPrefix(cmdline(pid), "machpager-pager") {
			at[pid], _ = strconv.ParseUint(f[19], 10, 64) // starttime, proc_pid_stat(5)
			pids = append(pids, pid)
		}
	}
	slices.SortFunc(pids, func(a, b int) int { return cmp.Or(cmp.Compare(at[a], at[b]), cmp.Compare(a, b)) })
	return pids
}

// standbyOf waits for the pager that stands by below a process.
func standbyOf(t testing.TB, pid int) int {
	t.Helper()
	var pids []int
	eventually(t, 10*time.Second, "a pager stands by", func() bool { pids = pagersOf(pid); return len(pids) == 2 })
	return pids[1]
}

// settledStandby waits for the pager that stands by, and until it has opened all that it opens: who counts what processes hold must not count one that has just begun.
func settledStandby(pid int) error {
	var last holdings
	for end, same := time.Now().Add(10*time.Second), 0; same < 20; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("no pager stands by below process %d, or it opens and closes without end: %+v", pid, last)
		}
		pids := pagersOf(pid)
		if len(pids) != 2 {
			continue
		}
		now := holdingsOf(pids[1])
		if same++; now != last {
			last, same = now, 0
		}
	}
	return nil
}

// eventually waits for cond.
func eventually(t testing.TB, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}

// holdings counts what a process can leak.
type holdings struct{ FDs, Maps, Threads int }

func holdingsOf(pid int) holdings {
	fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	maps, _ := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	th, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	return holdings{len(fds), bytes.Count(maps, []byte{'\n'}), len(th)}
}

// contents of page i of an object in version v: the same in every process, different for every page and version.
func fill(b []byte, off int64, v uint64) {
	for i := range b {
		o := uint64(off + int64(i))
		x := (o>>3 + v<<40 + 1) * 0x9e3779b97f4a7c15
		x ^= x >> 29
		b[i] = byte(x >> (8 * (o & 7)))
	}
}

// fdsOf counts the file descriptors of a process by what they are.
func fdsOf(pid int) map[string]int {
	m := map[string]int{}
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, l := range links {
		to, _ := os.Readlink(l)
		to, _, _ = strings.Cut(to, ":[")
		m[to]++
	}
	return m
}

// addressOf is where b begins.
func addressOf(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }
