//go:build linux

package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/region"
	"machpager/region/spawn"
)

// maxSocketPath is how long the path of a unix socket can be, in bytes (unix(7)).
const maxSocketPath = len(unix.RawSockaddrUnix{}.Path) - 1

func newServe() *cobra.Command {
	o := spawn.ServeOptions{Config: daemon.Config{Socket: region.DefaultSocket, Store: daemon.StoreTiered}}
	resident, compressed, capacity, userSpace, taskMapped, userResident, userPaging := size(0), size(0), size(0), size(0), size(0), size(0), size(0)
	var grace time.Duration
	var standby bool
	c := &cobra.Command{
		Use:   "serve",
		Short: "Run a pager for everybody who may open its socket",
		Long: `Runs a pager; this process is its guardian. Whoever may connect to the socket may use it: the user who runs it, and with --group the
members of that group. It ends in order on SIGTERM or SIGINT: it takes no more tasks and waits for those there are; a second signal ends the waiting.

Under systemd it says when it is ready and when it ends (Type=notify), takes the socket of a socket unit (ListenSequentialPacket=), and with WatchdogSec= looks whether
the pager answers: one that does not is ended. Units are in contrib/systemd.

Sizes are bytes, or have a suffix K, M, G or T (powers of 1024).`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if n := len(o.Socket); n == 0 || n > maxSocketPath {
				return usageError{fmt.Errorf("--socket %q: want a path of 1 to %d bytes (see machpager serve --help)", o.Socket, maxSocketPath)}
			}
			if grace < 0 {
				return usageError{fmt.Errorf("--grace %v: want a time that is not negative (see machpager serve --help)", grace)}
			}
			m, err := newManager(c.Flags().Changed, &o)
			if err != nil {
				return err
			}
			o.Resident, o.Compressed, o.Capacity, o.Grace = int64(resident), int64(compressed), int64(capacity), grace
			o.NoStandby = !standby
			o.Quotas.UserSpace, o.Quotas.TaskMapped = int64(userSpace), int64(taskMapped)
			o.Quotas.UserResident, o.Quotas.UserPaging = int64(userResident), int64(userPaging)
			if err := o.Check(); err != nil {
				return usageError{fmt.Errorf("%w (see machpager serve --help)", err)}
			}
			o.Ready = func(pid int) {
				fmt.Fprintf(c.OutOrStdout(), "the pager (process %d) listens at %s\n", pid, o.Socket)
				m.ready(pid)
			}
			defer m.watch(c.Context(), o.Socket)()
			// Signals are Serve's own to count.
			return spawn.Serve(context.WithoutCancel(c.Context()), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.Socket, "socket", o.Socket, "listen here; missing directories of the path are made")
	f.Var(&resident, "resident", "memory that all objects together may occupy (default half of what is available)")
	f.StringVar(&o.Store, "store", o.Store, "where contents go that are paged out: file, memory, compressed (in memory), or tiered (compressed in memory, then a file)")
	f.Var(&compressed, "compressed", "memory that compressed contents may take (default of tiered half of --resident, else what there is)")
	f.StringVar(&o.Dir, "dir", "", "directory of the paging file, which has no name in it (default $TMPDIR)")
	f.Var(&capacity, "capacity", "paging space (default what there is)")
	f.StringVar(&o.Group, "group", "", "name or number of a group that may use the socket: its mode is 0660 then, else 0600")
	f.StringVar(&o.Confine, "confine", daemon.ConfineAuto, "give up capabilities and files by name (landlock): auto (as far as the kernel can), always, or never")
	f.IntVar(&o.Quotas.UserConnections, "user-connections", 0, "connections that one user may have (default three quarters of all)")
	f.IntVar(&o.Quotas.UserObjects, "user-objects", 0, "objects that one user may have made (default three quarters of all)")
	f.Var(&userSpace, "user-space", "size of all objects that one user may have made: what they can take of memory and paging space together (default no limit)")
	f.Var(&userResident, "user-resident", "memory that the objects which one user has made may occupy together; beyond, they make room among their own (default no limit)")
	f.Var(&userPaging, "user-paging", "paging space that they may take together; what is beyond stays in memory, so --user-resident is needed too (default no limit)")
	f.IntVar(&o.Quotas.TaskFaults, "task-faults", 0, "data requests that may be out at once for the faults of one connection; further faults wait (default 256)")
	f.Var(&taskMapped, "task-mapped", "size of all mappings of one connection (default no limit)")
	f.IntVar(&o.Quotas.TaskRequests, "task-requests", 0, "requests that one connection may make in a second; what comes faster waits (default 20000)")
	f.BoolVar(&o.GiveDevice, "hand-out-userfaultfd", false,
		"give tasks an open /dev/userfaultfd: full userfaultfd for whoever may use the socket, which the sysctl vm.unprivileged_userfaultfd withholds")
	f.DurationVar(&grace, "grace", 10*time.Second, "how long tasks may take to leave after the first signal")
	f.IntVar(&o.Restarts, "restarts", 0, "deaths of the pager in a row, each within 10 s of its start, that are answered with a new one on what it left (0: 5, -1: none)")
	f.BoolVar(&standby, "standby", true, "start the next pager beside the one that serves, to take its place at once when it dies; it takes some MiB")
	logFlags(c, &o.Level, &o.JSON)
	return c
}

// size is a flag with a number of bytes.
type size int64

func (s *size) String() string {
	if *s == 0 {
		return ""
	}
	return strconv.FormatInt(int64(*s), 10)
}

func (s *size) Type() string { return "size" }

func (s *size) Set(text string) error {
	digits, shift := text, 0
	if n := len(text); n > 0 {
		if i := strings.IndexByte("KMGT", text[n-1]&^0x20); i >= 0 {
			digits, shift = text[:n-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n <= 0 || n<<shift>>shift != n {
		return fmt.Errorf("%q: want a positive number of bytes, perhaps with a suffix K, M, G or T", text)
	}
	*s = size(n << shift)
	return nil
}
