package vm

import (
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"machpager/pager/emm"
	"machpager/uffd"
)

// Task is a process whose memory we serve, by the userfaultfd it gave us.
type Task struct {
	vm      *VM
	id      uint64
	pid     int      // immutable; as the socket told, for people
	fd      *uffd.FD // immutable
	stop    int      // immutable; an eventfd that ends the reader's poll, or makes it look at pending
	gate    *gate
	begun   atomic.Bool // the reader was started, or never will be
	ended   atomic.Bool
	slice   slice                      // the reader's own
	serving atomic.Bool                // the reader is in a batch: what it has answered may not be counted yet
	done    chan struct{}              // closed when the reader has ended
	spans   atomic.Pointer[[]taskSpan] // by address; copied on write

	mu   sync.Mutex
	maps []*Mapping // guarded by mu

	drainMu sync.Mutex
	gone    bool       // guarded by drainMu: the descriptors are closed
	pending []uffd.Msg // guarded by drainMu: read, not yet served
	msgs    []uffd.Msg // guarded by drainMu: what read(2) writes to

	wired    atomic.Int64 // frames that its mappings have wired, each mapping's for itself
	requests atomic.Int64 // data requests that are out for its mappings

	stats taskCounters
}

// NewTask starts to serve the faults that come in by fd, which it takes over; in a vm that adopts, with Resume. pid is for people only.
func (v *VM) NewTask(fd *uffd.FD, pid int) (*Task, error) {
	stop, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("new task: eventfd: %w", err)
	}
	if err := unix.SetNonblock(fd.Fd(), true); err != nil {
		unix.Close(stop)
		return nil, fmt.Errorf("new task: make its userfaultfd non-blocking: %w", err)
	}
	t := &Task{vm: v, id: v.nextID.Add(1), pid: pid, fd: fd, stop: stop, gate: newGate(), done: make(chan struct{}), msgs: make([]uffd.Msg, 64)}
	t.spans.Store(&[]taskSpan{})
	v.mu.Lock()
	v.tasks[t.id] = t
	adopting := v.adopting.Load()
	v.mu.Unlock()
	if !adopting {
		t.begin()
	}
	return t, nil
}

// begin starts the reader, unless the task has been closed.
func (t *Task) begin() {
	if !t.begun.Swap(true) {
		go t.read()
	}
}

// ID names the task in this vm.
func (t *Task) ID() uint64 { return t.id }

// PID is what the task's socket said when it came.
func (t *Task) PID() int { return t.pid }

// Close ends the service: the process is gone, or has left. Its mappings are closed; what they made dirty stays in the objects. Idempotent.
func (t *Task) Close() {
	if !t.gate.close() {
		<-t.done
		return
	}
	t.mu.Lock()
	maps := slices.Clone(t.maps)
	t.mu.Unlock()
	for _, m := range maps {
		m.Close()
	}
	t.vm.token.drop(t, nil)
	t.ended.Store(true)
	t.poke()
	if !t.begun.Swap(true) {
		close(t.done)
	}
	<-t.done
	t.vm.mu.Lock()
	delete(t.vm.tasks, t.id)
	t.vm.mu.Unlock()
	t.drainMu.Lock() // a cleaner may still be about to drain
	defer t.drainMu.Unlock()
	t.gone = true
	t.fd.Close()
	unix.Close(t.stop)
}

// poke makes the reader look: for its end, or at messages that somebody else has read.
func (t *Task) poke() {
	one := [8]byte{1}
	unix.Write(t.stop, one[:]) // EAGAIN: it will look anyway
}

func (t *Task) addMapping(m *Mapping) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.maps = append(t.maps, m)
}

func (t *Task) removeMapping(m *Mapping) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.maps = slices.DeleteFunc(t.maps, func(x *Mapping) bool { return x == m })
	s := sortSpans(t.maps)
	t.spans.Store(&s)
}

// mapped makes m's place known to the reader.
func (t *Task) mapped(m *Mapping) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !slices.Contains(t.maps, m) {
		return fmt.Errorf("map object: the mapping is gone: %w", emm.InvalidArgument)
	}
	s := sortSpans(t.maps)
	for i := 1; i < len(s); i++ {
		if s[i-1].addr+uint64(s[i-1].n) > s[i].addr {
			m.spans.Store(&[]span{})
			return fmt.Errorf("map object: the range overlaps another mapping of this task: %w", emm.InvalidAddress)
		}
	}
	t.spans.Store(&s)
	return nil
}

// moved follows an mremap. What lay there before is unmapped. Threads that wait at the old addresses are woken: nobody will ever wake them there again.
func (t *Task) moved(from, to, n uint64) {
	t.mu.Lock()
	for _, m := range t.maps {
		gone := m.unmapped(to, n)
		if m.moved(from, to, n) || gone {
			if t.vm.told != nil {
				t.vm.told(t, m.id, exported(*m.spans.Load()))
			}
		}
	}
	s := sortSpans(t.maps)
	t.spans.Store(&s)
	t.mu.Unlock()
	t.fd.Wake(from, n)
}

// find looks an address up: the mapping, entered, and the offset in its object. nil if nothing is there.
func (t *Task) find(addr uint64) (*Mapping, int64) {
	s := *t.spans.Load()
	lo, hi := 0, len(s)
	for lo < hi {
		mid := (lo + hi) / 2
		if s[mid].addr <= addr {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	if lo == 0 {
		return nil, 0
	}
	p := &s[lo-1]
	if addr-p.addr >= uint64(p.n) || !p.m.gate.enter() {
		return nil, 0
	}
	return p.m, p.off + int64(addr-p.addr)
}
