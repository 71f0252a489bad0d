package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"machpager/internal/ipc"
	"machpager/pager/emm"
	"machpager/region"
	"machpager/uffd"
)

func init() { tasks["rights"] = using(rightsTask) }

// refused expects an error.
func refused(what string, err, want error) error {
	if !errors.Is(err, want) {
		return fmt.Errorf("%s: %v, want %v", what, err, want)
	}
	return nil
}

// rightsTask shares an object with itself, by a second connection that has only what it is given.
func rightsTask(ctx context.Context, c *conn, owner *region.Pager, at At) error {
	other, err := at.open(ctx)
	if err != nil {
		return err
	}
	const size = 64 * 4096
	o, r, err := create(ctx, owner, size, nil, nil)
	if err != nil {
		return err
	}
	want := make([]byte, size)
	fill(want, 0, 7)
	copy(r.Bytes(), want)

	port, err := o.Right(ctx, &region.RightOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	fixed, err := o.Right(ctx, &region.RightOptions{NoResize: true})
	if err != nil {
		return err
	}
	if _, err := o.Right(ctx, nil); err == nil {
		return errors.New("a right that gives all")
	}

	// No right to resize.
	f, err := other.ObjectOpen(ctx, fixed)
	if err != nil {
		return err
	}
	if f.Port() != fixed {
		return errors.New("who opened a lesser port is told another")
	}
	if err := refused("resize without the right", f.SetSize(ctx, 4096), emm.ProtectionFailure); err != nil {
		return err
	}
	w, err := f.Map(ctx, nil)
	if err != nil {
		return err
	}
	w.Bytes()[5]++
	want[5]++

	// Read-only.
	ro, err := other.ObjectOpen(ctx, port)
	if err != nil {
		return err
	}
	_, err = ro.Map(ctx, nil)
	if err := refused("map writable by a read-only right", err, emm.ProtectionFailure); err != nil {
		return err
	}
	if err := refused("resize by a read-only right", ro.SetSize(ctx, 4096), emm.ProtectionFailure); err != nil {
		return err
	}
	v, err := ro.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	if !bytes.Equal(v.Bytes(), want) {
		return errors.New("the reader sees other bytes")
	}
	if err := refused("discard", v.Discard(ctx, 0, 4096), emm.ProtectionFailure); err != nil {
		return err
	}
	if err := refused("revoke by who has less", ro.Revoke(ctx, fixed), emm.NoAccess); err != nil {
		return err
	}
	// A right made of a lesser one gives no more.
	again, err := ro.Right(ctx, &region.RightOptions{NoResize: true})
	if err != nil {
		return err
	}
	third, err := other.ObjectOpen(ctx, again)
	if err != nil {
		return err
	}
	_, err = third.Map(ctx, nil)
	if err := refused("map writable by a right made of a read-only one", err, emm.ProtectionFailure); err != nil {
		return err
	}
	if err := readOnlyFile(at.Socket, port); err != nil {
		return err
	}
	if err := c.send(true); err != nil { // the pager may be killed now
		return err
	}
	if err := c.await(); err != nil {
		return err
	}

	_, err = ro.Map(ctx, nil)
	if err := refused("map writable, after a restart", err, emm.ProtectionFailure); err != nil {
		return err
	}
	// Taken back.
	if err := o.Revoke(ctx, port); err != nil {
		return err
	}
	if err := refused("revoke twice", o.Revoke(ctx, port), emm.InvalidArgument); err != nil {
		return err
	}
	if err := refused("revoke the port itself", o.Revoke(ctx, o.Port()), emm.InvalidArgument); err != nil {
		return err
	}
	_, err = other.ObjectOpen(ctx, port)
	if err := refused("open a port that was taken back", err, emm.InvalidArgument); err != nil {
		return err
	}
	_, err = ro.Map(ctx, &region.MapOptions{ReadOnly: true})
	if err := refused("map by a right that was taken back", err, emm.NoAccess); err != nil {
		return err
	}
	var fault *region.FaultError
	for _, p := range []int{0, 17, 63} {
		if err := region.Guard(func() error { return fmt.Errorf("it reads %d", v.Bytes()[p*4096]) }); !errors.As(err, &fault) {
			return fmt.Errorf("touch page %d of a mapping whose right was taken back: %w", p, err)
		}
	}
	// Nobody else is affected.
	if !bytes.Equal(r.Bytes(), want) || !bytes.Equal(w.Bytes(), want) {
		return errors.New("the others see other bytes")
	}
	if _, err := third.Map(ctx, &region.MapOptions{ReadOnly: true}); err != nil {
		return err
	}
	if err := v.Close(); err != nil {
		return err
	}
	for i := 0; ; i++ {
		if _, err := o.Right(ctx, &region.RightOptions{NoResize: true}); errors.Is(err, emm.ResourceShortage) && i > 8 {
			break
		} else if err != nil || i > 100 {
			return fmt.Errorf("right %d: %w", i, err)
		}
	}
	return errors.Join(other.Close(), owner.Close())
}

// readOnlyFile has the file of a read-only mapping, by hand, and tries to write to it.
func readOnlyFile(socket string, port emm.Port) error {
	v, err := newVillain(socket, uffd.RequiredFeatures)
	if err != nil {
		return err
	}
	defer v.l.Close()
	m, err := v.call(ipc.TypeObjectOpen, ipc.ObjectOpen{Port: port})
	if err != nil {
		return err
	}
	o, _, err := ipc.Decode[ipc.ObjectReply](m.Body)
	m.Close()
	if err != nil {
		return err
	}
	if m, err := v.call(ipc.TypeMap, ipc.Map{Handle: o.Handle, Size: 4096}); err == nil {
		m.Close()
		return errors.New("a writable mapping by a read-only right")
	}
	if m, err = v.call(ipc.TypeMap, ipc.Map{Handle: o.Handle, Size: 4096, Flags: ipc.MapReadOnly}); err != nil {
		return err
	}
	defer m.Close()
	fd := m.FD(0)
	if _, err := unix.Pwrite(fd, []byte("x"), 0); err == nil {
		return errors.New("the file of a read-only mapping can be written")
	}
	if err := unix.Ftruncate(fd, 0); err == nil {
		return errors.New("the file of a read-only mapping can be cut short")
	}
	if err := unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096); err == nil {
		return errors.New("the file of a read-only mapping can be punched")
	}
	if _, err := mmap(fd, 4096, unix.MAP_SHARED); err == nil {
		return errors.New("the file of a read-only mapping can be mapped writable")
	}
	return nil
}

// TestRights: lesser rights give what they say and no more, also after the pager was killed, and can be taken back.
func TestRights(t *testing.T) {
	socket, _ := pagerAt(t, pagerOptions{Restarts: restarts})
	k := start(t, "rights", nil)
	k.send(At{socket})
	k.ready()
	pid := int(info(t, socket).PagerPID)
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	k.send(true)
	k.wait()
	if now := int(info(t, socket).PagerPID); now == pid {
		t.Error("the pager was not killed")
	}
}
