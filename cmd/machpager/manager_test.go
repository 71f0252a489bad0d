//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
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

// service is serve, started as systemd starts it.
type service struct {
	*exec.Cmd
	stderr bytes.Buffer
	words  chan string // what it has told
	socket string
}

// startService passes on a socket, if there is one, and listens to what the service has to tell. watchdog: see sd_watchdog_enabled(3); 0: none.
func startService(t *testing.T, sockets []*os.File, socket string, watchdog time.Duration, args ...string) *service {
	t.Helper()
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "machpager")
	if err := os.Symlink(exe, program); err != nil {
		t.Fatal(err)
	}
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { notify.Close() })
	s := &service{words: make(chan string, 1000), socket: socket}
	go func() {
		defer close(s.words)
		b := make([]byte, 4096)
		for {
			n, err := notify.Read(b)
			if err != nil {
				return
			}
			s.words <- string(b[:n])
		}
	}()
	// The shell knows the pid that it will have.
	s.Cmd = exec.Command("/bin/sh", append([]string{"-c", `LISTEN_PID=$$ WATCHDOG_PID=$$ exec "$0" serve --log-level warn --resident 8M "$@"`, program}, args...)...)
	s.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	if len(sockets) > 0 {
		s.Env = append(s.Env, fmt.Sprintf("LISTEN_FDS=%d", len(sockets)))
	}
	if watchdog > 0 {
		s.Env = append(s.Env, fmt.Sprintf("WATCHDOG_USEC=%d", watchdog.Microseconds()))
	}
	s.ExtraFiles, s.Stderr = sockets, &s.stderr
	s.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.ProcessState == nil {
			s.Process.Kill()
			s.Wait()
		}
	})
	return s
}

// told waits for a word.
func (s *service) told(t *testing.T, word string) string {
	t.Helper()
	limit := time.After(20 * time.Second)
	for {
		select {
		case w := <-s.words:
			for line := range strings.SplitSeq(w, "\n") {
				if line == word {
					return w
				}
			}
		case <-limit:
			t.Fatalf("%s was not told within 20 s; standard error:\n%s", word, s.stderr.Bytes())
		}
	}
}

// ended waits for its end.
func (s *service) ended(t *testing.T) int {
	t.Helper()
	kill := time.AfterFunc(20*time.Second, func() { s.Process.Kill() })
	defer kill.Stop()
	err := s.Wait()
	var ee *exec.ExitError
	if err != nil && !errors.As(err, &ee) {
		t.Fatal(err)
	}
	return s.ProcessState.ExitCode()
}

// passed makes a socket as a socket unit does.
func passed(t *testing.T, network, path string) *os.File {
	t.Helper()
	l, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	f, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	t.Cleanup(func() { f.Close() })
	return f
}

// TestService: readiness, a socket that is passed on, who dials before there is a pager, what is left in the environment, the end in order.
func TestService(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "passed.sock")
	file := passed(t, "unixpacket", socket)
	type dialled struct {
		p   *region.Pager
		err error
	}
	early := make(chan dialled, 1)
	go func() {
		p, err := region.Dial(context.Background(), socket, nil)
		early <- dialled{p, err}
	}()
	s := startService(t, []*os.File{file}, socket, 0)
	if w := s.told(t, "READY=1"); !strings.Contains(w, "STATUS=the pager is process ") {
		t.Errorf("told %q", w)
	}
	d := <-early
	if d.err != nil {
		t.Fatal(d.err)
	}
	info, err := d.p.Info(context.Background())
	if err != nil || info.GuardianPID != s.Process.Pid {
		t.Errorf("guardian %d, %v; want %d", info.GuardianPID, err, s.Process.Pid)
	}
	env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", info.PagerPID))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"LISTEN_FDS", "LISTEN_PID", "NOTIFY_SOCKET", "WATCHDOG_USEC"} {
		if bytes.Contains(env, []byte(name+"=")) {
			t.Errorf("the pager has %s in its environment", name)
		}
	}
	s.Process.Signal(unix.SIGTERM)
	s.told(t, "STOPPING=1")
	d.p.Close() // it waited for its tasks
	if status := s.ended(t); status != 0 {
		t.Errorf("exit status %d; standard error:\n%s", status, s.stderr.Bytes())
	}
	if _, err := os.Lstat(socket); err != nil {
		t.Errorf("the service manager's socket: %v", err)
	}
}

// TestServiceWatchdog: the guardian speaks up as long as it lives, and ends a pager that hangs.
func TestServiceWatchdog(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "p.sock")
	s := startService(t, nil, socket, 1800*time.Millisecond, "--socket", socket)
	s.told(t, "READY=1")
	s.told(t, "WATCHDOG=1")
	p, err := region.Dial(context.Background(), socket, nil)
	if err != nil {
		t.Fatal(err)
	}
	info, err := p.Info(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	if err := unix.Kill(info.PagerPID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	s.told(t, "WATCHDOG=1")
	for end := time.Now().Add(20 * time.Second); unix.Kill(info.PagerPID, 0) == nil; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a pager that hangs was not ended")
		}
	}
	s.Process.Signal(unix.SIGTERM)
	s.ended(t)
	if want := fmt.Sprintf("the pager (process %d) has not answered for ", info.PagerPID); !strings.Contains(s.stderr.String(), want) {
		t.Errorf("standard error:\n%swant %q", s.stderr.Bytes(), want)
	}
}

// TestServiceRefuses sockets that tasks could not connect to.
func TestServiceRefuses(t *testing.T) {
	dir := t.TempDir()
	stream, good := passed(t, "unix", filepath.Join(dir, "stream")), passed(t, "unixpacket", filepath.Join(dir, "good"))
	plain, err := os.Create(filepath.Join(dir, "plain"))
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	for _, c := range []struct {
		name  string
		files []*os.File
		args  []string
		want  string
	}{
		{"a stream", []*os.File{stream}, nil, "not of the type SOCK_SEQPACKET (ListenSequentialPacket=)"},
		{"a file", []*os.File{plain}, nil, "it is no socket"},
		{"two", []*os.File{good, stream}, nil, "2 sockets were passed on: want one"},
		{"another path", []*os.File{good}, []string{"--socket", "/elsewhere"}, "the socket that was passed on is " + filepath.Join(dir, "good")},
		{"a group", []*os.File{good}, []string{"--group", "0"}, "SocketGroup="},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := startService(t, c.files, "", 0, c.args...)
			if status := s.ended(t); status != exitUsage || !strings.Contains(s.stderr.String(), c.want) {
				t.Errorf("exit status %d, standard error %q; want %d and %q", status, s.stderr.Bytes(), exitUsage, c.want)
			}
		})
	}
}
