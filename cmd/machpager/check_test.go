//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/region"
	"machpager/region/spawn"
)

// TestCheckFinds: a page that is taken out of its file behind the pager's back is found, in a pager that runs, and one of the paging file.
func TestCheckFinds(t *testing.T) {
	ctx := context.Background()
	socket := filepath.Join(t.TempDir(), "p.sock")
	dir := t.TempDir()
	p, err := spawn.Start(ctx, &spawn.Options{Resident: 16 << 20, Socket: socket, Store: "file", Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const size = 37 * 4096 // no other file is as long
	r, err := p.Allocate(ctx, size, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := range r.Bytes() {
		r.Bytes()[i] = byte(i>>12) + 1
	}
	if err := r.PageOut(ctx, 0, size); err != nil {
		t.Fatal(err)
	}
	if err := r.Populate(ctx, 0, size, false); err != nil {
		t.Fatal(err)
	}
	run := func() (string, error) {
		var out bytes.Buffer
		root := newRoot()
		root.SetOut(&out)
		root.SetArgs([]string{"check", "--socket", socket})
		err := root.ExecuteContext(ctx)
		return out.String(), err
	}
	if out, err := run(); err != nil || !strings.HasPrefix(out, "37 resident pages of 1 objects, 37 stored pages of 1 (151552 bytes read), 37 slots, 0 of them shared: ") {
		t.Fatalf("before: %v\n%s", err, out)
	}
	info, err := p.Info(ctx)
	if err != nil {
		t.Fatal(err)
	}
	punch(t, info.PagerPID, func(name string) bool {
		return !strings.Contains(name, dir) && !strings.Contains(name, "memfd:machpager-")
	}, size, 3*4096)
	out, err := run()
	if !errors.Is(err, errUnsound) || exitStatus(err) != exitFailed {
		t.Errorf("error %v, status %d", err, exitStatus(err))
	}
	if !regexp.MustCompile(`(?m)^pages, object 1, offset 12288: the page is Clean, but of its 4096 bytes 0 are in the file .*\n37 resident pages .*\n1 problems\n$`).MatchString(out) {
		t.Errorf("printed:\n%s", out)
	}
	if b := r.Bytes()[3*4096]; b != 4 { // the manager had it
		t.Errorf("read %d", b)
	}
	if out, err := run(); err != nil {
		t.Errorf("after: %v\n%s", err, out)
	}
	if r, err := p.Check(ctx); err != nil || len(r.Problems) > 0 || r.VM.Resident != 37 || r.Paging.Bytes != size {
		t.Errorf("%+v, %v", r, err)
	}
	punch(t, info.PagerPID, func(name string) bool { return strings.Contains(name, dir) }, size, 5*4096)
	out, err = run()
	if !errors.Is(err, errUnsound) || !regexp.MustCompile(`^paging space, object 0, offset \d+: stored page cannot be read back: .*CRC-32C is .*corrupted\n37 resident`).MatchString(out) {
		t.Errorf("after the paging file lost a page: %v\n%s", err, out)
	}
}

// TestCheckAfterDeaths: a pager that is killed again and again in the middle of a sort leaves nothing that is not as it should be, and the sort comes out right.
func TestCheckAfterDeaths(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "p.sock")
	s := startService(t, nil, socket, 0, "--socket", socket, "--restarts", "100", "--resident", "2M", "--dir", t.TempDir())
	s.told(t, "READY=1")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Second)
	defer cancel()
	sorted := make(chan error, 1)
	var out bytes.Buffer
	go func() {
		root := newRoot()
		root.SetOut(&out)
		root.SetArgs([]string{"demo", "sort", "--size", "24M", "--no-plain", "--socket", socket})
		sorted <- root.ExecuteContext(ctx)
	}()
	deaths := 0
	for running := true; running; {
		select {
		case err := <-sorted:
			if err != nil {
				t.Errorf("sort: %v\n%s", err, out.Bytes())
			}
			running = false
		case <-time.After(200 * time.Millisecond):
		}
		p, err := region.Dial(ctx, socket, nil)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := p.Check(ctx); err != nil || len(r.Problems) > 0 {
			t.Errorf("after %d deaths: %+v, %v", deaths, r, err)
		}
		if running && deaths < 3 { // more would wait longer each time
			info, err := p.Info(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := unix.Kill(info.PagerPID, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			deaths++
			s.told(t, "READY=1")
		}
		p.Close()
	}
	if deaths == 0 {
		t.Error("it was over before the pager could be killed")
	}
	t.Logf("%d deaths", deaths)
	s.Process.Signal(unix.SIGTERM)
	if status := s.ended(t); status != 0 {
		t.Errorf("exit status %d; standard error:\n%s", status, s.stderr.Bytes())
	}
}

// punch takes a page out of the file of that size and such a name that the process has open.
func punch(t *testing.T, pid int, which func(name string) bool, size, off int64) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range fds {
		f, err := os.OpenFile(name, os.O_RDWR, 0)
		if err != nil {
			continue // a socket
		}
		defer f.Close()
		if st, err := f.Stat(); err != nil || st.Size() != size || !st.Mode().IsRegular() {
			continue
		}
		if target, _ := os.Readlink(name); !which(target) {
			continue
		}
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, 4096); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("process %d has no file of %d bytes", pid, size)
}

// TestWriteCheck: what check says of a pager that is not as it should be.
func TestWriteCheck(t *testing.T) {
	r := &region.CheckReport{Problems: []region.CheckProblem{{Where: "paging space", Object: -1, Off: -1, What: "slots are lost"}}, More: 2}
	r.VM.Empty, r.VM.Unsettled, r.Paging.Uncounted = 1, 2, 3
	var b bytes.Buffer
	if err := writeCheck(&b, r); err != nil {
		t.Fatal(err)
	}
	want := `paging space: slots are lost
and 2 more
0 resident pages of 0 objects, 0 stored pages of 0 (0 bytes read), 0 slots, 0 of them shared: 0s
1 dirty pages have no frame and read as zeros: a task has thrown them away, or they were never written
2 pages were being worked on whenever they were looked at
3 counts were not compared: they changed all the time (check again when less goes on)
3 problems
`
	if b.String() != want {
		t.Errorf("got\n%swant\n%s", b.String(), want)
	}
}
