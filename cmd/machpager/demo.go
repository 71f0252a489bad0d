//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"machpager/internal/daemon"
	"machpager/internal/demo"
)

func newDemo() *cobra.Command {
	return group(&cobra.Command{Use: "demo", Short: "See the pager at work"}, newShare(), newSort())
}

func newShare() *cobra.Command {
	var o demo.ShareOptions
	var asJSON bool
	c := &cobra.Command{
		Use:   "share [FILE]",
		Short: "Two processes share a file's contents through a memory object",
		Long: `Starts a pager (or uses the one at --socket), a writer and a reader. The writer creates a memory object, maps it, and copies FILE into it by
touching memory; the reader maps the same object by its port and computes SHA-256 over its own mapping. Then everything is paged out, and
the reader hashes again. FILE is this program itself if none is given.

Faults are counted by the pager: pages answered with zeros, with stored contents, pages that were in memory (minor) and first writes to clean
pages (wr-prot). A fault's time is what the thread sees, also where the kernel
answers alone (the first write to a page that the pager made writable ahead). A line of signs shows the object's pages after each step.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.File = args[0]
			}
			if !asJSON {
				o.Out, o.Progress = c.OutOrStdout(), isTerminal(c.OutOrStdout())
			}
			if o.Socket != "" { // a better error than that of the first process that dials
				p, err := dial(c.Context(), o.Socket)
				if err != nil {
					return err
				}
				p.Close()
			}
			r, err := demo.Share(c.Context(), &o)
			if asJSON && r != nil {
				if werr := writeJSON(c.OutOrStdout(), r); err == nil {
					err = werr
				}
			}
			return err
		},
	}
	c.Flags().StringVar(&o.Socket, "socket", "", "use the pager at this socket (default: start one)")
	jsonFlag(c, &asJSON)
	return c
}

func newSort() *cobra.Command {
	var o demo.SortOptions
	var asJSON bool
	total, resident := size(0), size(0)
	c := &cobra.Command{
		Use:   "sort [FILE]",
		Short: "Sort more than the pager may keep in memory",
		Long: `Sorts the records of FILE, or generated ones, in two regions that are together much larger than the memory the pager may use: runs that fit are
sorted from one region into the other, and merged back. Then it checks the order, a checksum of all records that does not depend on their order, and, where
there is memory for it, every byte against the same sort in plain memory. FILE is only read.

Records are 100 bytes, of which the first 10 are the key, as in the sort benchmark; --lines sorts lines of text. Counts are the pager's. What is resident is
counted by the kernel, again and again while the sort runs, and held against the budget. A line of signs shows each region's pages after each step.

Sizes are bytes, or have a suffix K, M, G or T (powers of 1024). Exit status 5 if anything differs, or the limit did not hold.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.File = args[0]
			}
			for _, x := range []struct{ name, other string }{{"size", "FILE"}, {"resident", "socket"}, {"dir", "socket"}, {"record", "lines"}, {"key", "lines"}} {
				given := c.Flags().Changed(x.other)
				if x.other == "FILE" {
					given = o.File != ""
				} else {
					x.other = "--" + x.other
				}
				if given && c.Flags().Changed(x.name) {
					return usageError{fmt.Errorf("--%s and %s exclude each other (see machpager demo sort --help)", x.name, x.other)}
				}
			}
			o.Size, o.Resident = int64(total), int64(resident)
			if err := (&daemon.Config{Resident: o.Resident}).Check(); err != nil {
				return usageError{fmt.Errorf("--resident: %w (see machpager demo sort --help)", err)}
			}
			if !asJSON {
				o.Out, o.Progress = c.OutOrStdout(), isTerminal(c.OutOrStdout())
			}
			if o.Socket != "" {
				p, err := dial(c.Context(), o.Socket)
				if err != nil {
					return err
				}
				p.Close()
			}
			r, err := demo.Sort(c.Context(), &o)
			if asJSON && r != nil && (err == nil || errors.Is(err, demo.ErrDiffers) || errors.Is(err, demo.ErrOverBudget)) {
				if werr := writeJSON(c.OutOrStdout(), r); err == nil {
					err = werr
				}
			}
			return err
		},
	}
	f := c.Flags()
	f.Var(&total, "size", "bytes to generate (default 1G)")
	f.Var(&resident, "resident", "memory that the pager may use (default 64M)")
	f.IntVar(&o.Record, "record", 0, "bytes of a record (default 100)")
	f.IntVar(&o.Key, "key", 0, "bytes of its key, at its beginning (default 10)")
	f.BoolVar(&o.Lines, "lines", false, "sort lines of text")
	f.IntVar(&o.Workers, "workers", 0, "goroutines (default one for each CPU)")
	f.BoolVar(&o.NoPlain, "no-plain", false, "do not compare with a sort in plain memory")
	f.StringVar(&o.Dir, "dir", "", "directory of the paging file, which has no name in it (default $TMPDIR)")
	f.StringVar(&o.Socket, "socket", "", "use the pager at this socket (default: start one)")
	jsonFlag(c, &asJSON)
	return c
}

// isTerminal reports whether w is one.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}
