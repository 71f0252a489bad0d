//go:build linux

package bench

import (
	"errors"
	"fmt"
)

const (
	pageSize  = 4096
	wordsPage = pageSize / 8
	extent    = 2 << 20 // what a large folio holds
)

// Op is what one touch meets.
type Op string

// The ops, in the order of the report.
const (
	ZeroRead     Op = "zero-read"     // a page that was never written is read
	ZeroWrite    Op = "zero-write"    // a page that was never written is written
	StoredRead   Op = "stored-read"   // a page that was written and paged out is read
	Minor        Op = "minor"         // a page that is resident already is read through a second mapping
	WriteProtect Op = "write-protect" // a page that was only read is written
)

// Ops are all ops.
var Ops = []Op{ZeroRead, ZeroWrite, StoredRead, Minor, WriteProtect}

func (o Op) writes() bool { return o == ZeroWrite || o == WriteProtect }

// Placement is where the threads of client and handler run.
type Placement string

// The placements.
const (
	SameCore Placement = "same core" // both on one CPU
	Free     Placement = "free"      // wherever the scheduler puts them
)

// Order is the order of the touches.
type Order string

// The orders. Both touch every page once.
const (
	Sequential Order = "sequential"
	Random     Order = "random"
)

// workload is one measurement: pages touched one after the other by one thread.
type workload struct {
	Op        Op
	Order     Order
	Placement Placement
	Pages     int
	Cluster   int  // pages per answer; 0: the system has no such notion
	Single    bool // the time of each touch is wanted, otherwise that of all together
	Seed      uint64
}

func (w workload) size() int { return w.Pages * pageSize }

// errNone is returned by a system that has no fault of the kind asked for. Its text goes into the report.
var errNone = errors.New("no such fault")

// system is a way to get memory whose faults are answered.
type system interface {
	// open makes memory of which the first touch of each page is what w.Op says. errNone if there is no such memory.
	open(w workload) (*target, error)
}

// target is memory to be touched.
type target struct {
	mem      []byte
	stride   int          // only every stride-th page is touched; 0: every page
	stored   bool         // pages read as their pattern, otherwise as zeros
	handlers []int        // processes that answer its faults
	fetch    func(p int)  // called with each page before it is touched, within the time; nil: nothing
	close    func() error // not nil
}

func (t *target) step() int { return max(1, t.stride) }

// pattern is every word of page p when it has contents: not zero, different in each page. The same is in floor.c.
func pattern(p int) uint64 { return uint64(p+1) * 0x9E3779B97F4A7C15 }

func fillPage(words []uint64, p int) {
	v := pattern(p)
	for i := range words[:wordsPage] {
		words[i] = v
	}
}

// fillAll writes the pattern to every page.
func fillAll(mem []byte) {
	w := words(mem)
	for p := range len(mem) / pageSize {
		fillPage(w[p*wordsPage:], p)
	}
}

// readAll touches every page, and says whether one is not what it must be.
func readAll(mem []byte, stored bool) error {
	w := words(mem)
	for p := range len(mem) / pageSize {
		if err := check(p, w[p*wordsPage], stored); err != nil {
			return err
		}
	}
	return nil
}

func check(p int, got uint64, stored bool) error {
	want := uint64(0)
	if stored {
		want = pattern(p)
	}
	if got != want {
		return fmt.Errorf("page %d reads %#x instead of %#x", p, got, want)
	}
	return nil
}
