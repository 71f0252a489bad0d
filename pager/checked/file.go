package checked

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
)

// Disk is the file below: a regular file, or what behaves like one. Its methods are called from any goroutine, for ranges that do not overlap where one of them writes; but a
// table is read while entries of it are written.
type Disk interface {
	io.ReaderAt
	io.WriterAt // what is written to 512 aligned bytes gets to the device as one
	// Sync makes safe what was written before it was called, and the length. Once it has failed it must fail for good: nobody knows then what is safe.
	Sync() error
	Length() (int64, error)
	// Truncate makes it n bytes long, more than it was; the new bytes are zeros.
	Truncate(n int64) error
	// Punch makes bytes zeros that take no space. It is no promise: an error, or bytes that stay, are space that is not given back.
	Punch(off, n int64) error
	// Data is the first offset from off on where there may be bytes other than zero, or io.EOF if there are none.
	Data(off int64) (int64, error)
	// PeekAt is ReadAt without waiting: it fills all of p, or reports false.
	PeekAt(p []byte, off int64) bool
}

// Options of a File. nil and zero values mean the defaults.
type Options struct {
	ReadOnly bool // nothing is changed: WriteAt is an error, Sync does nothing, and an empty file is none
}

// File is contents on a Disk.
type File struct {
	d        Disk   // immutable
	readOnly bool   // immutable
	head     header // immutable
	length   int64  // immutable; what the file must have, in bytes

	left atomic.Bool // another File may have left units pending

	syncMu  sync.Mutex   // held by Sync
	gate    sync.RWMutex // see the package comment
	tableMu sync.Mutex   // held while entries are sealed, which may be read meanwhile

	mu      sync.Mutex
	pending map[int64]*units // guarded by mu; by group: units that this File has made pending
	sealing map[int64]*units // guarded by mu; nil: no Sync is under way. The units it seals, which must not be written
	sealed  chan struct{}    // guarded by mu; closed when sealing ends
}

// units are some of a group.
type units [groupUnits / 64]uint64

func (u *units) has(n int) bool { return u[n/64]&(1<<(n%64)) != 0 }
func (u *units) put(n int)      { u[n/64] |= 1 << (n % 64) }
func (u *units) drop(n int)     { u[n/64] &^= 1 << (n % 64) }

func (u *units) add(v *units) {
	for i := range u {
		u[i] |= v[i]
	}
}

// overlaps reports whether one of [a, b) is among them.
func (u *units) overlaps(a, b int) bool {
	for n := a; n < b; n++ {
		if u.has(n) {
			return true
		}
	}
	return false
}

// run is the first run of them from n on; a == b: there is none.
func (u *units) run(n int) (a, b int) {
	for a = n; a < groupUnits && !u.has(a); {
		a++
	}
	for b = a; b < groupUnits && u.has(b); {
		b++
	}
	return a, b
}

// Open opens the contents on d, or makes them if it is empty. size is how many bytes they are to have at least: they grow if they have less. 0: what
// they have. The Disk is not closed by anything here.
func Open(d Disk, size int64, o *Options) (*File, error) {
	if o == nil {
		o = &Options{}
	}
	if size < 0 || size > MaxSize {
		return nil, fmt.Errorf("open checked file: size %d: want 0 to %d: %w", size, int64(MaxSize), unix.EINVAL)
	}
	h, isNew, err := readHeader(d)
	switch {
	case err != nil:
		return nil, fmt.Errorf("open checked file: %w", err)
	case o.ReadOnly && isNew:
		return nil, fmt.Errorf("open checked file: it is empty, and open read-only: %w: %w", ErrFormat, unix.EINVAL)
	case size == 0 && h.size == 0:
		return nil, fmt.Errorf("open checked file: it has no contents (give the size that they are to have): %w", unix.EINVAL)
	case o.ReadOnly && size > h.size:
		return nil, fmt.Errorf("open checked file of %d bytes for %d: it is open read-only, and cannot grow: %w", h.size, size, unix.EINVAL)
	}
	if isNew {
		var id [8]byte
		if _, err := rand.Read(id[:]); err != nil {
			return nil, fmt.Errorf("open checked file: %w", err)
		}
		h.identity = binary.LittleEndian.Uint64(id[:]) | 1
		if err := putHeader(d, h); err != nil {
			return nil, fmt.Errorf("make checked file: %w", err)
		}
	}
	if size > h.size {
		failpoint.Here("checked.grow")
		if err := grow(d, &h, size); err != nil {
			return nil, fmt.Errorf("grow checked file to %d bytes: %w", size, err)
		}
	}
	f := &File{d: d, readOnly: o.ReadOnly, head: h, length: fileLength(h.size), pending: map[int64]*units{}}
	f.left.Store(!isNew)
	return f, nil
}

// Size is how many bytes of contents the file on d has; 0 if it is empty.
func Size(d Disk) (int64, error) {
	h, _, err := readHeader(d)
	if err != nil {
		return 0, fmt.Errorf("size of checked file: %w", err)
	}
	return h.size, nil
}

// readHeader reads the header; isNew: there is none yet.
func readHeader(d Disk) (h header, isNew bool, err error) {
	length, err := d.Length()
	if err != nil || length == 0 {
		return header{}, err == nil, err
	}
	b := make([]byte, min(headerSize, length))
	if n, err := d.ReadAt(b, 0); err != nil && (n < len(b) || !errors.Is(err, io.EOF)) {
		return header{}, false, fmt.Errorf("read header: %w", err)
	}
	if length == headerSize && bytes.Equal(b, zeros[:]) { // the machine died when the file was made: it has its length
		return header{}, true, nil
	}
	h, err = decodeHeader(b, length)
	return h, false, err
}

// putHeader has the device know a header.
func putHeader(d Disk, h header) error {
	if _, err := d.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("write header: %w", err)
	}
	failpoint.Here("checked.header")
	return d.Sync()
}

// grow makes room first: a header is never of more than there is. That there is room already does not say that the device knows.
func grow(d Disk, h *header, size int64) error {
	length, err := d.Length()
	if n := fileLength(size); err == nil && n > length {
		err = d.Truncate(n)
	}
	if err == nil {
		err = d.Sync()
	}
	if err != nil {
		return err
	}
	h.size = size
	return putHeader(d, *h)
}

// Size is how many bytes there are.
func (f *File) Size() int64 { return f.head.size }

// whole reports an error if somebody has truncated the file: what is written behind its end would be found among zeros.
func (f *File) whole() error {
	n, err := f.d.Length()
	if err == nil && n < f.length {
		err = f.truncated(n)
	}
	return err
}

func (f *File) truncated(n int64) error {
	return fmt.Errorf("the file has %d bytes, where there were %d: somebody has truncated it (bring it back from a copy): %w", n, f.length, io.ErrUnexpectedEOF)
}

// addPending adds units that this File has made pending. Called with mu.
func (f *File) addPending(group int64, add *units) {
	u := f.pending[group]
	if u == nil {
		u = new(units)
		f.pending[group] = u
	}
	u.add(add)
}

// own is which units of a group are pending by what this File has done.
func (f *File) own(group int64) (u units) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, m := range []map[int64]*units{f.pending, f.sealing} {
		if v := m[group]; v != nil {
			u.add(v)
		}
	}
	return u
}
