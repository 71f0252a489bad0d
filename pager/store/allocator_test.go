package store

import (
	"errors"
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// The allocator against a plain set of slots, with groups, partial frees, trims that fail and a capacity that cuts a group off.
func TestAllocatorModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		capacity := rapid.SampledFrom([]uint64{1, 63, 700, GroupSlots, GroupSlots + 5, 2*GroupSlots + 100}).Draw(t, "capacity")
		a := NewAllocator(capacity)
		used := map[Slot]bool{}
		backed := map[Slot]bool{}
		type run struct {
			s Slot
			n int
		}
		var runs []run
		longest := func() int {
			best, n := 0, 0
			for s := Slot(1); s <= Slot(capacity); s++ {
				if (s-1)%GroupSlots == 0 {
					n = 0
				}
				if n++; used[s] {
					n = 0
				}
				best = max(best, n)
			}
			return best
		}
		t.Repeat(map[string]func(*rapid.T){
			"alloc": func(t *rapid.T) {
				unit := rapid.SampledFrom([]int{1, 2, 3, 16, 512}).Draw(t, "unit")
				n := unit * rapid.IntRange(1, max(1, rapid.SampledFrom([]int{1, 600, 20000}).Draw(t, "most")/unit)).Draw(t, "units")
				s, m, err := a.Alloc(n, unit)
				best := longest()
				if err != nil {
					if !errors.Is(err, ErrNoSpace) || best >= unit {
						t.Fatalf("alloc %d by %d with %d free in a row: %v", n, unit, best, err)
					}
					return
				}
				if m <= 0 || m%unit != 0 || m > n || m != min(n, best/unit*unit) && m != n {
					t.Fatalf("alloc %d by %d with %d free in a row: got %d", n, unit, best, m)
				}
				for i := s; i < s+Slot(m); i++ {
					if used[i] || i == None || i > Slot(capacity) {
						t.Fatalf("alloc gave slot %d", i)
					}
					used[i] = true
					delete(backed, i)
				}
				runs = append(runs, run{s, m})
			},
			"free": func(t *rapid.T) {
				if len(runs) == 0 {
					return
				}
				i := rapid.IntRange(0, len(runs)-1).Draw(t, "run")
				r := runs[i]
				n := rapid.IntRange(1, r.n).Draw(t, "n")
				hold := rapid.Bool().Draw(t, "backed")
				a.Free(r.s, n, hold)
				for s := r.s; s < r.s+Slot(n); s++ {
					delete(used, s)
					if hold {
						backed[s] = true
					}
				}
				if n == r.n {
					runs = append(runs[:i], runs[i+1:]...)
				} else {
					runs[i] = run{r.s + Slot(n), r.n - n}
				}
			},
			"trim": func(t *rapid.T) {
				keep := uint64(rapid.IntRange(0, 300).Draw(t, "keep"))
				fail := rapid.Bool().Draw(t, "fail")
				boom := errors.New("boom")
				least := rapid.SampledFrom([]int{1, 1, 3, 40}).Draw(t, "least")
				err := a.TrimRuns(keep, least, func(s Slot, n int) error {
					if n < least {
						t.Fatalf("trim of %d+%d: want at least %d slots", s, n, least)
					}
					for i := s; i < s+Slot(n); i++ {
						if used[i] || !backed[i] {
							t.Fatalf("trim of slot %d: used %v, backed %v", i, used[i], backed[i])
						}
						if !fail {
							delete(backed, i)
						}
					}
					if fail {
						return boom
					}
					return nil
				})
				if fail || err == nil && (uint64(len(backed)) <= keep || capacity-uint64(len(used)) < 4*trimSlots) {
					return
				}
				row := 0
				for s := Slot(1); s <= Slot(capacity); s++ { // what is left is in shorter runs, each in one group
					if row++; !backed[s] {
						row = 0
					} else if (s-1)%GroupSlots == 0 {
						row = 1
					}
					if row >= least || err != nil {
						t.Fatalf("trim of runs of %d to %d: %d left, %d in a row, %v", least, keep, len(backed), row, err)
					}
				}
			},
			"": func(t *rapid.T) {
				c, u, b := a.Counts()
				if c != capacity || u != uint64(len(used)) || b != uint64(len(backed)) {
					t.Fatalf("counts %d, %d, %d; want %d, %d, %d", c, u, b, capacity, len(used), len(backed))
				}
				for _, r := range runs {
					if !a.Allocated(r.s, r.n) {
						t.Fatalf("%d+%d is not allocated", r.s, r.n)
					}
				}
			},
		})
		high := rapid.Uint64Range(0, capacity).Draw(t, "high")
		for s := range used {
			high = max(high, uint64(s))
		}
		if err := a.Reset(high, func(yield func(Slot, int) bool) {
			for _, r := range runs {
				if !yield(r.s, r.n) {
					return
				}
			}
		}); err != nil {
			t.Fatal(err)
		}
		if _, u, _ := a.Counts(); u != uint64(len(used)) {
			t.Fatalf("after reset %d are used, want %d", u, len(used))
		}
	})
}

func TestFreeTwicePanics(t *testing.T) {
	a := NewAllocator(100)
	s, _, err := a.Alloc(4, 1)
	if err != nil {
		t.Fatal(err)
	}
	a.Free(s, 4, true)
	for name, r := range map[string]Slot{"free": s, "never there": 90, "none": None, "beyond": 101} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("free of a slot that is %s: no panic", name)
				}
			}()
			a.Free(r, 1, true)
		}()
	}
}

func TestFreshRunsRatherThanPieces(t *testing.T) {
	a := NewAllocator(2 * GroupSlots)
	var all []Slot
	for range GroupSlots {
		s, _, err := a.Alloc(1, 1)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	for i := 0; i < len(all); i += 2 {
		a.Free(all[i], 1, true)
	}
	if s, n, err := a.Alloc(512, 1); n != 512 || s <= GroupSlots || err != nil {
		t.Errorf("512 slots beside a fragmented group: %d+%d, %v", s, n, err)
	}
	if s, n, err := a.Alloc(1, 1); n != 1 || s > GroupSlots || err != nil {
		t.Errorf("one slot: %d+%d, %v; want a hole", s, n, err)
	}
	if _, n, err := a.Alloc(2*GroupSlots, 1); n > GroupSlots || err != nil {
		t.Errorf("more than a group: %d, %v", n, err)
	}
}

func TestQueue(t *testing.T) {
	var q Queue
	ops := make([]*Op, 5)
	for round := range 3 {
		for i := range ops {
			ops[i] = &Op{Slot: Slot(i + 1)}
			q.Push(ops[i])
		}
		for i := range ops {
			if got := q.Pop(); got != ops[i] {
				t.Fatalf("round %d: pop %d: %v", round, i, got)
			}
		}
		if q.Pop() != nil {
			t.Fatal("pop of an empty queue")
		}
	}
}

func TestSums(t *testing.T) {
	data := make([]byte, 4*SlotSize)
	for i := range data {
		data[i] = byte(i * 7)
	}
	sums := make([]byte, 16)
	PutSums(sums, data)
	if good, err := CheckSums(sums, data, 1); good != 4 || err != nil {
		t.Errorf("right contents: %d, %v", good, err)
	}
	for bit := range 100 {
		i := 2*SlotSize + bit*41
		data[i] ^= 1 << (bit % 8)
		if good, err := CheckSums(sums, data, 1); good != 2 || !errors.Is(err, ErrCorrupt) {
			t.Errorf("bit %d of byte %d: %d, %v", bit%8, i, good, err)
		}
		data[i] ^= 1 << (bit % 8)
	}
	if got := fmt.Sprintf("%08x", Sum([]byte("123456789"))); got != "e3069283" { // the check value of CRC-32C
		t.Errorf("sum: %s", got)
	}
}
