package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() {
	tasks["full"] = told(fullTask)
	tasks["nothing stored"] = nothingStored
}

const (
	fullBudget = 1 << 20
	fullSpace  = 2 << 20
	fullSize   = 8 << 20 // of the region: more than fits into both
)

// What makes room.
const (
	healDiscard = "discard"
	healClose   = "close an object"
	healSetSize = "set size"
	healAddFile = "add a paging file"
)

type fullArg struct {
	Store    string
	Disk     bool // no capacity, but a file system of that size
	Capacity int64
	Heal     []string // what makes room, in turn
}

// fullTask fills memory and paging space, and frees some in every way there is.
func fullTask(c *conn, arg fullArg) error {
	ctx := context.Background()
	o := spawn.Options{Resident: fullBudget, Store: arg.Store, Compressed: arg.Capacity}
	if arg.Disk {
		dir, err := smallDisk(fullSpace)
		if err != nil {
			return err
		}
		defer dir.Close()
		o.Dir = dir.Name()
	} else {
		o.Capacity = fullSpace
	}
	p, err := startPager(ctx, o)
	if err != nil {
		return err
	}
	defer p.Close()
	f := &filling{ctx: ctx, p: p}
	if f.object, err = p.ObjectCreate(ctx, fullSize, nil); err != nil {
		return err
	}
	r, err := f.object.Map(ctx, nil)
	if err != nil {
		return err
	}
	f.book = newBook(r)
	// What makes room, and the pages that are gone or may be gone afterwards.
	free := map[string]func() error{
		healDiscard: func() error { return f.discard(len(f.versions) / 16) },
		healClose:   f.closeOther,
		healSetSize: f.setSize,
		healAddFile: f.addFile,
	}
	for _, heal := range arg.Heal {
		if err := f.fill(); err != nil {
			return fmt.Errorf("before %s: %w", heal, err)
		}
		begin := time.Now()
		if err := firstOf(free[heal](), f.checkAll(), f.otherRight()); err != nil {
			info, _ := p.Info(ctx)
			return fmt.Errorf("after %s (%+v): %w", heal, info, err)
		}
		fmt.Fprintf(os.Stderr, "%s: all is well after %v\n", heal, time.Since(begin))
	}
	return firstOf(c.send(true), p.Close())
}

// smallDisk is a file system of so many bytes, at no path but that of its descriptor.
func smallDisk(size int64) (dir *os.File, err error) {
	fs, err := unix.Fsopen("tmpfs", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a tmpfs (this test needs root): %w", err)
	}
	defer unix.Close(fs)
	err = firstOf(unix.FsconfigSetString(fs, "size", strconv.FormatInt(size, 10)), unix.FsconfigCreate(fs))
	if err != nil {
		return nil, err
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), fd)), nil
}

// filling is a region that is written until nothing more fits.
type filling struct {
	*book
	ctx    context.Context
	p      *region.Pager
	object *region.Object
	other  *region.Region // contents that can be given up
	turn   uint64
}

// fill writes pages until there is no room. What was written is still there, and so it says.
func (f *filling) fill() error {
	if f.other == nil {
		var err error
		if f.other, err = f.p.Allocate(f.ctx, 1<<20, nil); err != nil {
			return err
		}
		fill(f.other.Bytes(), 0, 99)
	}
	f.turn++
	for i := range f.versions {
		begin := time.Now()
		err := f.put(i, f.turn)
		if err == nil {
			continue
		}
		var fe *region.FaultError
		if !errors.As(err, &fe) || !errors.Is(err, emm.ResourceShortage) || fe.Region != f.r || fe.Offset&^4095 != int64(i)*4096 {
			return fmt.Errorf("page %d of %d: %w, want a *FaultError there with %w", i, len(f.versions), err, emm.ResourceShortage)
		}
		info, err := f.p.Info(f.ctx)
		if err != nil {
			return err
		}
		fmt.Fprintf(os.Stderr, "page %d fails after %v: resident %d, paging space %d free of %d\n", i, time.Since(begin), info.Resident, info.PagingFree, info.PagingTotal)
		if info.PagingFree != 0 || info.Resident > fullBudget || info.KernelResident > fullBudget {
			return fmt.Errorf("full, but Info says: resident %d (%d) of %d, paging space %d free of %d", info.Resident, info.KernelResident, info.Budget, info.PagingFree,
				info.PagingTotal)
		}
		return f.residentRight()
	}
	return errors.New("more fits than there is")
}

// residentRight looks at the pages that need no frame.
func (f *filling) residentRight() error {
	pages, err := f.object.Pages(f.ctx)
	if err != nil {
		return err
	}
	for i, p := range pages {
		if p.State() == region.PageDirty || p.State() == region.PageClean {
			if err := f.check(i); err != nil {
				return err
			}
		}
	}
	return nil
}

// otherRight looks at the contents that are there to be given up.
func (f *filling) otherRight() error {
	if f.other == nil {
		return nil
	}
	want := make([]byte, len(f.other.Bytes()))
	fill(want, 0, 99)
	return region.Guard(func() error {
		if i := firstDiff(f.other.Bytes(), want); i >= 0 {
			return fmt.Errorf("the other region is wrong at byte %d", i)
		}
		return nil
	})
}

// discard throws n pages away, half of them from each end.
func (f *filling) discard(n int) error {
	size := int64(n) * 4096 / 2
	if err := firstOf(f.r.Discard(f.ctx, 0, size), f.r.Discard(f.ctx, fullSize-size, size)); err != nil {
		return err
	}
	clear(f.versions[:n/2])
	clear(f.versions[len(f.versions)-n/2:])
	return nil
}

func (f *filling) closeOther() error {
	r := f.other
	f.other = nil
	return r.Close()
}

func (f *filling) setSize() error {
	const kept = 64
	clear(f.versions[kept:])
	return firstOf(f.object.SetSize(f.ctx, kept*4096), f.object.SetSize(f.ctx, fullSize))
}

func (f *filling) addFile() error {
	_, err := f.p.BackingStoreCreate(f.ctx, os.TempDir(), &region.BackingStoreOptions{Capacity: 4 * fullSize})
	return err
}

// TestPagingSpaceFull: a page that finds no room stays; who needs a frame then gets KERN_RESOURCE_SHORTAGE; and room, however it comes, heals everything.
func TestPagingSpaceFull(t *testing.T) {
	// Each time it becomes full takes 5 s, for that is how long the pager tries. So each store is healed in some ways, and all of them in all by make soak.
	for _, c := range []struct {
		name string
		arg  fullArg
	}{
		{"file", fullArg{Store: daemon.StoreFile, Heal: []string{healDiscard, healAddFile}}},
		{"memory", fullArg{Store: daemon.StoreMemory, Heal: []string{healDiscard, healClose}}},
		{"compressed", fullArg{Store: daemon.StoreCompressed, Heal: []string{healClose, healSetSize}}},
		{"tiered", fullArg{Store: daemon.StoreTiered, Capacity: 1 << 20, Heal: []string{healSetSize, healDiscard}}},
		{"disk", fullArg{Store: daemon.StoreFile, Disk: true, Heal: []string{healSetSize, healAddFile}}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			if soak(0) > 0 {
				c.arg.Heal = []string{healDiscard, healClose, healSetSize}
				if c.arg.Store == daemon.StoreFile {
					c.arg.Heal = append(c.arg.Heal, healAddFile)
				}
			}
			k := start(t, "full", nil)
			k.send(c.arg)
			k.ready()
			k.wait()
			said := k.output()
			t.Log(said)
			// Once each time that it has become full.
			if n := strings.Count(said, "paging space is full"); n < 1 || n > 4 {
				t.Errorf("%d warnings that paging space is full, want one each time", n)
			}
			if n := strings.Count(said, "pages cannot be stored"); n > 4 {
				t.Errorf("%d warnings that pages cannot be stored, want one each time", n)
			}
		})
	}
}

// nothingStored is memory over a store that takes nothing any more.
func nothingStored(c *conn) error {
	var arg [2]string // directory and mode
	if err := c.recv(&arg); err != nil {
		return err
	}
	ctx := context.Background()
	p, err := startPager(ctx, spawn.Options{Resident: fullBudget, Confine: daemon.ConfineNever}) // a badStore reads a file by name
	if err != nil {
		return err
	}
	defer p.Close()
	control := &badObject{file: filepath.Join(arg[0], "mode")}
	if err := control.set("ok"); err != nil {
		return err
	}
	o, r, err := create(ctx, p, fullSize, &region.ObjectOptions{Manager: "badstore", Arg: fmt.Sprintf("%s:%d", control.file, fullSize)}, nil)
	if err != nil {
		return err
	}
	f := &filling{book: newBook(r), ctx: ctx, p: p, object: o}
	for i := range f.versions {
		if err := f.put(i, 1); err != nil {
			return err
		}
	}
	if err := control.set(arg[1]); err != nil {
		return err
	}
	failed := -1
	for i := range f.versions {
		if err := f.put(i, 2); err != nil {
			if !errors.Is(err, emm.ResourceShortage) {
				return err
			}
			failed = i
			break
		}
	}
	if failed < 0 {
		return errors.New("all pages can be written, though none can be stored")
	}
	if err := firstOf(f.residentRight(), control.set("ok"), f.checkAll(), f.put(failed, 3), r.PageOut(ctx, 0, fullSize), f.checkAll()); err != nil {
		return err
	}
	return p.Close()
}

// TestNothingStored: a store that fails to write is as good as a full one.
func TestNothingStored(t *testing.T) {
	for _, mode := range []string{"write fails", "write short", "full"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			k := start(t, "nothing stored", nil)
			k.send([2]string{t.TempDir(), mode})
			k.wait()
			t.Log(k.output())
		})
	}
}
