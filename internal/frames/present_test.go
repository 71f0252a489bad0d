package frames

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// runs lists what is present, in pages: first, count, first, count, ...
func runs(t *testing.T, f *File, off, n int64) []int64 {
	t.Helper()
	var list []int64
	must(t, f.Present(off*PageSize, n*PageSize, func(o, n int64) bool {
		list = append(list, o/PageSize, n/PageSize)
		return true
	}))
	return list
}

func TestPresent(t *testing.T) {
	forKinds(t, 64<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 4*ExtentSize)
		last := f.Size()/PageSize - 1
		c := newCopier(t, f)
		for _, page := range []int64{1, 2, 3, 7, 600, 601, last} {
			must(t, c.copy(page*PageSize, fill(PageSize, 1)))
		}
		// What fallocate makes SEEK_DATA does not tell; it occupies frames.
		must(t, unix.Fallocate(f.Fd(), unix.FALLOC_FL_KEEP_SIZE, 8*PageSize, 2*PageSize))
		k := int64(2) // pages that it made
		if p.Extents() {
			k = 8 // the largest folio that fits between the others
		}
		for _, want := range []struct {
			off, n int64
			runs   []int64
		}{
			{0, last + 1, []int64{1, 3, 7, 1 + k, 600, 2, last, 1}},
			{0, 0, nil}, {0, 1, nil}, {2, 1, []int64{2, 1}}, {2, 6, []int64{2, 2, 7, 1}}, {8, 1, []int64{8, 1}}, {9, 592, []int64{9, k - 1, 600, 1}},
			{16, 584, nil}, {last, 1, []int64{last, 1}}, {last, 1000, []int64{last, 1}}, {last + 1, 10, nil},
		} {
			if got := runs(t, f, want.off, want.n); !slices.Equal(got, want.runs) {
				t.Errorf("present in %d+%d: %v, want %v", want.off, want.n, got, want.runs)
			}
			var sum int64
			for i := 1; i < len(want.runs); i += 2 {
				sum += want.runs[i]
			}
			if n, err := f.Occupied(want.off*PageSize, want.n*PageSize); err != nil || n != sum*PageSize {
				t.Errorf("occupied in %d+%d: %d, %v, want %d pages", want.off, want.n, n, err, sum)
			}
		}
		calls := 0
		must(t, f.Present(0, f.Size(), func(_, _ int64) bool { calls++; return calls < 2 }))
		if calls != 2 {
			t.Errorf("told %d runs, asked for 2", calls)
		}
		for _, bad := range [][2]int64{{-PageSize, PageSize}, {0, -PageSize}, {1, PageSize}, {0, 1}, {1<<63 - PageSize, PageSize}} {
			none := func(int64, int64) bool { t.Error("told a run"); return false }
			wantErr(t, f.Present(bad[0], bad[1], none), unix.EINVAL)
			_, err := f.Occupied(bad[0], bad[1])
			wantErr(t, err, unix.EINVAL)
			_, err = f.Punch(bad[0], bad[1])
			wantErr(t, err, unix.EINVAL)
		}
		// Punching while it looks: no lock is held.
		must(t, f.Present(0, f.Size(), func(o, n int64) bool {
			left, err := f.Punch(o, n)
			if left != 0 || err != nil {
				t.Error(left, err)
			}
			return true
		}))
		wantBlocks(t, f, 0)
	})
}

// Against a model, with and without cachestat.
func TestPresentRandom(t *testing.T) {
	for _, seek := range []bool{false, true} {
		t.Run(fmt.Sprintf("seek=%v", seek), func(t *testing.T) {
			noCachestat.Store(seek)
			defer noCachestat.Store(false)
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			rnd := rand.New(rand.NewPCG(seed, 0))
			const pages = 256
			forKinds(t, 64<<20, kinds, func(t *testing.T, p *Pool) {
				f := newFile(t, p, pages*PageSize)
				c := newCopier(t, f)
				var model [pages]bool
				for range 300 {
					i := rnd.Int64N(pages)
					n := 1 + rnd.Int64N(min(20, pages-i))
					switch rnd.IntN(3) {
					case 0:
						if left, err := f.Punch(i*PageSize, n*PageSize); left != 0 || err != nil {
							t.Fatal(left, err)
						}
						clear(model[i : i+n])
					case 1:
						if !seek && !slices.Contains(model[i:i+n], true) && p.Kind() == Memfd {
							must(t, unix.Fallocate(f.Fd(), unix.FALLOC_FL_KEEP_SIZE, i*PageSize, n*PageSize))
							for j := range n {
								model[i+j] = true
							}
						}
					case 2:
						for j := i; j < i+n; j++ {
							if !model[j] {
								must(t, c.copy(j*PageSize, fill(PageSize, 1)))
								model[j] = true
							}
						}
					}
					off := rnd.Int64N(pages)
					n = rnd.Int64N(pages - off)
					var want []int64
					for j := off; j < off+n; j++ {
						if k := len(want); model[j] && k > 0 && want[k-2]+want[k-1] == j {
							want[k-1]++
						} else if model[j] {
							want = append(want, j, 1)
						}
					}
					if got := runs(t, f, off, n); !slices.Equal(got, want) {
						t.Fatalf("present in %d+%d: %v, want %v", off, n, got, want)
					}
				}
			})
		})
	}
}

// Somebody who holds a large folio keeps a punch of part of it from taking effect. Punch says so, and takes it when the holder has gone.
func TestPunchHeldFolio(t *testing.T) {
	forKinds(t, 16<<20, []Kind{Tmpfs, TmpfsUserNS}, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 2*ExtentSize)
		data := fill(ExtentSize, 5)
		if _, err := f.WriteAt(data, 0); err != nil {
			t.Fatal(err)
		}
		r, w, err := os.Pipe()
		must(t, err)
		defer w.Close()
		defer r.Close()
		from := int64(0)
		if n, err := unix.Splice(f.Fd(), &from, int(w.Fd()), nil, PageSize, 0); n != PageSize || err != nil { // the pipe holds the page itself
			t.Fatal(n, err)
		}
		left, err := f.Punch(3*PageSize, 2*PageSize)
		if left != 2*PageSize || err != nil {
			t.Fatalf("punch of a held folio: %d bytes left, %v", left, err)
		}
		wantBlocks(t, f, ExtentFrames)
		if got := runs(t, f, 3, 2); !slices.Equal(got, []int64{3, 2}) {
			t.Fatalf("present %v", got)
		}
		if _, err := r.Read(make([]byte, PageSize)); err != nil { // lets go
			t.Fatal(err)
		}
		if left, err = f.Punch(3*PageSize, 2*PageSize); left != 0 || err != nil {
			t.Fatalf("punch when nobody holds it: %d bytes left, %v", left, err)
		}
		wantBlocks(t, f, ExtentFrames-2)
		b := make([]byte, ExtentSize)
		must(t, f.ReadAt(b, 0))
		clear(data[3*PageSize : 5*PageSize])
		if !bytes.Equal(b, data) {
			t.Fatal("wrong contents")
		}
	})
}

// Punches of single pages out of large folios while others read, and so hold, the folios: what Punch calls gone is gone and not charged.
func TestPunchWhileRead(t *testing.T) {
	forKinds(t, 16<<20, kinds, func(t *testing.T, p *Pool) {
		f := newFile(t, p, 2*ExtentSize)
		data := fill(ExtentSize, 5)
		stop := make(chan struct{})
		var wg sync.WaitGroup
		var reads atomic.Int64
		for range 2 {
			wg.Go(func() {
				for b := make([]byte, 64<<10); ; reads.Add(1) {
					select {
					case <-stop:
						return
					default:
					}
					if err := f.ReadAt(b, rand.Int64N(2*ExtentSize-int64(len(b)))); err != nil {
						t.Error(err)
						return
					}
				}
			})
		}
		var punched, leftover int64
		for end := time.Now().Add(700 * time.Millisecond); time.Now().Before(end); {
			if _, err := f.WriteAt(data, 0); err != nil {
				t.Fatal(err)
			}
			want := int64(ExtentFrames)
			for range 64 {
				page := rand.Int64N(ExtentFrames)
				had, err := f.Occupied(page*PageSize, PageSize)
				must(t, err)
				left, err := f.Punch(page*PageSize, PageSize)
				must(t, err)
				if left > 0 {
					leftover++
				}
				want -= (had - left) / PageSize
				punched++
				wantBlocks(t, f, want)
			}
			left, err := f.Punch(0, ExtentSize)
			if left != 0 || err != nil {
				t.Fatal(left, err)
			}
			wantBlocks(t, f, 0)
		}
		close(stop)
		wg.Wait()
		t.Logf("%d punches, %d left something, %d reads", punched, leftover, reads.Load())
	})
}
