package frames

import "testing"

func BenchmarkPunch(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.String(), func(b *testing.B) {
			p, err := Open(Options{Budget: 64 << 20, Kind: k})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			f, err := p.NewFile(4 * ExtentSize)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			data := fill(ExtentSize, 1)
			for b.Loop() {
				b.StopTimer()
				if _, err := f.WriteAt(data, 0); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
				if left, err := f.Punch(0, ExtentSize); left != 0 || err != nil {
					b.Fatal(left, err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.String(), func(b *testing.B) {
			for b.Loop() {
				p, err := Open(Options{Budget: 64 << 20, Kind: k})
				if err != nil {
					b.Fatal(err)
				}
				p.Close()
			}
		})
	}
}

// One page out of many, verified.
func BenchmarkPunchPage(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.String(), func(b *testing.B) {
			p, err := Open(Options{Budget: 64 << 20, Kind: k})
			if err != nil {
				b.Fatal(err)
			}
			defer p.Close()
			f, err := p.NewFile(ExtentFrames * PageSize * 16)
			if err != nil {
				b.Fatal(err)
			}
			defer f.Close()
			data := fill(int(f.Size()), 1)
			next := f.Size()
			for b.Loop() {
				if next == f.Size() {
					b.StopTimer()
					if _, err := f.WriteAt(data, 0); err != nil {
						b.Fatal(err)
					}
					next = 0
					b.StartTimer()
				}
				if left, err := f.Punch(next, PageSize); left != 0 || err != nil {
					b.Fatal(left, err)
				}
				next += PageSize
			}
		})
	}
}

func BenchmarkReserve(b *testing.B) {
	p, err := Open(Options{Budget: 1 << 20, Kind: Memfd})
	if err != nil {
		b.Fatal(err)
	}
	defer p.Close()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if p.Reserve(4) {
				p.Release(4)
			}
		}
	})
}
