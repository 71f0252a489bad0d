//go:build linux

package uffd

import (
	"os"
	"runtime"
	"runtime/debug"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bytesAt is memory that was mapped by a system call, as a slice.
func bytesAt(addr, size uint64) []byte { return unsafe.Slice(pointerTo(addr), size) }

// pointerTo makes a pointer of the address of memory outside the Go heap.
func pointerTo(addr uint64) *byte { return *(**byte)(unsafe.Pointer(&addr)) }

func munmap(addr, size uint64) unix.Errno {
	if size == 0 {
		return 0
	}
	_, _, errno := unix.Syscall(unix.SYS_MUNMAP, uintptr(addr), uintptr(size), 0)
	return errno
}

func madvise(addr, size uint64, advice int) unix.Errno {
	_, _, errno := unix.Syscall(unix.SYS_MADVISE, uintptr(addr), uintptr(size), uintptr(advice))
	return errno
}

// peek reads memory by process_vm_readv(2) on this process: a fault waits in the kernel, and the P is free meanwhile.
func peek(addr, n uint64) ([]byte, error) {
	buf := make([]byte, n)
	err := vm(unix.ProcessVMReadv, addr, buf)
	return buf, err
}

// poke writes memory as peek reads it.
func poke(addr uint64, data []byte) error { return vm(unix.ProcessVMWritev, addr, data) }

func vm(call func(int, []unix.Iovec, []unix.RemoteIovec, uint) (int, error), addr uint64, buf []byte) error {
	for len(buf) > 0 {
		local := []unix.Iovec{{Base: &buf[0]}}
		local[0].SetLen(len(buf))
		n, err := call(os.Getpid(), local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(buf)}}, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		if n == 0 {
			return unix.EFAULT
		}
		buf, addr = buf[n:], addr+uint64(n)
	}
	return nil
}

// pipeFrom writes 8 bytes at addr to a pipe and returns them: a touch at exactly addr, by copy_from_user in write(2).
func pipeFrom(addr uint64) (got [8]byte, err error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return got, err
	}
	defer unix.Close(p[0])
	defer unix.Close(p[1])
	for {
		_, _, errno := unix.Syscall(unix.SYS_WRITE, uintptr(p[1]), uintptr(addr), 8)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return got, errno
		}
		_, err = unix.Read(p[0], got[:])
		return got, err
	}
}

// A touch is a system call that may wait for a fault.
type touch struct {
	tid  int
	done chan struct{}
	data []byte
	err  error
}

func start(f func(*touch)) *touch {
	c, tid := &touch{done: make(chan struct{})}, make(chan int)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		tid <- unix.Gettid()
		f(c)
		close(c.done)
	}()
	c.tid = <-tid
	return c
}

func startPeek(addr, n uint64) *touch { return start(func(c *touch) { c.data, c.err = peek(addr, n) }) }

func startPoke(addr uint64, data []byte) *touch {
	return start(func(c *touch) { c.err = poke(addr, data) })
}

// wait returns the touch's outcome.
func (c *touch) wait(t testing.TB) ([]byte, error) {
	t.Helper()
	select {
	case <-c.done:
		return c.data, c.err
	case <-time.After(10 * time.Second):
		t.Fatal("touch still waits after 10 s")
		return nil, nil
	}
}

func (c *touch) ok(t testing.TB) []byte {
	t.Helper()
	data, err := c.wait(t)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// waits fails the test if the touch ends without being answered.
func (c *touch) waits(t testing.TB) {
	t.Helper()
	select {
	case <-c.done:
		t.Fatalf("touch ended by itself: %v", c.err)
	case <-time.After(20 * time.Millisecond):
	}
}

// load and store touch memory directly. They report SIGBUS, and must never meet a fault that waits for this process.
//
//go:norace
func load(addr uint64) (v byte, sigbus bool) {
	defer recoverFault(&sigbus, addr)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	return *pointerTo(addr), false
}

// Without the race detector's call between, the store's nil check is the store itself: no load comes before it.
//
//go:norace
func store(addr uint64, v byte) (sigbus bool) {
	defer recoverFault(&sigbus, addr)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	*pointerTo(addr) = v
	return false
}

func recoverFault(sigbus *bool, addr uint64) {
	switch e := recover().(type) {
	case nil:
	case interface{ Addr() uintptr }:
		if uint64(e.Addr()) != addr {
			panic(e)
		}
		*sigbus = true
	default:
		panic(e)
	}
}
