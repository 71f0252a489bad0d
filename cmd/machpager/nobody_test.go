//go:build linux

package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

// TestNobody: a user without any privilege is told what to do, once, and the status says so, also where another process met it. Needs root, to be
// somebody else, and vm.unprivileged_userfaultfd=0.
func TestNobody(t *testing.T) {
	if b, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd"); err != nil || strings.TrimSpace(string(b)) != "0" {
		t.Fatalf("vm.unprivileged_userfaultfd is %q, %v: want 0, or everybody may", b, err)
	}
	dir := t.TempDir()
	for _, d := range []string{dir, filepath.Dir(dir)} {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	program := copyOfThis(t, filepath.Join(dir, "machpager")) // the test binary is root's alone, as a rule
	private := filepath.Join(dir, "private")
	if err := os.Mkdir(private, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"demo", "share"}, `^machpager: writer: map: map object: open userfaultfd: operation not permitted \(run as root .*serve --hand-out-userfaultfd`},
		{[]string{"demo", "sort", "--size", "1M", "--resident", "1M"}, `^machpager: demo sort: map object: open userfaultfd: operation not permitted \(run as root `},
		{[]string{"serve", "--log-level", "error", "--socket", filepath.Join(private, "p.sock")}, `listen at .*: permission denied( \(name a socket in a directory of yours|\n)`},
		{[]string{"ls", "--socket", filepath.Join(private, "p.sock")}, `^machpager: dial pager: .*permission denied`},
	} {
		t.Run(strings.Join(c.args[:min(2, len(c.args))], " "), func(t *testing.T) {
			cmd := exec.Command(program, c.args...)
			cmd.Args[0] = "machpager"
			cmd.Dir = dir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
			var out, errs bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &errs
			err := cmd.Run()
			var ee *exec.ExitError
			if !errors.As(err, &ee) || ee.ExitCode() != exitRefused {
				t.Errorf("%v, want exit status %d", err, exitRefused)
			}
			if !regexp.MustCompile(c.want).Match(errs.Bytes()) {
				t.Errorf("standard error %q, want %s", errs.Bytes(), c.want)
			}
			if n := strings.Count(errs.String(), "run as root"); n > 1 {
				t.Errorf("the remedy %d times: %s", n, errs.Bytes())
			}
			if out.Len() > 0 {
				t.Errorf("standard output %q", out.Bytes())
			}
		})
	}
}

// copyOfThis copies this program to where everybody may execute it.
func copyOfThis(t *testing.T, name string) string {
	in, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}
