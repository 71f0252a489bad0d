package failpoint

import (
	"errors"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	if os.Args[0] == "failpoint-child" {
		if Arm(os.Args[1]) != nil {
			os.Exit(3)
		}
		for range 3 {
			Here("there.step")
			Here("here.step")
			os.Stdout.WriteString(".")
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func TestActions(t *testing.T) {
	for _, c := range []struct {
		spec, out string
		killed    bool
	}{
		{"", "...", false},
		{"here.step=2:kill", ".", true},
		{"here.step", "", true},
		{"here.step=4", "...", false},
		{"nowhere.step=1:kill,there.step=3", "..", true},
		{"here.step=1:count", "...", false},
		{"here.step=1:sleep1ms", "...", false},
	} {
		cmd := exec.Command("/proc/self/exe", c.spec)
		cmd.Args[0] = "failpoint-child"
		out, err := cmd.Output()
		killed := false
		if x, ok := err.(*exec.ExitError); ok {
			killed = x.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
		} else if err != nil {
			t.Fatal(err)
		}
		if string(out) != c.out || killed != c.killed {
			t.Errorf("%q: wrote %q, killed %v; want %q, %v", c.spec, out, killed, c.out, c.killed)
		}
	}
}

func TestArm(t *testing.T) {
	defer Arm("")
	for _, bad := range []string{"=1", "a=x", "a=-1", "a=1:jump", "a=1:sleep", ","} {
		if err := Arm(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	if err := Arm("a.b=2:sleep30ms"); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	Here("a.b")
	if d := time.Since(begin); d > 20*time.Millisecond {
		t.Errorf("the first meeting took %v", d)
	}
	Here("a.b")
	if d := time.Since(begin); d < 30*time.Millisecond {
		t.Errorf("the second meeting took %v", d)
	}
	if n := Hits()["a.b"]; n != 2 {
		t.Errorf("%d hits, want 2", n)
	}
}

func TestFail(t *testing.T) {
	defer Arm("")
	if err := Fail("read"); err != nil {
		t.Errorf("nothing is armed: %v", err)
	}
	if err := Arm("read=3:eio,write=1:enospc,other=1:count"); err != nil {
		t.Fatal(err)
	}
	for i := 1; i <= 9; i++ {
		if err := Fail("read"); (err == unix.EIO) != (i%3 == 0) || err != nil && err != unix.EIO {
			t.Errorf("read %d: %v", i, err)
		}
		if err := Fail("write"); err != unix.ENOSPC {
			t.Errorf("write %d: %v", i, err)
		}
		if err := errors.Join(Fail("other"), Fail("not armed")); err != nil {
			t.Error(err)
		}
	}
	if n := Hits()["read"]; n != 9 {
		t.Errorf("%d hits, want 9", n)
	}
}

func BenchmarkHere(b *testing.B) {
	for b.Loop() {
		Here("not.armed")
	}
}
