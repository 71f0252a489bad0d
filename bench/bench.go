//go:build linux

// Package bench measures what a page fault costs: with machpager, with the C floor (the least code that answers faults by the same ioctls), with
// userfaultfd-go's mapper, and with the kernel alone.
//
// # How it measures
//
// [Fault] is the driver. It starts the pager and one client process; the client touches memory and takes the time of every touch. All systems are
// driven by the same code of the same client, so that its own cost is in all of them alike. Systems take turns within a round, and every round begins with another
// one, so that what changes on the machine meanwhile meets all of them. The first round warms up and is thrown away. A figure is
// the median over the rounds, with the smallest and the largest beside it; goals are judged by the median of the ratios within each round.
//
// Before anything is measured the client touches and frees memory: in a virtual machine the first touch of memory that the host has not
// backed yet costs several times as much as the fault.
//
// Placement is where the threads run: [SameCore] pins the client and whoever answers to one CPU, [Free] leaves both to the scheduler. Waking a
// thread on another, idle CPU can cost more than all the rest of a fault: only figures of one placement may be compared.
//
// Every value that is read is checked: a system that is fast and wrong ends the benchmark.
//
// The C floor is compiled on the spot with gcc. userfaultfd-go needs cgo: a binary built without it leaves that row out and says so.
package bench

import (
	"fmt"
	"os"
)

// argv0 is what a process started by this package is called, and known by.
const argv0 = "machpager[bench]"

// Main does the work of a client, or of userfaultfd-go's handler, if this process is one that [Fault] or [Paging] started, and then does not return. A program
// that calls one of them calls Main first, in main or in TestMain.
func Main() {
	if os.Args[0] != argv0 || len(os.Args) < 2 {
		return
	}
	var err error
	switch os.Args[1] {
	case "client":
		err = clientMain()
	case "paging":
		err = pagingMain()
	case "mapper":
		err = mapperMain(os.Args[2:])
	default:
		err = fmt.Errorf("unknown role %q", os.Args[1])
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s %s: %v\n", argv0, os.Args[1], err)
		os.Exit(1)
	}
	os.Exit(0)
}
