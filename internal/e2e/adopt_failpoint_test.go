package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"machpager/pager/emm"
	"machpager/region"
)

func init() { tasks["stepper"] = using(stepper) }

// stepper makes one of each call that leaves something behind, checks every byte on the way, and gives all back.
func stepper(ctx context.Context, _ *conn, p *region.Pager, _ At) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	const page, size = 4096, 64*4096 - 100 // the last page is partial
	o, r, err := create(ctx, p, size, nil, nil)
	if err != nil {
		return err
	}
	fill(r.Bytes(), 0, 1)
	if err := firstOf(r.Wire(ctx, 0, 4*page), r.PageOut(ctx, 0, size), check(r.Bytes(), 0, 1), r.Unwire(ctx, 0, 4*page)); err != nil {
		return err
	}
	if err := r.Unwire(ctx, 0, page); err == nil {
		return errors.New("unwired twice")
	}
	s, err := o.Snapshot(ctx)
	if err != nil {
		return err
	}
	fill(r.Bytes()[:8*page], 0, 2)
	old, err := readObject(ctx, s, 0, size)
	if err := firstOf(err, check(old, 0, 1), check(r.Bytes()[:8*page], 0, 2), check(r.Bytes()[8*page:], 8*page, 1)); err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	if err := r.Discard(ctx, 0, 4*page); err != nil {
		return err
	}
	if !bytes.Equal(r.Bytes()[:4*page], make([]byte, 4*page)) {
		return errors.New("what was discarded is not zeros")
	}
	if err := firstOf(o.SetSize(ctx, 32*page), check(r.Bytes()[8*page:32*page], 8*page, 1), o.SetSize(ctx, size)); err != nil {
		return err
	}
	if !bytes.Equal(r.Bytes()[32*page:], make([]byte, size-32*page)) {
		return errors.New("an object that grew again is not zeros there")
	}
	port, err := o.Right(ctx, &region.RightOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	lesser, err := p.ObjectOpen(ctx, port)
	if err != nil {
		return err
	}
	if got, err := readObject(ctx, lesser, 8*page, page); firstOf(err, check(got, 8*page, 1)) != nil {
		return fmt.Errorf("by a lesser right: %w", firstOf(err, check(got, 8*page, 1)))
	}
	if err := o.Revoke(ctx, port); err != nil {
		return err
	}
	if _, err := p.ObjectOpen(ctx, port); !errors.Is(err, emm.InvalidArgument) {
		return fmt.Errorf("open by a right that was taken back: %v", err)
	}
	lesser.Close()
	private, err := p.Allocate(ctx, size, nil)
	if err != nil {
		return err
	}
	fill(private.Bytes(), 0, 3)
	if err := firstOf(private.PageOut(ctx, 0, size), check(private.Bytes(), 0, 3), p.SetResident(ctx, 32<<20)); err != nil {
		return err
	}
	f, err := os.CreateTemp("", "stepper")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if err := f.Truncate(size); err != nil {
		return err
	}
	fo, fr, err := mapFile(ctx, p, f, region.ObjectOptions{}, nil)
	if err != nil {
		return err
	}
	fill(fr.Bytes(), 0, 4)
	id, err := p.BackingStoreCreate(ctx, os.TempDir(), &region.BackingStoreOptions{Capacity: 1 << 20})
	if err != nil {
		return err
	}
	if err := p.BackingStoreDelete(ctx, id); err != nil {
		return err
	}
	if err := firstOf(fr.Close(), fo.Close(), r.Close(), o.Close(), s.Close(), private.Close()); err != nil {
		return err
	}
	got, err := os.ReadFile(f.Name())
	if err := firstOf(err, f.Close()); err != nil {
		return err
	}
	// The file has it when the object has ended, which who gave up the last right need not wait for.
	for end := time.Now().Add(5 * time.Second); err == nil && check(got, 0, 4) != nil && time.Now().Before(end); got, err = os.ReadFile(f.Name()) {
		time.Sleep(10 * time.Millisecond)
	}
	return firstOf(err, check(got, 0, 4))
}

// daemonFailpoints are all that are in the code.
func daemonFailpoints(t *testing.T) (points []string) {
	t.Helper()
	names, err := filepath.Glob("../daemon/*.go")
	if err != nil || len(names) == 0 {
		t.Fatal(names, err)
	}
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`failpoint\.Here\("([^"]+)"\)`).FindAllSubmatch(b, -1) {
			points = append(points, string(m[1]))
		}
	}
	slices.Sort(points)
	return slices.Compact(points)
}

// guardianHolds counts what of objects the guardian has open.
func guardianHolds(pid int) map[string]int {
	m := map[string]int{}
	for what, n := range fdsOf(pid) {
		for _, kind := range []string{"machpager-table", "machpager-pager.map", "machpager-sums", "/#", "userfaultfd", "socket"} {
			if strings.Contains(what, kind) {
				m[kind] += n
			}
		}
	}
	return m
}

// TestFailpoints kills the pager once at each failpoint of the daemon, while a task goes through everything. No call fails, no byte is wrong, and at the end nothing
// is left that was not there at the start.
func TestFailpoints(t *testing.T) {
	points := daemonFailpoints(t)
	if len(points) < 25 {
		t.Fatalf("failpoints: %q", points)
	}
	for _, point := range points {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			points, adopts := point+"=1;", strings.HasPrefix(point, "daemon.adopt.")
			if adopts { // the second pager
				points = ";" + points
			}
			socket, pager := pagerAt(t, pagerOptions{Served: true, Store: "file", Dir: t.TempDir(), Restarts: restarts, NoStandby: true, Settled: 1, Failpoints: points})
			p := dial(t, socket)
			defer p.Close()
			before := infoOf(t, p)
			guardian := before.GuardianPID
			held := guardianHolds(guardian)
			deaths := 1
			if adopts {
				deaths++
				if _, err := killPager(t.Context(), p); err != nil {
					t.Fatal(err)
				}
			}
			run(t, "stepper", At{socket}, nil, nil)
			var after region.Info
			var now map[string]int
			for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
				after, now = infoOf(t, p), guardianHolds(guardian)
				if after.Objects == 0 && after.Resident == 0 && after.PagingFree == after.PagingTotal && fmt.Sprint(now) == fmt.Sprint(held) {
					break
				}
			}
			if n := strings.Count(pager.output(), "the pager has died"); n != deaths {
				t.Errorf("%d deaths", n)
			}
			if after.Objects != 0 || after.Resident != 0 || after.PagingFree != after.PagingTotal {
				t.Errorf("left: %+v", after)
			}
			if fmt.Sprint(now) != fmt.Sprint(held) {
				t.Errorf("the guardian holds %v, before %v", now, held)
			}
			if strings.Contains(pager.output(), "BUG") || strings.Contains(pager.output(), "level=ERROR") {
				t.Error("a pager complains")
			}
		})
	}
}
