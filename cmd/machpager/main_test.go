//go:build linux

package main

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"machpager/bench"
	"machpager/internal/daemon"
	"machpager/internal/demo"
	"machpager/internal/vm"
	"machpager/region"
	"machpager/region/spawn"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func TestMain(m *testing.M) {
	spawn.Main()
	bench.Main()
	demo.Main()
	testscript.Main(m, map[string]func(){"machpager": func() { os.Exit(run()) }})
}

// TestScripts runs the command as a person does.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata/script",
		UpdateScripts: *update,
		Deadline:      time.Now().Add(60 * time.Second),
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// status N command [args...] runs a command that must end with exit status N.
			"status": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) < 2 {
					ts.Fatalf("usage: status N command [args...]")
				}
				want, err := strconv.Atoi(args[0])
				ts.Check(err)
				got := 0
				var ee *exec.ExitError
				if err := ts.Exec(args[1], args[2:]...); errors.As(err, &ee) {
					got = ee.ExitCode()
				} else {
					ts.Check(err)
				}
				if got != want {
					ts.Fatalf("exit status %d, want %d", got, want)
				}
			},
			// await PATH waits until there is a file.
			"await": func(ts *testscript.TestScript, neg bool, args []string) {
				if neg || len(args) != 1 {
					ts.Fatalf("usage: await path")
				}
				for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
					if _, err := os.Stat(ts.MkAbs(args[0])); err == nil {
						return
					}
					if time.Now().After(end) {
						ts.Fatalf("%s: not there within 10 s", args[0])
					}
				}
			},
		},
	})
}

// TestTables holds what ls, info and paging ls print against golden files.
func TestTables(t *testing.T) {
	info := region.Info{MinPageSize: 4096, MaxPageSize: 2 << 20, Budget: 1 << 30, Resident: 12 << 20, KernelResident: 12<<20 + 4096, PagingTotal: -1, PagingFree: -1,
		Tasks: 3, Objects: 2, Mappings: 5, Frames: "tmpfs", Tier: "A", TierText: "privileged: everything", PagerPID: 4242, GuardianPID: 4241, Kernel: "6.18.0", Version: "0.1",
		Confinement: "no capabilities", Quotas: "user: 3 connections"}
	objects := []region.ObjectInfo{
		{ID: 1, Size: 1, PageSize: 4096},
		{ID: 12, Size: 64 << 30, PageSize: 4096, Resident: 12 << 20, Stored: 100 << 20, Mappings: 4},
		{ID: 130, Size: 5 << 20, PageSize: 65536, Resident: 65536, Mappings: 1},
	}
	paging := []region.BackingStore{
		{ID: 1, Dir: "/var/tmp", Total: 1 << 40, Used: 100 << 20, Free: 1<<40 - 100<<20, Read: 1 << 30, Written: 2 << 30},
		{ID: 3, Dir: "/fast disk", Priority: 10, Leaving: true, Total: 64 << 30, Used: 64 << 30, Written: 64 << 30, ReadErrors: 1, WriteErrors: 2},
	}
	dump := daemon.Dump{Version: "0.1", Kernel: "6.18.0", PID: 4242, Guardian: 4241, Tier: "A", Confinement: "none", Up: 90 * time.Minute, Goroutines: 21,
		Frames: daemon.FramesDump{Kind: "tmpfs", Budget: 1 << 30, Reserved: 12 << 20, Kernel: 12 << 20},
		Paging: daemon.PagingDump{Kind: "file", Total: 1 << 40, Used: 100 << 20, Free: 1<<40 - 100<<20, Files: []daemon.FileDump{{ID: 1, Dir: "/var/tmp", Total: 1 << 40, Used: 100 << 20, Errors: 2},
			{ID: 2, Dir: "/fast", Priority: 5, Leaving: true}}},
		Sessions: []daemon.SessionDump{{ID: 7, PID: 99, UID: 1000, Task: 1, Handles: 1, Mappings: 2}, {ID: 8, PID: 100}},
		Rights:   []daemon.RightsDump{{Object: 2, Manager: "default pager", Private: true, Rights: 3, Stored: 100 << 20}},
		Limits:   daemon.LimitsDump{Sessions: 2, MaxSessions: 64, Objects: 1, MaxObjects: 256},
		VM: vm.Dump{Stats: vm.Stats{Deferred: 5}, Wired: 1, InFlight: 2, Wanted: 3,
			Tasks: []vm.TaskDump{{ID: 1, PID: 99, Mappings: []vm.MappingDump{
				{ID: 3, Object: 2, Size: 1 << 30, Places: []vm.Place{{Address: 0x7f0000000000, Size: 1 << 30}}, Stats: vm.MappingStats{ZeroFilled: 7, P50: 9 * time.Microsecond, Max: time.Second}},
				{ID: 4, Object: 2, Off: 8192, Size: 4096, ReadOnly: true}}}},
			Objects: []vm.ObjectDump{{ID: 2, Size: 1 << 30, PageSize: 4096, ResidentMax: 64 << 20, Frames: 3072, Mappings: 2, Pages: vm.PageCounts{Absent: 259072, Clean: 3000, Dirty: 72}, Map: "·░█"},
				{ID: 9, Size: 4096, PageSize: 4096, Pages: vm.PageCounts{Absent: 1}, Map: "·"}},
			Waits: []vm.Wait{{Object: 2, Off: 4096, Size: 65536, For: vm.ForManager, Age: 1500 * time.Millisecond, Page: "Requested+Waiters", Thread: true, PID: 99, TID: 101},
				{Object: 2, Off: 1 << 20, Size: 4096, For: vm.ForStore, Age: 20 * time.Microsecond, Page: "Cleaning"}}}}
	for _, c := range []struct {
		name  string
		write func(b *bytes.Buffer) error
	}{
		{"dump", func(b *bytes.Buffer) error { return writeDump(b, &dump) }},
		{"ls", func(b *bytes.Buffer) error { return writeObjects(b, objects) }},
		{"ls-empty", func(b *bytes.Buffer) error { return writeObjects(b, nil) }},
		{"ls-json", func(b *bytes.Buffer) error { return writeJSON(b, objects) }},
		{"info", func(b *bytes.Buffer) error { return writeInfo(b, info) }},
		{"paging", func(b *bytes.Buffer) error { return writePaging(b, paging) }},
		{"paging-empty", func(b *bytes.Buffer) error { return writePaging(b, []region.BackingStore{}) }},
		{"paging-json", func(b *bytes.Buffer) error { return writeJSON(b, paging) }},
		{"info-json", func(b *bytes.Buffer) error { return writeJSON(b, info) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := c.write(&b); err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", c.name+".golden")
			if *update {
				if err := os.WriteFile(golden, b.Bytes(), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(b.Bytes(), want) {
				t.Errorf("got\n%swant\n%s(-update rewrites it)", b.Bytes(), want)
			}
		})
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]int64{"1": 1, "4096": 4096, "2K": 2 << 10, "2k": 2 << 10, "3M": 3 << 20, "1G": 1 << 30, "1t": 1 << 40, "8388607T": 8388607 << 40} {
		var s size
		if err := s.Set(text); err != nil || int64(s) != want {
			t.Errorf("%q: %d, %v; want %d", text, s, err, want)
		}
	}
	for _, text := range []string{"", "K", "-1", "0", "1.5G", "1X", "1KB", "8388608T", "9223372036854775808", " 1"} {
		var s size
		if err := s.Set(text); err == nil {
			t.Errorf("%q: %d, want an error", text, s)
		}
	}
}

// TestExitStatus: what wraps what.
func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		err  error
		want int
	}{
		{errors.New("anything"), exitFailed},
		{usageError{errors.New("x")}, exitUsage},
		{fmt.Errorf("demo: %w", demo.ErrDiffers), exitDiffers},
		{fmt.Errorf("x: %w", region.ErrPagerGone), exitNoPager},
		{dialError{fmt.Errorf("x: %w", os.ErrNotExist)}, exitFailed},
		{fmt.Errorf("open: %w", os.ErrPermission), exitRefused},
	} {
		if got := exitStatus(c.err); got != c.want {
			t.Errorf("%v: exit status %d, want %d", c.err, got, c.want)
		}
	}
}
