package e2e

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
)

func init() {
	tasks["rewriter"] = using(rewriter)
	tasks["addfile"] = using(addFileTask)
}

// book is memory and what it must contain: each page, page-size bytes, has a version.
type book struct {
	r        *region.Region
	versions []uint64
	want     []byte // one page
}

func newBook(r *region.Region) *book {
	return &book{r: r, versions: make([]uint64, len(r.Bytes())/4096), want: make([]byte, 4096)}
}

func (b *book) page(i int) []byte { return b.r.Bytes()[i*4096 : (i+1)*4096] }

// put writes a page. With an error, a *region.FaultError, the page keeps its version: the write faults before its first byte.
func (b *book) put(i int, version uint64) error {
	fill(b.want, int64(i)*4096, version)
	err := region.Guard(func() error { copy(b.page(i), b.want); return nil })
	if err == nil {
		b.versions[i] = version
	}
	return err
}

// check reads a page.
func (b *book) check(i int) error {
	clear(b.want)
	if b.versions[i] != 0 {
		fill(b.want, int64(i)*4096, b.versions[i])
	}
	return region.Guard(func() error {
		if k := firstDiff(b.page(i), b.want); k >= 0 {
			return fmt.Errorf("page %d, version %d: wrong at byte %d", i, b.versions[i], k)
		}
		return nil
	})
}

func (b *book) checkAll() error {
	for i := range b.versions {
		if err := b.check(i); err != nil {
			return err
		}
	}
	return nil
}

const rewriterSize = 6 << 20

// rewriter reads and writes pages at random until it is told to stop, and then looks at all of them.
func rewriter(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	r, err := p.Allocate(ctx, rewriterSize, nil)
	if err != nil {
		return err
	}
	b := newBook(r)
	for i := range b.versions {
		if err := b.put(i, 1); err != nil {
			return err
		}
	}
	if err := c.send(true); err != nil {
		return err
	}
	stop := make(chan error, 1)
	go func() { stop <- c.await() }()
	random := rand.New(rand.NewPCG(1, 2))
	n := 0
	for done := false; !done; n++ {
		select {
		case err := <-stop:
			if err != nil {
				return err
			}
			done = true
		default:
		}
		i := random.IntN(len(b.versions))
		if err := b.check(i); err != nil {
			return fmt.Errorf("after %d touches: %w", n, err)
		}
		if n%2 == 0 {
			if err := b.put(i, uint64(n+2)); err != nil {
				return err
			}
		}
	}
	return firstOf(b.checkAll(), r.PageOut(ctx, 0, rewriterSize), b.checkAll(), c.send(n))
}

// TestPagingFiles adds and removes paging files while a task reads and writes six times as much as may be resident.
func TestPagingFiles(t *testing.T) {
	for _, kind := range []string{daemon.StoreFile, daemon.StoreTiered} {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			dirs, duration := []string{t.TempDir(), t.TempDir()}, soak(2*time.Second)
			o := pagerOptions{Resident: 1 << 20, Store: kind, Dir: dirs[0]}
			if kind == daemon.StoreTiered {
				o.Compressed = 1 << 20
			}
			socket, _ := pagerAt(t, o)
			ctx, cancel := context.WithTimeout(t.Context(), patience+duration)
			defer cancel()
			p := dial(t, socket)
			defer p.Close()
			k := startFor(t, "rewriter", patience+duration, nil)
			k.send(At{socket})
			k.ready()
			used := func() map[int]int64 {
				list, err := p.BackingStores(ctx)
				if err != nil {
					t.Fatal(err)
				}
				m := map[int]int64{}
				for _, f := range list {
					m[f.ID] = f.Used
					if f.ReadErrors+f.WriteErrors != 0 {
						t.Errorf("paging file %+v", f)
					}
				}
				return m
			}
			// The first one cannot go: there is no other.
			if err := p.BackingStoreDelete(ctx, 1); !errors.Is(err, emm.NoSpace) {
				t.Errorf("delete the only paging file: %v, want %v", err, emm.NoSpace)
			}
			old := 1
			moved := int64(0)
			for end := time.Now().Add(duration); time.Now().Before(end); {
				id, err := p.BackingStoreCreate(ctx, dirs[1], &region.BackingStoreOptions{Capacity: 16 << 20})
				if err != nil {
					t.Fatal(err)
				}
				eventually(t, 10*time.Second, "contents in both files", func() bool { u := used(); return u[old] > 64<<10 && u[id] > 64<<10 })
				moved += used()[old]
				if err := p.BackingStoreDelete(ctx, old); err != nil {
					t.Fatal(err)
				}
				if _, there := used()[old]; there {
					t.Fatalf("file %d was removed and is listed", old)
				}
				if n := pagingFiles(t, p, dirs...); n != 1 {
					t.Fatalf("the pager has %d paging files open, want 1", n)
				}
				old = id
			}
			k.send(true)
			var n int
			k.recv(&n)
			k.wait()
			t.Logf("%d touches while %d KiB were moved", n, moved>>10)
			eventually(t, 5*time.Second, "nothing is stored when the task has left", func() bool { return used()[old] == 0 })
		})
	}
}

// pagingFiles counts what the pager has open in the directories.
func pagingFiles(t *testing.T, p *region.Pager, dirs ...string) (n int) {
	t.Helper()
	info := infoOf(t, p)
	for to, k := range fdsOf(info.PagerPID) {
		for _, d := range dirs {
			if filepath.Dir(to) == d {
				n += k
			}
		}
	}
	return n
}

// addFileTask tries to change paging space.
func addFileTask(ctx context.Context, c *conn, p *region.Pager, _ At) error {
	if _, err := p.BackingStoreCreate(ctx, "/tmp", nil); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("create a paging file: %v, want EPERM", err)
	}
	if err := p.BackingStoreDelete(ctx, 1); !errors.Is(err, unix.EPERM) {
		return fmt.Errorf("delete a paging file: %v, want EPERM", err)
	}
	list, err := p.BackingStores(ctx)
	if err != nil || len(list) != 1 {
		return fmt.Errorf("list paging files: %v, %w", list, err)
	}
	return c.send(true)
}

// TestPagingFilesPrivilege: who may use the pager may not change its paging space.
func TestPagingFilesPrivilege(t *testing.T) {
	dir := openDir(t)
	socket := filepath.Join(dir, "p.sock")
	server := serveAt(t, daemon.Config{Socket: socket, Group: fmt.Sprint(nobody)}, func(name string) *task { return start(t, name, nil) })
	defer server.wait()
	k := startNobody(t, "addfile", false)
	k.send(At{socket})
	k.ready()
	k.wait()
}
