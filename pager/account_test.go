package pager

import (
	"errors"
	"testing"

	"machpager/pager/emm"
	"machpager/pager/emm/emmtest"
)

// A snapshot for which there is no room under its owner's quota is refused, so that what is written over what it shares has room.
func TestSnapshotQuota(t *testing.T) {
	s := memoryStore(t, nil)
	p := newPager(t, s)
	const n = 16
	const most = 5 * n * ps / 2
	a := NewAccount("somebody", most)
	k := vm{port: emm.NewPort()}
	if err := p.ObjectCreate(k.port, n*ps, ps); err != nil {
		t.Fatal(err)
	}
	p.Charge(k.port, a)
	k = vmOf(t, p, k.port, ps)
	k.Write(0, emmtest.Fill(n, ps, 1))
	for i := range 5 {
		port := emm.NewPort()
		p.Charge(port, a)
		if err := p.Snapshot(k.port, port); (i == 0) != (err == nil) || err != nil && !errors.Is(err, emm.ResourceShortage) {
			t.Fatalf("snapshot %d, with %d of %d bytes stored: %v", i, a.Stored(), most, err)
		}
		k.Write(0, emmtest.Fill(n, ps, uint64(i+2)))
	}
	if u := p.Info().Used; u > most || a.Stored() > most {
		t.Errorf("%d bytes of paging space are taken, %d counted, of a quota of %d", u, a.Stored(), most)
	}
}
