package e2e

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"machpager/region"
)

// TestGuardianKilled: a served pager whose guardian was killed goes on for the tasks that are there, takes no others, and ends with the last.
func TestGuardianKilled(t *testing.T) {
	ctx := context.Background()
	socket, guardian := pagerAt(t, pagerOptions{Served: true, Memory: true})
	p := dial(t, socket)
	defer p.Close()
	info := infoOf(t, p)
	pager := info.PagerPID
	t.Cleanup(func() { syscall.Kill(pager, syscall.SIGKILL) })
	guardian.cmd.Process.Kill()
	<-guardian.exited
	eventually(t, patience, "the pager refuses new tasks", func() bool {
		other, err := region.Dial(ctx, socket, nil)
		if err == nil {
			other.Close()
		}
		return err != nil
	})
	if info, err := p.Info(ctx); err != nil || info.PagerPID != pager || info.GuardianPID != 0 {
		t.Errorf("pager %d, guardian %d, %v; want pager %d and no guardian", info.PagerPID, info.GuardianPID, err, pager)
	}
	if !alive(pager) {
		t.Error("the pager has ended before its last task has left")
	}
	p.Close()
	eventually(t, patience, "the pager ends", func() bool { return !alive(pager) })
}

// marked are the living processes that have a variable in their environment, by command.
func marked(variable string) map[int]string {
	m := map[int]string{}
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, f := range files {
		b, _ := os.ReadFile(f)
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
		if bytes.Contains(b, []byte(variable+"\x00")) && alive(pid) {
			m[pid] = cmdline(pid)
		}
	}
	return m
}

// TestNobodyStays kills a program, or the guardian of its pager, around the instant at which the standby is started: no process is left, wherever in its start it was.
func TestNobodyStays(t *testing.T) {
	rounds := 8
	if d := soak(0); d > 0 {
		rounds = max(rounds, int(d/time.Second))
	}
	for i := range rounds {
		victim := []string{"program", "guardian"}[i%2]
		t.Run(fmt.Sprintf("%s/%d", victim, i), func(t *testing.T) {
			t.Parallel()
			mark := fmt.Sprintf("E2E_MARK=%d.%d", os.Getpid(), i)
			k := start(t, "orphan", func(c *exec.Cmd) { c.Env = append(os.Environ(), mark) })
			k.send(orphanArg{})
			k.ready()
			time.Sleep(time.Duration(rand.Int64N(int64(400 * time.Millisecond))))
			if victim == "guardian" {
				for pid, command := range marked(mark) {
					if strings.HasPrefix(command, "machpager-guardian") {
						kill(t, pid)
					}
				}
				eventually(t, 5*time.Second, "the guardian has gone, and the standby", func() bool {
					pagers := 0
					for _, command := range marked(mark) {
						if strings.HasPrefix(command, "machpager-guardian") {
							return false
						}
						if strings.HasPrefix(command, "machpager-pager") {
							pagers++
						}
					}
					return pagers <= 1
				})
			}
			k.cmd.Process.Kill()
			<-k.exited
			eventually(t, 5*time.Second, "all have gone", func() bool { return len(marked(mark)) == 0 })
		})
	}
}
