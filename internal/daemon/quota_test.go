package daemon

import (
	"context"
	"errors"
	"testing"
	"time"

	"machpager/pager/emm"
)

// TestPace: a burst goes at once, and what comes after it no faster than it may.
func TestPace(t *testing.T) {
	var p pace
	start := time.Now()
	const perSecond, n = 1000, 400 // 100 in the burst
	for range n {
		if err := p.wait(t.Context(), perSecond); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(start); d < 250*time.Millisecond {
		t.Errorf("%d requests of %d a second took %v", n, perSecond, d)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	p.next = time.Now().Add(time.Hour)
	if err := p.wait(ctx, perSecond); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestQuotasCheck(t *testing.T) {
	for _, q := range []Quotas{{UserConnections: -1}, {UserObjects: -1}, {UserSpace: -1}, {TaskMapped: -1}, {TaskRequests: -1}} {
		if err := (&Config{Quotas: q}).Check(); !errors.Is(err, emm.InvalidArgument) {
			t.Errorf("%+v: %v", q, err)
		}
	}
}
