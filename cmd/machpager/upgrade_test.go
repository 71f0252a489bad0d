//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"machpager/region"
)

// install puts a program at path, as a package manager does: under another name first, for the old file is busy.
func install(t *testing.T, path, program string) {
	t.Helper()
	from, err := os.Open(program)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	to, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err == nil {
		_, err = io.Copy(to, from)
		err = errors.Join(err, to.Close())
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// runs reports whether the process is the program at path.
func runs(t *testing.T, pid int, path string) bool {
	t.Helper()
	var a, b unix.Stat_t
	if err := errors.Join(unix.Stat(fmt.Sprintf("/proc/%d/exe", pid), &a), unix.Stat(path, &b)); err != nil {
		t.Fatal(err)
	}
	return a.Ino == b.Ino && a.Dev == b.Dev
}

// pattern is a page that no other is like.
func pattern(page, version int) []byte {
	return bytes.Repeat([]byte(fmt.Sprintf("%08d %06d ", page, version)), 4096/16)
}

// TestUpgrade: a pager is replaced by the program that is installed by then, or stays if that one cannot, while a task goes on with its memory.
func TestUpgrade(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	program, socket := filepath.Join(dir, "machpager"), filepath.Join(dir, "p.sock")
	install(t, program, self)
	var log bytes.Buffer
	serve := exec.CommandContext(ctx, program, "serve", "--socket", socket, "--resident", "1M", "--log-level", "info")
	serve.Stderr = &log
	out, err := serve.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := serve.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		serve.Process.Signal(unix.SIGTERM)
		if err := serve.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
		if t.Failed() {
			t.Logf("%s", log.Bytes())
		}
	}()
	if _, err := out.Read(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	p, err := region.Dial(ctx, socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	const pages = 1024 // four times the budget
	r, err := p.Allocate(ctx, pages*4096, nil)
	if err != nil {
		t.Fatal(err)
	}
	version := 0
	write := func() {
		version++
		for i := range pages {
			copy(r.Bytes()[i*4096:], pattern(i, version))
		}
	}
	read := func(when string) {
		t.Helper()
		for i := range pages {
			if !bytes.Equal(r.Bytes()[i*4096:][:4096], pattern(i, version)) {
				t.Fatalf("%s: page %d has %.20q, want %.20q", when, i, r.Bytes()[i*4096:], pattern(i, version))
			}
		}
	}
	pid := func() int {
		t.Helper()
		i, err := p.Info(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return i.PagerPID
	}
	upgrade := func() (upgradeResult, string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, self, "upgrade", "--json", "--socket", socket)
		cmd.Args[0] = "machpager"
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		var u upgradeResult
		if err := cmd.Run(); err == nil {
			if err := json.Unmarshal(stdout.Bytes(), &u); err != nil {
				t.Fatal(err)
			}
		}
		return u, stderr.String()
	}
	write()

	first := pid()
	install(t, program, "/bin/false")
	if u, why := upgrade(); u.Pager != 0 || !strings.Contains(why, "does not take over") {
		t.Errorf("upgrade to another program: %+v, %s", u, why)
	}
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	if u, why := upgrade(); u.Pager != 0 || !strings.Contains(why, "no such file") {
		t.Errorf("upgrade to no program: %+v, %s", u, why)
	}
	if now := pid(); now != first {
		t.Errorf("the pager is %d, was %d", now, first)
	}
	read("after upgrades that were refused")

	install(t, program, self)
	write()
	u, why := upgrade()
	if second := pid(); u.Before != first || u.Pager != second || second == first || !runs(t, second, program) {
		t.Fatalf("upgrade: %+v %s, the pager is %d, was %d", u, why, second, first)
	}
	read("after an upgrade")

	// What follows a death is the new program too, and so is what a signal asks for.
	for _, c := range []struct {
		what string
		pid  int
		sig  unix.Signal
	}{{"death", u.Pager, unix.SIGKILL}, {"SIGHUP", serve.Process.Pid, unix.SIGHUP}} {
		before := pid()
		write()
		if err := syscall.Kill(c.pid, c.sig); err != nil {
			t.Fatal(err)
		}
		now := pid()
		for end := time.Now().Add(20 * time.Second); now == before; now = pid() {
			if time.Now().After(end) {
				t.Fatalf("%s: the pager is still %d", c.what, now)
			}
			time.Sleep(5 * time.Millisecond)
		}
		if !runs(t, now, program) {
			t.Errorf("after %s, process %d is another program than the one that is installed", c.what, now)
		}
		read("after " + c.what)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}
