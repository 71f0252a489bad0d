//go:build linux

package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"machpager/region"
)

// What a task has: enough pages that some are in paging space and some are not.
const (
	taskSize = 16 << 20
	taskBusy = 2 << 20 // of it, at the beginning: touched all the time
	taskPage = 4096
)

// errWrong is other contents than were written. The beginning of an answer.
var errWrong = errors.New("WRONG")

// task is a program that uses the pager that runs as a service. It touches its memory all the time, and does what its standard input says:
//
//	out     pages everything out
//	check   pages everything out, and compares every page
//	touch   compares every page
//
// It answers each with a line: ok, or what is wrong. It ends at the end of its input.
func task(socket string, userModeOnly bool) error {
	ctx := context.Background()
	pager, err := region.Dial(ctx, socket, &region.DialOptions{UserModeOnly: userModeOnly})
	if err != nil {
		return err
	}
	defer pager.Close()
	memory, err := pager.Allocate(ctx, taskSize, nil)
	if err != nil {
		return err
	}
	b := memory.Bytes()
	const mark = 0x9e3779b97f4a7c15
	fill := func() error {
		for off := uint64(0); off < taskSize; off += taskPage {
			binary.LittleEndian.PutUint64(b[off:], off^mark)
		}
		return nil
	}
	if err := region.Guard(fill); err != nil {
		return err
	}
	compare := func(off uint64) error {
		return region.Guard(func() error {
			if got := binary.LittleEndian.Uint64(b[off:]); got != off^mark {
				return fmt.Errorf("%w: the page at %#x has %#x", errWrong, off, got)
			}
			return nil
		})
	}

	// Somebody is in a fault at whatever instant something happens to the pager.
	broken := make(chan error, 1)
	go func() {
		for {
			off := rand.Uint64N(taskBusy/taskPage) * taskPage
			if err := compare(off); err != nil {
				broken <- err
				return
			}
			time.Sleep(200 * time.Microsecond)
		}
	}()

	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		fmt.Println(func() string {
			if in.Text() != "touch" {
				ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
				defer cancel()
				if err := memory.PageOut(ctx, 0, taskSize); err != nil {
					return fmt.Sprintf("page out: %v", err)
				}
			}
			if in.Text() == "out" {
				return "ok"
			}
			failed := 0
			var first error
			for off := uint64(0); off < taskSize; off += taskPage {
				err := compare(off)
				if errors.Is(err, errWrong) { // whatever has happened to the pager: never
					return err.Error()
				}
				if err != nil {
					failed++
					first = cmp.Or(first, err)
				}
			}
			if first != nil {
				return fmt.Sprintf("%d of %d pages are errors: %v", failed, taskSize/taskPage, first)
			}
			select {
			case err := <-broken:
				return fmt.Sprintf("%v (touched in passing)", err)
			default:
				return "ok"
			}
		}())
	}
	return memory.Close()
}
