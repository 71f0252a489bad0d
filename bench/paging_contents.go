//go:build linux

package bench

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"unsafe"
)

// Contents that compress about as memory does, are different in every page and every version of it, and are checked at the speed of memory: the sum
// of a page's words has every byte of it in it.

const (
	templates = 64 // different pages beneath the stamps
	stride    = 64 // words from one stamp to the next
	stamps    = 512 / stride
	stampStep = 0x9E3779B97F4A7C15
)

type pageWords = [wordsPage]uint64

// contents knows what every page of a target must hold.
type contents struct {
	base    *[templates]pageWords
	sums    [templates]uint64 // of the words between the stamps
	version []uint32          // of each page
}

func newContents(pages int) *contents {
	c := &contents{base: makeTemplates(), version: make([]uint32, pages)}
	for t := range c.base {
		for i, w := range c.base[t] {
			if i%stride != 0 {
				c.sums[t] += w
			}
		}
	}
	return c
}

// makeTemplates makes pages of words from a small vocabulary between numbers: an LZ4-class code makes about half of it.
func makeTemplates() *[templates]pageWords {
	all := new([templates]pageWords)
	r := rand.New(rand.NewPCG(1, 2))
	vocabulary := make([]uint64, 256)
	for i := range vocabulary {
		vocabulary[i] = r.Uint64()
	}
	for t := range all {
		for i := range all[t] {
			if i%8 < 5 {
				all[t][i] = vocabulary[r.IntN(len(vocabulary))]
			} else {
				all[t][i] = r.Uint64() >> 24
			}
		}
	}
	return all
}

// stampSum is what the steps of a page's stamps add up to.
var stampSum = func() (sum uint64) {
	for i := range stamps {
		sum += uint64(i) * stampStep
	}
	return sum
}()

func stamp(p int, version uint32) uint64 {
	return (uint64(p+1)<<32 | uint64(version)) * 0xD6E8FEB86659FD93
}

// page is page p of mem.
func page(mem []byte, p int) *pageWords {
	return (*pageWords)(unsafe.Pointer(unsafe.SliceData(mem[p*pageSize : (p+1)*pageSize])))
}

// write puts the next version of page p into mem, whole.
func (c *contents) write(mem []byte, p int) {
	w := page(mem, p)
	*w = c.base[p%templates]
	c.version[p]++
	c.stamp(w, p)
}

// stamp makes w, the page p with any stamps, the present version of it.
func (c *contents) stamp(w *pageWords, p int) {
	s := stamp(p, c.version[p])
	for i := range stamps {
		w[i*stride] = s + uint64(i)*stampStep
	}
}

// check reads all of page p.
func (c *contents) check(mem []byte, p int) error {
	var a0, a1, a2, a3 uint64
	w := page(mem, p)
	for i := 0; i < wordsPage; i += 4 {
		a0 += w[i]
		a1 += w[i+1]
		a2 += w[i+2]
		a3 += w[i+3]
	}
	want := c.sums[p%templates] + stamps*stamp(p, c.version[p]) + stampSum
	if got := a0 + a1 + a2 + a3; got != want {
		return wrongf("page %d, version %d: its words add up to %#x instead of %#x", p, c.version[p], got, want)
	}
	return nil
}

// update reads all of page p, and changes its stamps.
func (c *contents) update(mem []byte, p int) error {
	if err := c.check(mem, p); err != nil {
		return err
	}
	c.version[p]++
	c.stamp(page(mem, p), p)
	return nil
}

// compare compares every byte of mem.
func (c *contents) compare(mem []byte) error {
	var want pageWords
	raw := unsafe.Slice((*byte)(unsafe.Pointer(&want)), pageSize)
	for p := range len(mem) / pageSize {
		want = c.base[p%templates]
		c.stamp(&want, p)
		if got := mem[p*pageSize : (p+1)*pageSize]; !bytes.Equal(got, raw) {
			for i := range got {
				if got[i] != raw[i] {
					return wrongf("page %d, version %d: byte %d is %#x instead of %#x", p, c.version[p], i, got[i], raw[i])
				}
			}
		}
	}
	return nil
}

// wrongError is contents that are not what was written.
type wrongError struct{ error }

func wrongf(format string, a ...any) error { return wrongError{fmt.Errorf(format, a...)} }
