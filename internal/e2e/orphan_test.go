package e2e

import (
	"context"
	"syscall"
	"testing"

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
