package frames

import (
	"bytes"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"machpager/uffd"
)

// probeSize is the room in bytes that the probe needs on the mount.
const probeSize = 16 << 20

// probe finds out whether large folios behave on this kernel as the package comment says: nil, or what is different. It uses the pool's own
// mount and leaves nothing there.
func (p *Pool) probe() error {
	if p.mount == nil || !p.mount.huge {
		return errors.New("huge=within_size refused")
	}
	if err := p.probeExtent(); err != nil {
		return err
	}
	return p.probeCopy()
}

// probeExtent writes whole and partial extents and punches.
func (p *Pool) probeExtent() error {
	f, err := p.NewFile(2 * ExtentSize)
	if err != nil {
		return err
	}
	defer f.Close()
	data := bytes.Repeat([]byte{0xa5}, ExtentSize)
	if _, err := f.WriteAt(data, 0); err != nil {
		return err
	}
	if err := f.charged("a whole extent written", ExtentSize); err != nil {
		return err
	}
	// What a single page costs tells that extents are folios: 512 small pages would be charged alike.
	if _, err := f.WriteAt(data[:PageSize], ExtentSize); err != nil {
		return err
	}
	if err := f.charged("one page written into an empty extent", 2*ExtentSize); err != nil {
		return err
	}
	if left, err := f.Punch(ExtentSize, ExtentSize); err != nil || left != 0 {
		return fmt.Errorf("whole extent punched: %d bytes left, %w", left, err)
	}
	if left, err := f.Punch(0, PageSize); err != nil || left != 0 {
		return fmt.Errorf("part of an extent punched: %d bytes left, %w", left, err)
	}
	if err := f.charged("one page of an extent punched", ExtentSize-PageSize); err != nil {
		return err
	}
	page, want := make([]byte, 2*PageSize), append(make([]byte, PageSize), data[:PageSize]...)
	if err := f.ReadAt(page, 0); err != nil {
		return err
	}
	if !bytes.Equal(page, want) {
		return errors.New("one page of an extent punched: its neighbour changed")
	}
	return nil
}

// probeCopy fills one page of a registered mapping that nothing ever touches.
func (p *Pool) probeCopy() error {
	f, err := p.NewFile(2 * ExtentSize)
	if err != nil {
		return err
	}
	defer f.Close()
	mem, err := unix.Mmap(f.Fd(), 0, 2*ExtentSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("map probe file: %w", err)
	}
	defer unix.Munmap(mem)
	start := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(mem))))
	u, err := openUffd()
	if err != nil {
		return err
	}
	defer u.Close()
	if _, err := u.Register(start, uint64(len(mem)), uffd.RegisterMissing); err != nil {
		return err
	}
	page := bytes.Repeat([]byte{0x5a}, PageSize)
	for i := range 2 { // one at the beginning of an extent, one in the middle of the same
		if n, err := u.Copy(start+uint64(i)*ExtentSize/2, page, 0); err != nil || n != PageSize {
			return fmt.Errorf("copy a page: %d bytes, %w", n, err)
		}
		if err := f.charged("single pages copied", int64(i+1)*PageSize); err != nil {
			return err
		}
	}
	return nil
}

// openUffd takes a full userfaultfd or, without the privilege, one for faults of user mode: enough for memory that nobody touches.
func openUffd() (*uffd.FD, error) {
	u, err := uffd.Open(&uffd.OpenOptions{})
	if err == nil {
		return u, nil
	}
	u, uerr := uffd.Open(&uffd.OpenOptions{UserModeOnly: true})
	if uerr != nil {
		return nil, errors.Join(err, uerr)
	}
	return u, nil
}

func (f *File) charged(what string, want int64) error {
	got, err := f.Blocks()
	if err == nil && got != want {
		err = fmt.Errorf("%s: %d bytes charged, want %d", what, got, want)
	}
	return err
}
