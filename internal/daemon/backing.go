package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"machpager/internal/failpoint"
	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/files"
)

// Paging files are added, removed and listed while the pager serves (default_pager_backing_store_create, _delete, _info).

// errNoFiles says that paging space is no files.
func (d *Daemon) errNoFiles() error {
	return fmt.Errorf("paging space is %s, not files: start the pager with paging space of the kind %s or %s: %w", d.config.Store, StoreFile, StoreTiered, unix.EOPNOTSUPP)
}

func (s *session) createBacking(m *ipc.Message) (ipc.Reply, error) {
	q, tail, err := ipc.Decode[ipc.BackingStoreCreate](m.Body)
	if err != nil {
		return ipc.Reply{}, err
	}
	dir, raw := string(tail), m.TakeFD(0)
	f := os.NewFile(uintptr(raw), filepath.Join(dir, "(paging file)"))
	keep := false
	defer func() {
		if !keep {
			f.Close()
		}
	}()
	if m.Resent() {
		if id, ok := s.d.madeFiles[request{s.id, m.Seq}]; ok {
			return ipc.Reply{Body: ipc.BackingStore{ID: uint32(id)}}, nil
		}
	}
	switch err := s.operator(); {
	case err != nil:
		return ipc.Reply{}, fmt.Errorf("create paging file: %w", err)
	case s.d.backing == nil:
		return ipc.Reply{}, fmt.Errorf("create paging file: %w", s.d.errNoFiles())
	case !filepath.IsAbs(dir):
		return ipc.Reply{}, fmt.Errorf("create paging file: directory %q: want an absolute path: %w", dir, emm.InvalidArgument)
	case q.Capacity < 0 || q.Flags&^ipc.BackingStorePreallocate != 0:
		return ipc.Reply{}, fmt.Errorf("create paging file: %d bytes, flags %#x: %w", q.Capacity, q.Flags, emm.InvalidArgument)
	}
	if err := checkPagingFile(raw); err != nil {
		return ipc.Reply{}, fmt.Errorf("create paging file: %w: %w", err, emm.InvalidArgument)
	}
	o := file.Options{Dir: dir, File: f, Capacity: q.Capacity, Preallocate: q.Flags&ipc.BackingStorePreallocate != 0}
	id, err := s.d.backing.Create(s.d.pagingFile(o, int(q.Priority), request{s.id, m.Seq}))
	if err != nil {
		return ipc.Reply{}, err
	}
	keep = true
	s.log.Info("paging file added", "file", id, "dir", dir, "capacity", q.Capacity, "priority", q.Priority)
	return ipc.Reply{Body: ipc.BackingStore{ID: uint32(id)}}, nil
}

// checkPagingFile looks whether a file that came in is one that nobody else will find, with nothing in it, where pread and pwrite do what they say.
func checkPagingFile(fd int) error {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat the file: %w", err)
	}
	flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	switch {
	case err != nil:
		return fmt.Errorf("read the flags of the file: %w", err)
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 0 || st.Size != 0:
		return fmt.Errorf("the file has mode %#o, %d names and %d bytes: want a regular file without names and contents", st.Mode, st.Nlink, st.Size)
	case flags&unix.O_ACCMODE != unix.O_RDWR || flags&(unix.O_APPEND|unix.O_DIRECT|unix.O_PATH) != 0:
		return fmt.Errorf("the file is open with flags %#x: want O_RDWR, without O_APPEND, O_DIRECT and O_PATH", flags)
	}
	return nil
}

func (s *session) deleteBacking(ctx context.Context, q ipc.BackingStore, resent bool) error {
	if err := s.operator(); err != nil {
		return fmt.Errorf("delete paging file: %w", err)
	}
	if s.d.backing == nil {
		return fmt.Errorf("delete paging file: %w", s.d.errNoFiles())
	}
	if q.ID == 0 || q.ID > files.MaxID {
		return fmt.Errorf("delete paging file %d: want a number from 1 to %d: %w", q.ID, files.MaxID, emm.InvalidArgument)
	}
	if err := s.d.backing.Delete(ctx, files.ID(q.ID)); err != nil {
		if resent && errors.Is(err, unix.ENOENT) {
			return nil // it has gone, but the answer went with the pager before this one
		}
		if errors.Is(err, store.ErrNoSpace) {
			return fmt.Errorf("%w (add another one first, or end objects): %w", err, emm.NoSpace)
		}
		return err
	}
	failpoint.Here("daemon.backing.deleted")
	s.d.letGo(ipc.ItemPagingFile, uint64(q.ID))
	s.log.Info("paging file removed", "file", q.ID)
	return nil
}

// nextBacking describes the paging file after the one named.
func (s *session) nextBacking(q ipc.BackingStore) (ipc.Reply, error) {
	if s.d.backing == nil {
		return ipc.Reply{Body: ipc.BackingStoreInfoReply{}}, nil
	}
	for _, f := range s.d.backing.Files() {
		if uint32(f.ID) <= q.ID {
			continue
		}
		r := ipc.BackingStoreInfoReply{ID: uint32(f.ID), Priority: int32(f.Priority), Total: f.Total, Used: f.Used, Free: f.Free,
			Read: f.In * store.SlotSize, Written: f.Out * store.SlotSize, ReadErrors: f.InFailed, WriteErrors: f.OutFailed}
		if f.Leaving {
			r.Leaving = 1
		}
		return ipc.Reply{Body: r, Tail: []byte(f.Dir)}, nil
	}
	return ipc.Reply{Body: ipc.BackingStoreInfoReply{}}, nil
}
