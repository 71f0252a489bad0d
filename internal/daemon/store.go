package daemon

import (
	"errors"
	"fmt"
	"os"

	"machpager/internal/guardian"
	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/pager/store"
	"machpager/pager/store/compressed"
	"machpager/pager/store/file"
	"machpager/pager/store/files"
	"machpager/pager/store/memory"
	"machpager/pager/store/tiered"
)

// Kinds of paging space.
const (
	StoreFile       = "file"       // an unlinked file in Config.Dir, and those that are added
	StoreMemory     = "memory"     // as it is
	StoreCompressed = "compressed" // in memory, compressed
	StoreTiered     = "tiered"     // compressed in memory up to Config.Compressed, the rest in files
)

// Stores are all kinds of paging space.
var Stores = []string{StoreFile, StoreMemory, StoreCompressed, StoreTiered}

// openStore opens the kind of paging space that c names, or takes over what an earlier pager left of it; c.Resident is the budget, not 0. backing is the part of it
// that is files, nil: none is.
func (d *Daemon) openStore(c Config, left []files.File) (s store.Store, backing *files.Store, err error) {
	switch c.Store {
	case StoreFile:
		backing, err = d.openFiles(c, c.Capacity, left)
		if err != nil {
			return nil, nil, err
		}
		return backing, backing, nil
	case StoreMemory:
		mem, err := d.newMemory("contents", maxContents)
		if err != nil {
			return nil, nil, err
		}
		s, err := memory.New(mem, &memory.Options{Capacity: c.Capacity})
		if err != nil {
			return nil, nil, errors.Join(err, mem.Close())
		}
		return s, nil, nil
	case StoreCompressed:
		s, err = d.openCompressed(c.Capacity, c.Compressed)
		return s, nil, err
	case "", StoreTiered:
		return d.openTiered(c, left)
	}
	return nil, nil, fmt.Errorf("open paging space: kind %q: want one of %q: %w", c.Store, Stores, emm.InvalidArgument)
}

// openFiles opens a paging file, to which others can be added, or those that are left. That costs a read nothing that could be measured against store/file alone.
func (d *Daemon) openFiles(c Config, capacity int64, left []files.File) (*files.Store, error) {
	words, err := d.newMemory("places", maxMap)
	if err != nil {
		return nil, err
	}
	s, err := files.New(&files.Options{Words: words, Files: left})
	if err != nil {
		return nil, errors.Join(err, words.Close())
	}
	if len(left) > 0 {
		return s, nil
	}
	if _, err := s.Create(d.pagingFile(file.Options{Dir: c.Dir, Capacity: capacity}, 0, request{})); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// request names a request over the lives of several pagers.
type request struct {
	session uint64
	seq     uint32
}

// pagingFile is a paging file to be made, which the guardian holds with its checksums.
func (d *Daemon) pagingFile(o file.Options, priority int, by request) files.File {
	return files.File{Priority: priority, Options: o, Sums: d.newSums, Keep: func(id files.ID, f *os.File) error {
		tail, err := encode(pagingRecord{Dir: o.Dir, Capacity: o.Capacity, Priority: priority, Preallocate: o.Preallocate})
		if err != nil {
			return err
		}
		return withFD(f, func(fd int) error {
			return d.hold(guardian.Item{Kind: ipc.ItemPagingFile, ID: uint64(id), Parent: by.session, B: uint64(by.seq), Tail: tail, FD: fd})
		})
	}}
}

// newSums makes the memory of a paging file's checksums, or finds it.
func (d *Daemon) newSums(id files.ID) (store.Memory, error) {
	return d.newMemory(fmt.Sprintf("sums.%d", id), maxMap)
}

// openCompressed opens compressed memory for capacity bytes of contents in limit bytes of memory; 0: no bound of its own.
func (d *Daemon) openCompressed(capacity, limit int64) (store.Store, error) {
	index, err := d.newMemory("index", maxMap)
	if err != nil {
		return nil, err
	}
	data, err := d.newMemory("compressed", maxContents)
	if err != nil {
		return nil, errors.Join(err, index.Close())
	}
	s, err := compressed.New(&compressed.Options{Index: index, Data: data, Capacity: capacity, Limit: limit})
	if err != nil {
		return nil, errors.Join(err, index.Close(), data.Close())
	}
	return s, nil
}

// openTiered opens compressed memory in front of files.
func (d *Daemon) openTiered(c Config, left []files.File) (store.Store, *files.Store, error) {
	limit := c.Compressed
	if limit == 0 {
		limit = max(c.Resident/2, minCompressed)
	}
	fast, err := d.openCompressed(0, limit)
	if err != nil {
		return nil, nil, err
	}
	slow, err := d.openFiles(c, 0, left)
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close())
	}
	words, err := d.newMemory("tiers", maxMap)
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close(), slow.Close())
	}
	s, err := tiered.New(tiered.Options{Fast: fast, Slow: slow, Words: words, Capacity: c.Capacity, Log: d.log})
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close(), slow.Close(), words.Close())
	}
	return s, slow, nil
}
