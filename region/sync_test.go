package region

import (
	"errors"
	"testing"

	"machpager/pager/emm"
)

func TestSyncRefuses(t *testing.T) {
	p, _ := startFake(t, nil)
	r := mapObject(t, p, 10_000, nil, nil)
	for _, c := range [][2]int64{{-1, 1}, {0, -1}, {0, 10_001}, {10_001, 0}, {1 << 62, 1 << 62}} {
		if err := r.Sync(deadline(t), c[0], c[1]); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("%d bytes at %d: %v", c[1], c[0], err)
		}
	}
	if err := r.Sync(deadline(t), 10_000, 0); err != nil {
		t.Errorf("nothing: %v", err)
	}
	r.Close()
	if err := r.Sync(deadline(t), 0, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}
