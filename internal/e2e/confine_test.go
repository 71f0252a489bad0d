package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/confine"
	"machpager/internal/daemon"
	"machpager/pager/emm"
	"machpager/region"
	"machpager/region/spawn"
)

func init() { tasks["confined"] = told(confinedTask) }

// opener is a manager that opens the file it is told, in the pager, and tells what came of it. It makes no object.
func opener(_ context.Context, path string, _ *os.File) (emm.Manager, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	f.Close()
	return nil, errors.New("it is open")
}

type confinedArg struct {
	Socket  string // "": start a pager
	Confine string
}

type confinedResult struct {
	Open            map[string]string // by path
	Confinement     string
	Pager, Guardian int
}

// confinedTask has the pager open files, and do everything that needs a privilege.
func confinedTask(c *conn, arg confinedArg) error {
	ctx := context.Background()
	var p *region.Pager
	var err error
	if arg.Socket == "" {
		p, err = spawn.Start(ctx, &spawn.Options{Resident: 16 << 20, Confine: arg.Confine})
	} else {
		p, err = region.Dial(ctx, arg.Socket, nil)
	}
	if err != nil {
		return err
	}
	info, err := p.Info(ctx)
	if err != nil {
		return err
	}
	res := confinedResult{Open: map[string]string{}, Confinement: info.Confinement, Pager: info.PagerPID, Guardian: info.GuardianPID}
	for _, path := range []string{"/etc/passwd", "/proc/self/root/etc/passwd", "/tmp/../etc/passwd", "/proc/self/stat"} {
		_, err := p.ObjectCreate(ctx, 4096, &region.ObjectOptions{Manager: "opener", Arg: path})
		switch {
		case err == nil:
			return errors.New("opener made an object")
		case errors.Is(err, unix.EACCES):
			res.Open[path] = "refused"
		case strings.Contains(err.Error(), "it is open"):
			res.Open[path] = "open"
		default:
			res.Open[path] = err.Error()
		}
	}
	// More and less memory, another paging file, and a page that goes there and comes back.
	for _, budget := range []int64{64 << 20, 1 << 20} {
		if err := p.SetResident(ctx, budget); err != nil {
			return err
		}
	}
	id, err := p.BackingStoreCreate(ctx, "", &region.BackingStoreOptions{Priority: 1})
	if err != nil {
		return err
	}
	if _, err := p.BackingStoreCreate(ctx, os.TempDir(), &region.BackingStoreOptions{Priority: 1, Capacity: 1 << 20, Preallocate: true}); err != nil {
		return err
	}
	r, err := p.Allocate(ctx, 4<<20, nil)
	if err != nil {
		return err
	}
	want := make([]byte, 4<<20)
	fill(want, 0, 1)
	copy(r.Bytes(), want)
	if string(r.Bytes()) != string(want) {
		return errors.New("other bytes came back")
	}
	if err := r.Close(); err != nil {
		return err
	}
	if err := p.BackingStoreDelete(ctx, id); err != nil {
		return err
	}
	if err := c.send(res); err != nil {
		return err
	}
	if err := c.await(); err != nil {
		return err
	}
	return p.Close()
}

// statusOf is a line of proc_pid_status(5).
func statusOf(t *testing.T, pid int, key string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("no %s of process %d", key, pid)
	return ""
}

// TestConfined: a confined pager opens no file by name and has no capability, its guardian two, and everything works.
func TestConfined(t *testing.T) {
	if err := confine.Have(); err != nil {
		if strings.Contains(err.Error(), "linked with cgo") {
			return // nothing of this is promised
		}
		t.Fatal(err)
	}
	socket := t.TempDir() + "/sock"
	for _, c := range []struct {
		name, confine string
		serve, want   bool
	}{
		{"spawned", daemon.ConfineAlways, false, true},
		{"served", daemon.ConfineAlways, true, true},
		{"managers of its own", daemon.ConfineAuto, false, false},
		{"switched off", daemon.ConfineNever, false, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			arg := confinedArg{Confine: c.confine}
			var server *task
			if c.serve {
				server = serveAt(t, daemon.Config{Resident: 16 << 20, Socket: socket, Confine: c.confine}, func(name string) *task { return start(t, name, nil) })
				arg.Socket = socket
			}
			k := start(t, "confined", nil)
			k.send(arg)
			var res confinedResult
			k.recv(&res)
			want := "refused"
			if !c.want {
				want = "open"
			}
			for path, got := range res.Open {
				if w := want; got != w && !(path == "/proc/self/stat" && got == "open") {
					t.Errorf("the pager opens %s: %q, want %q", path, got, w)
				}
			}
			if got := statusOf(t, res.Pager, "CapEff") == "0000000000000000" && statusOf(t, res.Pager, "CapPrm") == "0000000000000000"; got != c.want {
				t.Errorf("the pager has capabilities %s", statusOf(t, res.Pager, "CapPrm"))
			}
			const two = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_PTRACE
			if got := statusOf(t, res.Guardian, "CapPrm") == fmt.Sprintf("%016x", two); got != c.want {
				t.Errorf("the guardian has capabilities %s", statusOf(t, res.Guardian, "CapPrm"))
			}
			for _, pid := range []int{res.Pager, res.Guardian} {
				if got := statusOf(t, pid, "NoNewPrivs") == "1"; got != c.want {
					t.Errorf("process %d: no_new_privs is %v", pid, got)
				}
			}
			if none := strings.HasPrefix(res.Confinement, "none"); none == c.want {
				t.Errorf("it says %q", res.Confinement)
			}
			k.send(true)
			k.wait()
			if server != nil {
				server.send(true)
				server.wait()
				if _, err := os.Stat(socket); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the socket is still there: %v", err)
				}
			}
		})
	}
}
