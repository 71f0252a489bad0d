package files

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/pager/store"
	"machpager/pager/store/file"
	"machpager/pager/store/storetest"
)

var wordsOf = map[*Store]store.Memory{}

func anonymous(t testing.TB) store.Memory {
	t.Helper()
	m, err := store.NewAnonymous(1 << 30)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// open makes a store of files of these sizes in bytes; 0: growing.
func open(t testing.TB, capacity int64, sizes ...int64) *Store {
	t.Helper()
	o := &Options{Words: anonymous(t), Capacity: capacity}
	for _, size := range sizes {
		o.Files = append(o.Files, File{Options: file.Options{Dir: t.TempDir(), Capacity: size}})
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	wordsOf[s] = o.Words
	t.Cleanup(func() {
		s.Close()
		delete(wordsOf, s)
	})
	return s
}

func flip(t testing.TB, st store.Store, slot store.Slot) {
	s := st.(*Store)
	w := wordsOf[s].Words()[slot-1].Load()
	storetest.Flip(t, s.File(ID(w)), (int64(w>>8&(1<<41-1))-1)*store.SlotSize+7)
}

func TestConformance(t *testing.T) {
	for name, sizes := range map[string][]int64{"one": {0}, "three": {0, 0, 0}, "small first": {64 << 10, 0}} {
		t.Run(name, func(t *testing.T) {
			storetest.Run(t, storetest.Harness{
				New:     func(t testing.TB, capacity int64) store.Store { return open(t, capacity, sizes...) },
				Corrupt: flip,
			})
		})
	}
}

func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), storetest.Deadline)
	t.Cleanup(cancel)
	return ctx
}

func used(s *Store) map[ID]int64 {
	m := map[ID]int64{}
	for _, i := range s.Files() {
		m[i.ID] = i.Used / store.SlotSize
	}
	return m
}

func TestPriority(t *testing.T) {
	s := open(t, 0)
	dir := t.TempDir()
	for id, priority := range map[ID]int{1: 0, 2: 5, 3: 5, 4: 9} {
		if _, err := s.Create(File{ID: id, Priority: priority, Options: file.Options{Dir: dir, Capacity: 100 * store.SlotSize}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Create(File{ID: 3}); !errors.Is(err, unix.EEXIST) {
		t.Errorf("create a number that is taken: %v", err)
	}
	if i := s.Info(); i.Total != 400*store.SlotSize || i.Free != i.Total {
		t.Errorf("info: %+v", i)
	}
	b := make([]byte, 10*store.SlotSize)
	put := func() (store.Slot, error) {
		slot, _, err := s.Alloc(10, 10)
		if err != nil {
			t.Fatal(err)
		}
		_, err = storetest.Do(t, s.Write, slot, b)
		return slot, err
	}
	for i := range 40 {
		if _, err := put(); err != nil {
			t.Fatal(err)
		}
		u := used(s)
		switch {
		case i < 10 && u[4] != int64(i+1)*10:
			t.Fatalf("after %d writes: %v, want all in file 4", i+1, u)
		case i >= 10 && i < 30 && (u[2]+u[3] != int64(i-9)*10 || u[2]-u[3] > 10 || u[3]-u[2] > 10):
			t.Fatalf("after %d writes: %v, want files 2 and 3 in turn", i+1, u)
		case i >= 30 && u[1] != int64(i-29)*10:
			t.Fatalf("after %d writes: %v, want the rest in file 1", i+1, u)
		}
	}
	slot, err := put()
	if !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("write when all are full: %v", err)
	}
	if _, err := s.Create(File{Options: file.Options{Dir: dir}}); err != nil { // and there is room again
		t.Fatal(err)
	}
	if _, err := storetest.Do(t, s.Write, slot, b); err != nil {
		t.Errorf("write after a file was added: %v", err)
	}
	for _, i := range s.Files() {
		if i.ID <= 4 && (i.Out != 100 || i.OutFailed != 0) {
			t.Errorf("counters: %+v", i)
		}
	}
}

// Files come and go while everything is in use.
func TestDeleteUnderLoad(t *testing.T) {
	s := open(t, 0, 0, 0)
	var stop atomic.Bool
	var wg sync.WaitGroup
	errs := make(chan error, 8)
	for g := range 2 {
		wg.Go(func() {
			l := life{s: s, seed: uint64(g)}
			for !stop.Load() {
				if err := l.step(); err != nil {
					errs <- err
					return
				}
			}
			l.drop()
		})
	}
	ctx := deadline(t)
	deleted := 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		id := s.Files()[0].ID
		if _, err := s.Create(File{Options: file.Options{Dir: t.TempDir()}}); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, id); err != nil {
			t.Fatal(err)
		}
		deleted++
	}
	stop.Store(true)
	wg.Wait()
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	t.Logf("%d files deleted", deleted)
	if u := used(s); len(u) != 2 {
		t.Errorf("files: %v", u)
	}
	if i := s.Info(); i.Used != 0 {
		t.Errorf("%d bytes leaked", i.Used)
	}
	for id, n := range used(s) {
		if n != 0 {
			t.Errorf("file %d: %d slots leaked", id, n)
		}
	}
}

// life writes, checks and frees runs, from one goroutine.
type life struct {
	s    *Store
	seed uint64
	have []span
}

type span struct {
	slot store.Slot
	n    int
	seed uint64
}

func (l *life) do(call func(*store.Op), slot store.Slot, b []byte) error {
	done := make(chan error, 1)
	call(&store.Op{Slot: slot, Data: b, Done: func(op *store.Op) { done <- op.Err }})
	return <-done
}

func (l *life) step() error {
	l.seed += 1 << 32
	slot, n, err := l.s.Alloc(1+int(l.seed>>32*7%61), 1)
	if err != nil {
		return err
	}
	b := make([]byte, n*store.SlotSize)
	storetest.Fill(b, l.seed)
	if err := l.do(l.s.Write, slot, b); err != nil {
		return err
	}
	l.have = append(l.have, span{slot, n, l.seed})
	if len(l.have) < 40 {
		return nil
	}
	r := l.have[0]
	l.have = l.have[1:]
	got, want := make([]byte, r.n*store.SlotSize), make([]byte, r.n*store.SlotSize)
	if err := l.do(l.s.Read, r.slot, got); err != nil {
		return err
	}
	if storetest.Fill(want, r.seed); !bytes.Equal(got, want) {
		return fmt.Errorf("slot %d+%d: wrong contents", r.slot, r.n)
	}
	l.s.Free(r.slot, r.n)
	return nil
}

func (l *life) drop() {
	for _, r := range l.have {
		l.s.Free(r.slot, r.n)
	}
}

// A removal that cannot be finished leaves the file in use and everything in its place; what is corrupt goes with it, as corrupt.
func TestDeleteThatCannotBeFinished(t *testing.T) {
	s := open(t, 0, 100*store.SlotSize)
	first := s.Files()[0].ID
	slot, n, err := s.Alloc(60, 60)
	if err != nil || n != 60 {
		t.Fatal(n, err)
	}
	want, got := make([]byte, 60*store.SlotSize), make([]byte, 60*store.SlotSize)
	storetest.Fill(want, 1)
	if _, err := storetest.Do(t, s.Write, slot, want); err != nil {
		t.Fatal(err)
	}
	check := func() {
		t.Helper()
		if _, err := storetest.Do(t, s.Read, slot, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("contents: %v", err)
		}
	}
	if err := s.Delete(deadline(t), 77); !errors.Is(err, unix.ENOENT) {
		t.Errorf("delete a file that is not there: %v", err)
	}
	if err := s.Delete(deadline(t), first); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("delete the only file: %v", err)
	}
	check()
	small, err := s.Create(File{Options: file.Options{Dir: t.TempDir(), Capacity: 20 * store.SlotSize}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Delete(deadline(t), first); !errors.Is(err, store.ErrNoSpace) {
		t.Errorf("delete with too little room elsewhere: %v", err)
	}
	if u := used(s); u[small] != 0 {
		t.Errorf("delete with too little room elsewhere moved %d slots", u[small])
	}
	check()
	if _, err := s.Create(File{Options: file.Options{Dir: t.TempDir()}}); err != nil {
		t.Fatal(err)
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Delete(canceled, first); !errors.Is(err, context.Canceled) {
		t.Errorf("delete, cancelled: %v", err)
	}
	check()
	flip(t, s, slot+50)
	for _, id := range []ID{first, small} {
		if err := s.Delete(deadline(t), id); err != nil {
			t.Fatal(err)
		}
	}
	if good, err := storetest.Do(t, s.Read, slot, got); good != 50 || !errors.Is(err, store.ErrCorrupt) || !bytes.Equal(got[:50*store.SlotSize], want[:50*store.SlotSize]) {
		t.Errorf("read what was corrupt: good %d, %v", good, err)
	}
	if u := used(s); len(u) != 1 || u[3] != 59 {
		t.Errorf("files: %v", u)
	}
	s.Free(slot, 60)
	if i := s.Info(); i.Used != 0 || used(s)[3] != 0 {
		t.Errorf("leaked: %+v", i)
	}
}

func TestRestart(t *testing.T) {
	words, sums := anonymous(t), []store.Memory{anonymous(t), anonymous(t)}
	var kept []*os.File
	o := &Options{Words: words}
	for i := range 2 {
		o.Files = append(o.Files, File{ID: ID(i + 1), Options: file.Options{Dir: t.TempDir(), Sums: sums[i]}})
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	l := storetest.NewLife(s, 1)
	l.Step(200)
	o2 := &Options{Words: words}
	for i := range 2 {
		fd, err := unix.Dup(int(s.File(ID(i + 1)).Fd()))
		if err != nil {
			t.Fatal(err)
		}
		kept = append(kept, os.NewFile(uintptr(fd), "paging file"))
		o2.Files = append(o2.Files, File{ID: ID(i + 1), Options: file.Options{File: kept[i], Sums: sums[i]}})
	}
	if missing, err := New(&Options{Words: clone(t, words), Files: []File{{ID: 1, Options: file.Options{Dir: t.TempDir()}}}}); err != nil {
		t.Fatal(err)
	} else {
		if err := missing.Rebuild(l.Used); !errors.Is(err, unix.ENOENT) {
			t.Errorf("rebuild without file 2: %v", err)
		}
		missing.Close()
	}
	second, err := New(o2)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Rebuild(l.Used); err != nil {
		t.Fatal(err)
	}
	l.On(second)
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	l.Step(100)
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	second.Close()
}

func clone(t testing.TB, m store.Memory) store.Memory {
	c := anonymous(t)
	if err := c.Grow(int64(len(m.Bytes()))); err != nil {
		t.Fatal(err)
	}
	copy(c.Bytes(), m.Bytes())
	return c
}

// What files on one file system can all take counts once. /dev/shm is a file system by itself.
func TestSharedFileSystem(t *testing.T) {
	dir, other := t.TempDir(), "/dev/shm"
	one := func(s *Store, dir string, capacity int64) ID {
		t.Helper()
		id, err := s.Create(File{Options: file.Options{Dir: dir, Capacity: capacity}})
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	avail := func(dir string) int64 {
		t.Helper()
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			t.Fatal(err)
		}
		return int64(fs.Bavail) * fs.Bsize
	}
	near := func(what string, got, want int64) { // others use the file systems too
		t.Helper()
		if got < want*9/10 || got > want*11/10 {
			t.Errorf("%s: %d bytes free, want %d", what, got, want)
		}
	}
	s := open(t, 0)
	one(s, dir, 0)
	near("one file", s.Info().Free, avail(dir))
	last := one(s, dir, 0)
	near("two on one file system", s.Info().Free, avail(dir))
	one(s, dir, 1<<50)
	near("and one that is larger than that", s.Info().Free, avail(dir))
	shm := one(s, other, 0)
	near("and one elsewhere", s.Info().Free, avail(dir)+avail(other))
	if err := s.Delete(deadline(t), shm); err != nil {
		t.Fatal(err)
	}
	near("without it", s.Info().Free, avail(dir))
	if err := s.Delete(deadline(t), last); err != nil {
		t.Fatal(err)
	}
	small := open(t, 0)
	one(small, dir, 1<<20)
	one(small, dir, 2<<20)
	if i := small.Info(); i.Free != 3<<20 || i.Total != 3<<20 {
		t.Errorf("two small files: %+v", i)
	}
}
