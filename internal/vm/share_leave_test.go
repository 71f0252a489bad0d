package vm

import "testing"

// Who leaves the last frames to others gets his page all the same, when page-out has made free what it makes free.
func TestLeavingWaitsForNobody(t *testing.T) {
	for _, page := range []int64{1, 16, 512} {
		for last := int64(0); last <= 4096; last++ {
			if free := max(2*last, page); leaving(1, page, free, last) != 1 {
				t.Fatalf("pages of %d frames, the last %d: none of %d free frames may be taken", page, last, free)
			}
		}
	}
	if n := leaving(8, 16, 100, 50); n != 3 {
		t.Errorf("%d pages of 16 frames, of 100 that are free when 50 are left, want 3", n)
	}
}
