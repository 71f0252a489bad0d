//go:build linux

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"machpager/internal/daemon"
	"machpager/internal/vm"
	"machpager/region"
)

func newDebug() *cobra.Command {
	return group(&cobra.Command{Use: "debug", Short: "Look into a running pager"}, newDump())
}

func newDump() *cobra.Command {
	var socket string
	var asJSON bool
	c := &cobra.Command{
		Use:   "dump",
		Short: "Print all that a pager knows of tasks, objects and pages",
		Long: `Prints what a running pager has: frames, paging space, connections, tasks and their mappings, objects with their pages by state and a map of them, and what is out:
data requests that a manager has not answered, data returns that it has not stored, and faults that wait for a frame, with their ages, oldest first. The parts
are looked at one after the other, while all goes on. For root and the user whom the pager runs as. What the JSON has may change with every version.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return withPager(c.Context(), socket, func(p *region.Pager) error {
				b, err := p.Dump(c.Context())
				if err != nil {
					return err
				}
				if asJSON {
					var out bytes.Buffer
					if err := json.Indent(&out, b, "", "\t"); err != nil {
						return fmt.Errorf("read dump: %w", err)
					}
					out.WriteByte('\n')
					_, err = out.WriteTo(c.OutOrStdout())
					return err
				}
				var d daemon.Dump
				if err := json.Unmarshal(b, &d); err != nil {
					return fmt.Errorf("read dump: %w (the pager is of another version: --json prints it as it is)", err)
				}
				return writeDump(c.OutOrStdout(), &d)
			})
		},
	}
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

func writeDump(w io.Writer, d *daemon.Dump) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	defer t.Flush()
	fmt.Fprintf(t, "pager\tprocess %d, guardian %d, machpager %s, Linux %s, tier %s, up %v, %d goroutines\n", d.PID, d.Guardian, d.Version, d.Kernel, d.Tier,
		d.Up.Round(time.Second), d.Goroutines)
	fmt.Fprintf(t, "confined\t%s\n", d.Confinement)
	fmt.Fprintf(t, "frames\t%s: %d reserved of %d bytes, %d as the kernel counts; %d wired, %d on their way out, %d wanted; files kept by tasks: %d\n", d.Frames.Kind, d.Frames.Reserved,
		d.Frames.Budget, d.Frames.Kernel, d.VM.Wired*4096, d.VM.InFlight*4096, d.VM.Wanted*4096, d.Frames.Left)
	fmt.Fprintf(t, "paging space\t%s: %d used, %d free of %d bytes\n", d.Paging.Kind, d.Paging.Used, d.Paging.Free, d.Paging.Total)
	for _, f := range d.Paging.Files {
		leaving := ""
		if f.Leaving {
			leaving = ", being removed"
		}
		fmt.Fprintf(t, "\tfile %d in %s: %d used of %d bytes, priority %d, %d errors%s\n", f.ID, f.Dir, f.Used, f.Total, f.Priority, f.Errors, leaving)
	}
	s := d.VM.Stats
	fmt.Fprintf(t, "since the start\tdeferred %d, no memory %d, foreign frames %d, extents %d, unasked %d, thrown away %d, not stored %d, strangers %d, bugs %d\n", s.Deferred, s.NoMemory,
		s.Foreign, s.Extents, s.Unasked, s.ThrownAway, s.NotStored, s.Strangers, s.Bugs)

	fmt.Fprintf(t, "\nconnections\t%d of at most %d\n", d.Limits.Sessions, d.Limits.MaxSessions)
	for _, x := range d.Sessions {
		task := "no userfaultfd"
		if x.Task != 0 {
			task = fmt.Sprintf("task %d", x.Task)
		}
		fmt.Fprintf(t, "  session %d\tprocess %d, user %d, %s, %d handles, %d mappings\n", x.ID, x.PID, x.UID, task, x.Handles, x.Mappings)
	}
	for _, x := range d.VM.Tasks {
		fmt.Fprintf(t, "\ntask %d\tprocess %d\n", x.ID, x.PID)
		for _, m := range x.Mappings {
			writeMapping(t, &m)
		}
	}
	rights := map[uint64]daemon.RightsDump{}
	for _, r := range d.Rights {
		rights[r.Object] = r
	}
	fmt.Fprintf(t, "\nobjects\t%d of at most %d\n", d.Limits.Objects, d.Limits.MaxObjects)
	for _, o := range d.VM.Objects {
		r, known := rights[o.ID]
		writeObject(t, &o, r, known)
	}
	fmt.Fprintf(t, "\nwaiting\t%d requests, returns and faults are out\n", len(d.VM.Waits))
	for _, x := range d.VM.Waits {
		who := "nobody waits for it"
		if x.Thread {
			who = "a thread waits"
			if x.PID != 0 {
				who = fmt.Sprintf("thread %d of process %d waits", x.TID, x.PID)
			}
		}
		fmt.Fprintf(t, "  %v\tobject %d, offset %d, %d bytes, page %s: for %s; %s\n", x.Age.Round(10*time.Microsecond), x.Object, x.Off, x.Size, x.Page, x.For, who)
	}
	return t.Flush()
}

func writeMapping(w io.Writer, m *vm.MappingDump) {
	how := "read-write"
	if m.ReadOnly {
		how = "read-only"
	}
	places := "not mapped by the task yet, or any more"
	if len(m.Places) > 0 {
		var at []string
		for _, p := range m.Places {
			at = append(at, fmt.Sprintf("%#x+%d", p.Address, p.Size))
		}
		places = "at " + strings.Join(at, " ")
	}
	s := &m.Stats
	fmt.Fprintf(w, "  mapping %d\tobject %d, offset %d, %d bytes, %s, %s\n", m.ID, m.Object, m.Off, m.Size, how, places)
	fmt.Fprintf(w, "\tfaults: zeros %d, stored %d, minor %d, wr-prot %d, errors %d, dropped %d; p50 %v, p99 %v, max %v\n", s.ZeroFilled, s.Stored, s.Minor, s.WriteProtect, s.Errors, s.Dropped,
		s.P50, s.P99, s.Max)
}

func writeObject(w io.Writer, o *vm.ObjectDump, r daemon.RightsDump, known bool) {
	what := "ending"
	if known {
		what = fmt.Sprintf("%s, %d rights", r.Manager, r.Rights)
		if r.Private {
			what += ", private"
		}
	}
	fmt.Fprintf(w, "  object %d\t%d bytes, pages of %d, %s, %d mappings; %d bytes in frames (%d stuck), %d stored\n", o.ID, o.Size, o.PageSize, what, o.Mappings, o.Frames*4096, o.Stuck*4096,
		r.Stored)
	if o.ResidentMin+o.ResidentMax > 0 {
		fmt.Fprintf(w, "\tresident minimum %d, maximum %d bytes\n", o.ResidentMin, o.ResidentMax)
	}
	p := &o.Pages
	fmt.Fprintf(w, "\tabsent %d, requested %d, clean %d, dirty %d, cleaning %d, evicting %d, error %d; busy %d, waited for %d, wired %d, precious %d\n", p.Absent, p.Requested, p.Clean, p.Dirty,
		p.Cleaning, p.Evicting, p.Error, p.Busy, p.Waiters, p.Wired, p.Precious)
	fmt.Fprintf(w, "\t%s\n", o.Map)
}
