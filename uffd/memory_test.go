//go:build linux

package uffd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

func isNotSupported(err error) bool { return errors.Is(err, ErrNotSupported) }

// pages is how many pages a test's memory has.
const pages = 8

// A kind is a sort of memory that userfaultfd knows.
type kind struct {
	name    string
	shared  bool // mapped MAP_SHARED, so that file and alias show the same pages
	file    func() (int, error)
	hugetlb bool
}

var (
	anon    = kind{name: "anon"}
	memfd   = kind{name: "memfd", shared: true, file: func() (int, error) { return unix.MemfdCreate("uffd-test", unix.MFD_CLOEXEC) }}
	private = kind{name: "memfd-private", file: memfd.file}
	tmpfs   = kind{name: "tmpfs", shared: true, file: tmpfsFile}
	hugetlb = kind{name: "hugetlb", shared: true, hugetlb: true, file: func() (int, error) {
		return unix.MemfdCreate("uffd-test", unix.MFD_CLOEXEC|unix.MFD_HUGETLB)
	}}
	hugetlbPrivate = kind{name: "hugetlb-private", hugetlb: true, file: hugetlb.file}

	allKinds = []kind{anon, memfd, private, tmpfs, hugetlb, hugetlbPrivate}
)

// tmpfsFile makes an unlinked file on a tmpfs that is nowhere attached, as machpager's frames are.
func tmpfsFile() (int, error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fs)
	for key, value := range map[string]string{"size": "64m", "huge": "within_size"} {
		if err := unix.FsconfigSetString(fs, key, value); err != nil {
			return -1, fmt.Errorf("%s=%s: %w", key, value, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, err
	}
	mount, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(mount)
	return unix.Openat(mount, ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
}

// memory is a mapping of a kind.
type memory struct {
	addr uint64
	size uint64
	page uint64
	file int // -1: anonymous
	kind kind
	mem  []byte // the same memory; never touched where that could wait for a fault
}

func (k kind) pageSize() uint64 {
	if k.hugetlb {
		return uint64(hugeSize)
	}
	return uint64(os.Getpagesize())
}

// mapMemory maps size bytes at an address aligned to 2 MiB.
func (k kind) mapMemory(size uint64) (*memory, error) {
	m := &memory{size: size, page: k.pageSize(), file: -1, kind: k}
	if k.file != nil {
		var err error
		if m.file, err = k.file(); err != nil {
			return nil, fmt.Errorf("make %s file: %w", k.name, err)
		}
		if err := unix.Ftruncate(m.file, int64(size)); err != nil {
			return nil, err
		}
	}
	if err := m.mapAgain(m); err != nil {
		unix.Close(m.file)
		return nil, err
	}
	return m, nil
}

// mapAgain maps m's file, or anonymous memory, anew and sets to's address.
func (m *memory) mapAgain(to *memory) error {
	const align = 2 << 20
	flags := uintptr(unix.MAP_PRIVATE)
	if m.kind.shared {
		flags = unix.MAP_SHARED
	}
	if m.file < 0 {
		flags |= unix.MAP_ANONYMOUS
	}
	hole, err := unix.MmapPtr(-1, 0, nil, uintptr(m.size+align), unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	base := uint64(uintptr(hole))
	addr := (base + align - 1) &^ (align - 1)
	if _, _, errno := unix.Syscall6(unix.SYS_MMAP, uintptr(addr), uintptr(m.size), unix.PROT_READ|unix.PROT_WRITE, flags|unix.MAP_FIXED,
		uintptr(m.file), 0); errno != 0 {
		munmap(base, m.size+align)
		return errno
	}
	munmap(base, addr-base)
	munmap(addr+m.size, base+align-addr)
	to.addr, to.size, to.page, to.file, to.kind = addr, m.size, m.page, m.file, m.kind
	to.mem = bytesAt(addr, m.size)
	return nil
}

// at is the address of page i.
func (m *memory) at(i int) uint64 { return m.addr + uint64(i)*m.page }

func (m *memory) unmap() {
	munmap(m.addr, m.size)
	if m.file >= 0 {
		unix.Close(m.file)
		m.file = -1
	}
}

func (k kind) memory(t testing.TB) *memory {
	t.Helper()
	return k.memorySize(t, pages*k.pageSize())
}

func (k kind) memorySize(t testing.TB, size uint64) *memory {
	t.Helper()
	m, err := k.mapMemory(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(m.unmap)
	return m
}

// alias maps a shared file once more; that mapping is registered nowhere and may be touched freely.
func (m *memory) alias(t testing.TB) []byte {
	t.Helper()
	var a memory
	if err := m.mapAgain(&a); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { munmap(a.addr, a.size) })
	return a.mem
}

// each runs a test for all kinds it is given, hugetlb only where huge pages could be reserved.
func each(t *testing.T, kinds []kind, test func(t *testing.T, k kind)) {
	for _, k := range kinds {
		if k.hugetlb && !haveHuge {
			t.Logf("%s left out: no huge pages could be reserved", k.name)
			continue
		}
		t.Run(k.name, func(t *testing.T) { test(t, k) })
	}
}

// fill returns n bytes, no two 4 KiB of which are alike, for one seed or for two.
func fill(n uint64, seed int) []byte {
	b := make([]byte, n)
	for i := range min(n, 4096) {
		b[i] = byte(i)*3 + byte(seed)*31 + 1
	}
	for block := uint64(4096); block < n; block += 4096 {
		binary.NativeEndian.PutUint64(b[block+uint64(copy(b[block:], b[:4096]))-8:], block)
	}
	return b
}

func wantBytes(t testing.TB, m *memory, i int, want []byte) {
	t.Helper()
	got, err := peek(m.at(i), uint64(len(want)))
	if err != nil {
		t.Fatalf("read page %d: %v", i, err)
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("page %d holds %x.., want %x..", i, got[:16], want[:16])
	}
}

func wantDone(t testing.TB, what string, done int64, err error, want uint64, wantErr error) {
	t.Helper()
	if uint64(done) != want || !errors.Is(err, wantErr) {
		t.Fatalf("%s: %d bytes, %v; want %d bytes, %v", what, done, err, want, wantErr)
	}
}

func wantErr(t testing.TB, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: %v, want %v", what, err, want)
	}
}

func register(t testing.TB, u *FD, m *memory, mode RegisterMode) Ioctls {
	t.Helper()
	i, err := u.Register(m.addr, m.size, mode)
	if err != nil {
		t.Fatal(err)
	}
	return i
}
