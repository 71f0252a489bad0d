package vm

import (
	"bytes"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// Where the reader runs relative to the faulting thread is worth more than everything in its code: waking a thread on another, idle CPU takes several times
// as long as the whole fault (it has to leave its halt), on the same CPU next to nothing, and the CPU of a thread that waits for us is free anyway. The
// kernel's wake-up prefers the idle CPU. So the reader looks now and then where the thread runs that makes most of its faults, and stays there as long as that
// thread does; when several threads fault in turn, it goes wherever the kernel likes.

const (
	placeEvery = 128 // faults between looks: a look reads one line of /proc, about the time of two faults
	placeShare = 3   // one thread must make more than 1 - 1/placeShare of the faults
)

// placement is the reader's own, not shared.
type placement struct {
	all    unix.CPUSet // what the process may use
	ok     bool
	pid    int
	tid    uint32 // candidate: who made most of the faults since the last look, by majority vote
	votes  int
	seen   int
	pinned int // CPU, or -1
}

func newPlacement(pid int) *placement {
	p := &placement{pid: pid, pinned: -1}
	p.ok = unix.SchedGetaffinity(0, &p.all) == nil && p.all.Count() > 1
	return p
}

// fault tells of one fault by thread tid.
func (p *placement) fault(tid uint32) {
	if !p.ok {
		return
	}
	switch {
	case tid == p.tid:
		p.votes++
	case p.votes == 0:
		p.tid, p.votes = tid, 1
	default:
		p.votes--
	}
	if p.seen++; p.seen >= placeEvery {
		p.look()
		p.seen, p.votes = 0, 0
	}
}

func (p *placement) look() {
	cpu := -1
	if p.votes > placeEvery-2*placeEvery/placeShare {
		cpu = cpuOf(p.pid, p.tid)
	}
	if cpu == p.pinned {
		return
	}
	set := p.all
	if cpu >= 0 && p.all.IsSet(cpu) {
		set.Zero()
		set.Set(cpu)
	} else {
		cpu = -1
	}
	if unix.SchedSetaffinity(0, &set) != nil {
		p.ok = false
		return
	}
	p.pinned = cpu
}

// cpuOf is the CPU that a thread ran on last (proc_pid_stat(5), processor), -1 if it cannot be told: another PID namespace, say.
func cpuOf(pid int, tid uint32) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
	if err != nil {
		return -1
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const processor = 39 - 3 // counted from 1, and the first two stand before the bracket
	if len(f) <= processor {
		return -1
	}
	cpu, err := strconv.Atoi(string(f[processor]))
	if err != nil {
		return -1
	}
	return cpu
}
