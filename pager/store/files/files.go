// Package files is a store in several paging files, which are added and removed while it is in use: Mach's default_pager_backing_store calls.
//
// New contents go to the files of the highest priority in turn, and to others when those are full or fail. A file that is removed takes nothing more; its contents are moved to
// the others, while they are read and freed, and then it is closed. What it cannot give back because it is corrupt is corrupt from then on.
//
// # Restart
//
// Slots keep their numbers when contents move: see package indirect. A restarted pager gives New the same memory of words and the same files, each with its checksums, under their old
// numbers, and calls Rebuild. Whoever keeps the files hears of each before anything is written to it (File.Keep), and lets go of it when Delete has returned. So it may have one that has nothing: a file
// that was just made, or was just emptied. It is in use then; and so is one whose removal was cut short, until it is deleted again.
package files

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/internal/indirect"
)

// ID is the number of a paging file, 1 to MaxID. It is reused after its removal.
type ID uint8

// MaxID is how many paging files there can be.
const MaxID = 254

// File describes a paging file.
type File struct {
	// ID is the number that the file has; 0: any that is free.
	ID ID
	// Priority says which files are used first: those of the highest.
	Priority int
	// Options says where it is, and how large it may be.
	Options file.Options
	// Sums finds or makes the memory of checksums, for a file of this number, in place of Options.Sums. It becomes the store's. nil: Options.Sums.
	Sums func(id ID) (store.Memory, error)
	// Keep is called before anything is written to the file: who is to hand it to a later New, should this process be killed, has it by number when Keep returns. With an
	// error the file is not added. The file stays the store's. nil: nobody keeps it.
	Keep func(id ID, f *os.File) error
}

// Options of a Store. nil or zero values are the defaults.
type Options struct {
	// Words is the memory of the words that say where each slot's contents are. It becomes the store's. nil: anonymous memory, which ends with the process.
	Words store.Memory
	// Capacity is how many bytes of contents may be stored, rounded down to slots. 0: what the files have.
	Capacity int64
	// Files are there from the beginning. Those of a store that is taken over need their IDs.
	Files []File
}

// Store is a store in several files.
type Store struct {
	*indirect.Store
	mu     sync.Mutex      // not held for I/O
	files  map[ID]*backing // guarded by mu
	making map[ID]bool     // guarded by mu; numbers of files that are being made
}

// backing is a paging file.
type backing struct {
	id       ID
	priority int
	part     *indirect.Part
	file     *file.Store
	leaving  bool // guarded by Store.mu
}

var _ store.Store = (*Store)(nil)

// New makes a store, or takes one over.
func New(o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	in, err := indirect.New(indirect.Options{Words: o.Words, Capacity: o.Capacity})
	if err != nil {
		return nil, fmt.Errorf("make store of paging files: %w", err)
	}
	s := &Store{Store: in, files: make(map[ID]*backing), making: make(map[ID]bool)}
	for _, f := range o.Files {
		if _, err := s.Create(f); err != nil {
			s.Close()
			return nil, fmt.Errorf("make store of paging files: %w", err)
		}
	}
	return s, nil
}

// Create adds a paging file (default_pager_backing_store_create, _add_segment). It may be used when Create returns.
func (s *Store) Create(f File) (ID, error) {
	id, err := s.number(f.ID)
	if err != nil {
		return 0, fmt.Errorf("create paging file: %w", err)
	}
	b, err := s.make(id, f)
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.making, id)
	if err != nil {
		return 0, fmt.Errorf("create paging file %d: %w", id, err)
	}
	s.files[id] = b
	s.reorder()
	return id, nil
}

// number takes a number for a file that is to be made: id, or, if that is 0, any that is free.
func (s *Store) number(id ID) (ID, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	taken := func(id ID) bool { return s.files[id] != nil || s.making[id] }
	if id == 0 {
		for id = 1; taken(id); id++ {
		}
		if id > MaxID {
			return 0, fmt.Errorf("there are %d: %w", len(s.files), unix.EMFILE)
		}
	} else if id > MaxID || taken(id) {
		return 0, fmt.Errorf("the number %d is taken, or not 1 to %d: %w", id, MaxID, unix.EEXIST)
	}
	s.making[id] = true
	return id, nil
}

// make makes the file, of a number that nobody else has. It may take its time, so it is without the lock.
func (s *Store) make(id ID, f File) (b *backing, err error) {
	if f.Sums != nil {
		if f.Options.Sums, err = f.Sums(id); err != nil {
			return nil, fmt.Errorf("memory of checksums: %w", err)
		}
	}
	st, err := file.New(&f.Options)
	if err != nil {
		if f.Sums != nil {
			f.Options.Sums.Close()
		}
		return nil, err
	}
	defer func() {
		if err != nil {
			st.Close()
		}
	}()
	if f.Keep != nil {
		failpoint.Here("files.keep")
		if err := f.Keep(id, st.File()); err != nil {
			return nil, fmt.Errorf("keep it: %w", err)
		}
		failpoint.Here("files.kept")
	}
	p, err := s.Add(uint8(id), st, nil)
	if err != nil {
		return nil, err
	}
	select {
	case <-s.Closed(): // perhaps too late for it to be closed with the others
		return nil, store.ErrClosed
	default:
	}
	return &backing{id: id, priority: f.Priority, part: p, file: st}, nil
}

// reorder tells where to write from now on. Called with mu.
func (s *Store) reorder() {
	var all []*backing
	for _, b := range s.files {
		if !b.leaving {
			all = append(all, b)
		}
	}
	slices.SortFunc(all, func(a, b *backing) int {
		return cmp.Or(cmp.Compare(b.priority, a.priority), cmp.Compare(a.id, b.id))
	})
	var order [][]*indirect.Part
	for i, b := range all {
		if i == 0 || all[i-1].priority != b.priority {
			order = append(order, nil)
		}
		order[len(order)-1] = append(order[len(order)-1], b.part)
	}
	s.SetOrder(order)
}

// Delete removes a paging file: moves its contents to the others, and closes it (default_pager_backing_store_delete). If that cannot be finished, because the others are full, fail, or ctx ends, the
// file stays in use and there is an error. Nothing is lost either way. When the others clearly have no room, nothing is moved.
func (s *Store) Delete(ctx context.Context, id ID) error {
	s.mu.Lock()
	b := s.files[id]
	if b == nil || b.leaving {
		s.mu.Unlock()
		return fmt.Errorf("delete paging file %d: there is none, or it is being deleted: %w", id, unix.ENOENT)
	}
	b.leaving = true
	s.reorder()
	s.mu.Unlock()

	var err error
	if need, free := b.part.Used()*store.SlotSize, s.roomWithout(b); need > free {
		err = fmt.Errorf("it has %d bytes, and the others have room for %d: %w", need, free, store.ErrNoSpace)
	} else {
		err = s.Remove(ctx, b.part)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		b.leaving = false
		s.reorder()
		return fmt.Errorf("delete paging file %d: %w", id, err)
	}
	delete(s.files, id)
	failpoint.Here("files.removed")
	if err := b.file.Close(); err != nil {
		return fmt.Errorf("delete paging file %d: %w", id, err)
	}
	return nil
}

// roomWithout is what all files but one have room for, and those on their way out; what files on one file system share counts once. What the one gives up where it is, others there can take.
func (s *Store) roomWithout(one *backing) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.room(one)
}

// room is roomWithout. Called with mu.
func (s *Store) room(one *backing) (free int64) {
	type system struct{ avail, more int64 } // free, and how much of it the files there may take
	systems := map[uint64]*system{}
	for _, b := range s.files {
		r := b.file.Room()
		fs := systems[r.Device]
		if fs == nil {
			fs = &system{avail: r.Avail}
			systems[r.Device] = fs
		}
		switch {
		case b == one:
			fs.avail += r.Held + b.part.Used()*store.SlotSize
		case !b.leaving:
			free += min(r.Bound, r.Held)
			fs.more += max(0, r.Bound-r.Held)
		}
	}
	for _, fs := range systems {
		free += min(fs.avail, fs.more)
	}
	return free
}

// Info adds the files up.
func (s *Store) Info() store.Info {
	i := s.Store.Info()
	s.mu.Lock()
	defer s.mu.Unlock()
	i.Free = min(i.Free, s.room(nil)) &^ (store.SlotSize - 1)
	i.Total = i.Used + i.Free
	return i
}

// Info describes a paging file (default_pager_backing_store_info): sizes in bytes, counters in slots since it was added.
type Info struct {
	ID                ID
	Dir               string
	Priority          int
	Leaving           bool // it is being deleted
	Total, Used, Free int64
	indirect.Counters
}

// Files lists the paging files, by number (default_pager_backing_store_info).
func (s *Store) Files() []Info {
	s.mu.Lock()
	defer s.mu.Unlock()
	var infos []Info
	for _, b := range s.files {
		i := b.file.Info()
		infos = append(infos, Info{ID: b.id, Dir: filepath.Dir(b.file.File().Name()), Priority: b.priority, Leaving: b.leaving, Total: i.Total, Used: i.Used, Free: i.Free, Counters: b.part.Counters()})
	}
	slices.SortFunc(infos, func(a, b Info) int { return cmp.Compare(a.ID, b.ID) })
	return infos
}

// File is the file of a number, for who keeps it for a restarted pager, or nil. It stays the store's.
func (s *Store) File(id ID) *os.File {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.files[id]; b != nil {
		return b.file.File()
	}
	return nil
}

// Close serves what is under way, and closes the files. A Delete under way fails.
func (s *Store) Close() error {
	if err := s.Store.Close(); err != nil {
		return fmt.Errorf("close store of paging files: %w", err)
	}
	return nil
}
