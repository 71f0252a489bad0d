package vnode

import (
	"fmt"
	"os"
	"testing"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

// BenchmarkManagers compares a checked file with a plain one, of 64 MiB in the directory for temporary files: page-out of runs, page-in of them from the kernel's page cache, and page-out
// of so many pages with a Sync.
func BenchmarkManagers(b *testing.B) {
	const size, run = 64 << 20, 2 << 20
	data := emmtest.Fill(run/ps, ps, 1)
	for _, m := range []string{"file", "checked"} {
		open := File
		if m == "checked" {
			open = Checked
		}
		with := func(name string, f func(b *testing.B, k *emmtest.Kernel)) {
			b.Run(m+"/"+name, func(b *testing.B) {
				file := tempFile(b, nil)
				p, err := open(reopen(b, file, os.O_RDWR), size, &Options{Log: quiet})
				if err != nil {
					b.Fatal(err)
				}
				k := emmtest.NewKernel(b, p, emm.NewPort(), ps)
				k.MayFail = true
				k.Init()
				for off := int64(0); off < size; off += run {
					k.Write(off, data)
				}
				k.Synchronize(emm.Run{Size: size}).Wait()
				f(b, k)
				k.Terminate()
				p.Close()
				waitIdle(b, p)
			})
		}
		with("pageout", func(b *testing.B, k *emmtest.Kernel) {
			b.SetBytes(run)
			off := int64(0)
			for b.Loop() {
				if kr := k.Write(off, data); kr != emm.Success {
					b.Fatal(kr)
				}
				off = (off + run) % size
			}
		})
		with("pagein", func(b *testing.B, k *emmtest.Kernel) {
			b.SetBytes(run)
			off := int64(0)
			for b.Loop() {
				k.Ask(emm.Run{Off: off, Size: run}, off).Wait()
				off = (off + run) % size
			}
		})
		for _, pages := range []int64{1, 512, 4096} {
			with(fmt.Sprintf("sync=%d", pages), func(b *testing.B, k *emmtest.Kernel) {
				b.SetBytes(pages * ps)
				n := int64(0)
				for b.Loop() {
					for left := pages * ps; left > 0; left -= run {
						k.Write(n*ps%size, data[:min(left, run)])
						n += min(left, run) / ps
					}
					if kr := k.Synchronize(emm.Run{Size: size}).Wait(); kr != emm.Success {
						b.Fatal(kr)
					}
				}
			})
		}
	}
}
