package arena

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Why a file is not the arena that was expected.
var (
	ErrFormat   = errors.New("not an arena of this kind")
	ErrVersion  = errors.New("arena of another version")
	ErrTooLarge = errors.New("arena too large")
)

const (
	magic        = "MPARENA1"
	offKind      = 8
	offVersion   = 16
	offCommitted = 24
	headerLen    = 32 // the rest of the page is zeros
)

type header struct {
	kind      [8]byte
	version   uint32
	committed uint64
}

func newHeader(kind string, version uint32) (*header, error) {
	h := &header{version: version}
	if kind == "" || len(kind) > len(h.kind) {
		return nil, fmt.Errorf("kind %q: %w (1 to %d bytes)", kind, unix.EINVAL, len(h.kind))
	}
	copy(h.kind[:], kind)
	return h, nil
}

func (h *header) bytes() []byte {
	b := make([]byte, headerLen)
	copy(b, magic)
	copy(b[offKind:], h.kind[:])
	binary.NativeEndian.PutUint32(b[offVersion:], h.version)
	binary.NativeEndian.PutUint64(b[offCommitted:], h.committed)
	return b
}

// parse decodes a whole header page and checks all that it says by itself.
func parse(page []byte) (*header, error) {
	if len(page) != PageSize || string(page[:len(magic)]) != magic {
		return nil, fmt.Errorf("%w: no magic number", ErrFormat)
	}
	h := &header{
		version:   binary.NativeEndian.Uint32(page[offVersion:]),
		committed: binary.NativeEndian.Uint64(page[offCommitted:]),
	}
	copy(h.kind[:], page[offKind:])
	if h.committed%PageSize != 0 || h.committed > MaxSize {
		return nil, fmt.Errorf("%w: damaged header: %d bytes committed", ErrFormat, h.committed)
	}
	for i := offVersion + 4; i < PageSize; i++ {
		if page[i] != 0 && (i < offCommitted || i >= headerLen) {
			return nil, fmt.Errorf("%w: damaged header: byte %d is not zero", ErrFormat, i)
		}
	}
	return h, nil
}

// verify reads f's header without mapping it and says how many bytes of data it commits to.
func verify(f *os.File, kind string, version uint32) (int64, error) {
	want, err := newHeader(kind, version)
	if err != nil {
		return 0, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("fstat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size < PageSize {
		return 0, fmt.Errorf("%w: no regular file of at least %d bytes", ErrFormat, PageSize)
	}
	got, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return 0, fmt.Errorf("%w: no memfd: %w", ErrFormat, err)
	}
	if got&unix.F_SEAL_SHRINK == 0 || got&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE|unix.F_SEAL_GROW) != 0 {
		return 0, fmt.Errorf("%w: seals %#x (must be sealed against shrinking, and against nothing else)", ErrFormat, got)
	}
	page := make([]byte, PageSize)
	if _, err := f.ReadAt(page, 0); err != nil {
		return 0, fmt.Errorf("read header: %w", err)
	}
	h, err := parse(page)
	if err != nil {
		return 0, err
	}
	if h.kind != want.kind {
		return 0, fmt.Errorf("%w: it is a %q, want a %q", ErrFormat, h.kind[:], kind)
	}
	if h.version != version {
		return 0, fmt.Errorf("%w: %q version %d, this program knows %d", ErrVersion, kind, h.version, version)
	}
	if int64(h.committed) > st.Size-PageSize {
		return 0, fmt.Errorf("%w: damaged header: %d bytes committed, %d in the file", ErrFormat, h.committed, st.Size-PageSize)
	}
	return int64(h.committed), nil
}
