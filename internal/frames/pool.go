package frames

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// PageSize is the size of a frame in bytes, the granularity of everything here.
	PageSize = 4096
	// ExtentSize is the size and alignment in bytes of what one large folio holds.
	ExtentSize = 2 << 20
	// ExtentFrames is ExtentSize in frames.
	ExtentFrames = ExtentSize / PageSize
)

// Kind says what the frames are made of. See the package comment.
type Kind int

const (
	Auto        Kind = iota // the best that works: Tmpfs, else TmpfsUserNS, else Memfd
	Tmpfs                   // a detached mount
	TmpfsUserNS             // a detached mount that belongs to a user namespace of its own
	Memfd                   // one memfd for each file
)

func (k Kind) String() string {
	switch k {
	case Auto:
		return "auto"
	case Tmpfs:
		return "tmpfs"
	case TmpfsUserNS:
		return "tmpfs-userns"
	case Memfd:
		return "memfd"
	}
	return fmt.Sprintf("kind(%d)", int(k))
}

// Options for Open.
type Options struct {
	Budget int64        // bytes all files together may occupy; at least one page, rounded down to whole pages
	Kind   Kind         // Auto: the best that works; anything else: that or an error
	Log    *slog.Logger // nil: discard

	// Adopt describes a pool that has died, and Mount is the mount it left, nil if it had none: it is taken over with what lies in it. Kind is not looked at. The budget stays
	// as the mount has it if more than Budget is in use. On success Mount is the pool's; on an error it stays the caller's. nil: a new pool.
	Adopt *State
	Mount *os.File
}

// Pool is the frames that all memory objects of one pager share. Its methods may be called from any goroutine.
type Pool struct {
	kind    Kind         // immutable
	extents bool         // immutable
	noswap  bool         // immutable
	log     *slog.Logger // immutable
	mount   *mount       // immutable; nil: memfds
	budget  atomic.Int64 // frames, what SetBudget granted last
	free    atomic.Int64 // frames: budget - reserved; the only word that reserving touches

	mu     sync.Mutex
	files  map[*File]struct{} // guarded by mu; files not yet closed
	left   []buried           // guarded by mu; files that were closed while tasks had them open
	closed bool               // guarded by mu

	adopted bool  // immutable; the mount is an earlier pool's
	strays  int64 // guarded by mu; frames in files that nobody here knows: see Recount
}

// Open makes an empty pool and finds out what this kernel does with large folios. It takes some milliseconds, and with TmpfsUserNS starts a
// child process that has ended when it returns.
func Open(o Options) (*Pool, error) {
	budget := o.Budget / PageSize
	if o.Budget < PageSize || budget > math.MaxInt64/PageSize {
		return nil, fmt.Errorf("open frame pool: budget of %d bytes: %w (at least %d)", o.Budget, unix.EINVAL, PageSize)
	}
	p := &Pool{log: o.Log, files: make(map[*File]struct{})}
	if p.log == nil {
		p.log = slog.New(slog.DiscardHandler)
	}
	p.budget.Store(budget)
	p.free.Store(budget)
	if o.Adopt != nil {
		if err := p.adopt(*o.Adopt, o.Mount); err != nil {
			return nil, fmt.Errorf("open frame pool: %w", err)
		}
		if o.Mount != nil {
			o.Mount.Close()
		}
	} else if err := p.open(o.Kind, attempts); err != nil {
		return nil, fmt.Errorf("open frame pool: %w", err)
	}
	p.log.Info("frames", "kind", p.kind.String(), "budget", p.Budget(), "adopted", p.adopted, "extents", p.extents, "noswap", p.noswap)
	return p, nil
}

// attempt says how to make one kind of pool. Tests replace an entry to see what Auto makes of its failure.
type attempt struct {
	kind  Kind
	mount func(size int64, huge bool) (*mount, error) // size in bytes; nil: memfds
}

var attempts = []attempt{{Tmpfs, mountHere}, {TmpfsUserNS, mountInUserNS}, {Memfd, nil}}

func (p *Pool) open(kind Kind, list []attempt) error {
	var why []error
	for _, a := range list {
		if kind != Auto && kind != a.kind {
			continue
		}
		err := p.try(a)
		if err == nil {
			if why != nil {
				p.log.Warn("frames: better kinds cannot be had", "kind", a.kind.String(), "why", errors.Join(why...))
			}
			return nil
		}
		why = append(why, fmt.Errorf("%v: %w", a.kind, err))
	}
	if why == nil {
		return fmt.Errorf("%v: %w (no such kind)", kind, unix.EINVAL)
	}
	return errors.Join(why...)
}

// try makes the mount large enough for the probe, probes, and only then sets the size: a small budget must not decide what the kernel can do.
func (p *Pool) try(a attempt) error {
	p.kind = a.kind
	if a.mount == nil {
		return nil
	}
	size := p.budget.Load() * PageSize
	room := max(size, probeSize)
	m, err := a.mount(room, true)
	if err != nil {
		return err
	}
	p.mount = m
	for try := 1; ; try++ { // large folios can be out for a moment
		if err = p.probe(); err == nil || try == 3 || !m.huge {
			break
		}
	}
	p.extents = err == nil
	if err != nil {
		p.log.Warn("frames: no large folios, whole extents will cost as much as single pages", "why", err)
		if m.huge { // folios that eat the budget would be worse than none
			m.close()
			if m, err = a.mount(room, false); err != nil {
				p.mount = nil
				return err
			}
			p.mount = m
		}
	}
	p.noswap = m.noswap
	if size < room {
		if err := m.setSize(size); err != nil {
			m.close()
			p.mount, p.extents, p.noswap = nil, false, false
			return err
		}
	}
	return nil
}

// Kind is what the frames are made of, never Auto.
func (p *Pool) Kind() Kind { return p.kind }

// Extents says whether WriteAt of a whole, empty, aligned extent makes one large folio here, UFFDIO_COPY takes single frames all the same, and
// punches of parts take effect. The start-up probe found out.
func (p *Pool) Extents() bool { return p.extents }

// NoSwap says whether the kernel promised not to page the frames out.
func (p *Pool) NoSwap() bool { return p.noswap }

// Usage is how many bytes of frames are in use as the kernel counts, reserved by somebody or not.
func (p *Pool) Usage() (int64, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.usage()
}

// usage needs mu.
func (p *Pool) usage() (int64, error) {
	if p.closed {
		return 0, fmt.Errorf("read usage of frame pool: %w", os.ErrClosed)
	}
	if p.mount != nil {
		return p.mount.usage()
	}
	var sum int64
	for _, b := range p.left {
		sum += blocks(b.fd)
	}
	for f := range p.files {
		n, err := f.Blocks()
		if errors.Is(err, os.ErrClosed) {
			continue // Close is under way and will forget it
		}
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// Close gives the mount up. Files that are open stay usable, and the memory goes with the last of them. Idempotent.
func (p *Pool) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil
	}
	p.closed = true
	for _, b := range p.left {
		unix.Close(b.fd)
	}
	p.left = nil
	if p.mount == nil {
		return nil
	}
	return p.mount.close()
}
