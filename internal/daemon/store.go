package daemon

import (
	"errors"
	"fmt"
	"log/slog"

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

// openStore opens the kind of paging space that c names; c.Resident is the budget, not 0. backing is the part of it that is files, nil: none is.
func openStore(c Config, log *slog.Logger) (s store.Store, backing *files.Store, err error) {
	switch c.Store {
	case StoreFile:
		backing, err = openFiles(c, c.Capacity)
		if err != nil {
			return nil, nil, err
		}
		return backing, backing, nil
	case StoreMemory:
		mem, err := newMemory("contents", maxContents)
		if err != nil {
			return nil, nil, err
		}
		s, err := memory.New(mem, &memory.Options{Capacity: c.Capacity})
		if err != nil {
			return nil, nil, errors.Join(err, mem.Close())
		}
		return s, nil, nil
	case StoreCompressed:
		s, err = openCompressed(c.Capacity, c.Compressed)
		return s, nil, err
	case "", StoreTiered:
		return openTiered(c, log)
	}
	return nil, nil, fmt.Errorf("open paging space: kind %q: want one of %q: %w", c.Store, Stores, emm.InvalidArgument)
}

// openFiles opens a paging file, to which others can be added. That costs a read nothing that could be measured against store/file alone.
func openFiles(c Config, capacity int64) (*files.Store, error) {
	words, err := newMemory("places", maxMap)
	if err != nil {
		return nil, err
	}
	s, err := files.New(&files.Options{Words: words})
	if err != nil {
		return nil, errors.Join(err, words.Close())
	}
	if _, err := addFile(s, file.Options{Dir: c.Dir, Capacity: capacity}, 0); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// addFile adds a paging file, with memory for its checksums.
func addFile(s *files.Store, o file.Options, priority int) (files.ID, error) {
	sums, err := newMemory("sums", maxMap)
	if err != nil {
		return 0, err
	}
	o.Sums = sums
	id, err := s.Create(files.File{Priority: priority, Options: o})
	if err != nil {
		return 0, errors.Join(err, sums.Close())
	}
	return id, nil
}

// openCompressed opens compressed memory for capacity bytes of contents in limit bytes of memory; 0: no bound of its own.
func openCompressed(capacity, limit int64) (store.Store, error) {
	index, err := newMemory("index", maxMap)
	if err != nil {
		return nil, err
	}
	data, err := newMemory("compressed", maxContents)
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
func openTiered(c Config, log *slog.Logger) (store.Store, *files.Store, error) {
	limit := c.Compressed
	if limit == 0 {
		limit = max(c.Resident/2, minCompressed)
	}
	fast, err := openCompressed(0, limit)
	if err != nil {
		return nil, nil, err
	}
	slow, err := openFiles(c, 0)
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close())
	}
	words, err := newMemory("tiers", maxMap)
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close(), slow.Close())
	}
	s, err := tiered.New(tiered.Options{Fast: fast, Slow: slow, Words: words, Capacity: c.Capacity, Log: log})
	if err != nil {
		return nil, nil, errors.Join(err, fast.Close(), slow.Close(), words.Close())
	}
	return s, slow, nil
}
