//go:build linux

package main

import (
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"machpager/region"
)

// errUnsound is a pager with a broken invariant.
var errUnsound = errors.New("the pager is not as it should be")

func newCheck() *cobra.Command {
	var socket string
	var asJSON bool
	c := &cobra.Command{
		Use:   "check",
		Short: "Check the invariants of a running pager",
		Long: `Checks a running pager, while tasks go on: the page tables against the files that resident pages are in, the counts of frames against the kernel's, every page in
paging space against its checksum, the page maps against each other and against what paging space has in use. What looks wrong in passing is looked at again by the
page's own rules before it is reported. Everything that is stored is read: that may take long, and makes room for what somebody waits for. For root and the user whom the
pager runs as.

Exit status 0 if all is as it should be, 1 if not, or if it could not be checked.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			return withPager(c.Context(), socket, func(p *region.Pager) error {
				r, err := p.Check(c.Context())
				if err != nil {
					return err
				}
				if asJSON {
					err = writeJSON(c.OutOrStdout(), r)
				} else {
					err = writeCheck(c.OutOrStdout(), r)
				}
				if err == nil && len(r.Problems) > 0 {
					err = fmt.Errorf("%w: %d problems", errUnsound, len(r.Problems)+r.More)
				}
				return err
			})
		},
	}
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

func writeCheck(w io.Writer, r *region.CheckReport) error {
	for _, p := range r.Problems {
		where := p.Where
		if p.Object >= 0 {
			where += fmt.Sprintf(", object %d", p.Object)
		}
		if p.Off >= 0 {
			where += fmt.Sprintf(", offset %d", p.Off)
		}
		fmt.Fprintf(w, "%s: %s\n", where, p.What)
	}
	if r.More > 0 {
		fmt.Fprintf(w, "and %d more\n", r.More)
	}
	fmt.Fprintf(w, "%d resident pages of %d objects, %d stored pages of %d (%d bytes read), %d slots, %d of them shared: %s\n", r.VM.Resident, r.VM.Objects, r.Paging.Pages,
		r.Paging.Objects, r.Paging.Bytes, r.Paging.Slots, r.Paging.Shared, r.Took.Round(time.Millisecond))
	if n := r.VM.Empty; n > 0 {
		fmt.Fprintf(w, "%d dirty pages have no frame and read as zeros: a task has thrown them away, or they were never written\n", n)
	}
	if n := r.VM.Unsettled; n > 0 {
		fmt.Fprintf(w, "%d pages were being worked on whenever they were looked at\n", n)
	}
	if n := r.VM.Uncounted + r.Paging.Uncounted; n > 0 {
		fmt.Fprintf(w, "%d counts were not compared: they changed all the time (check again when less goes on)\n", n)
	}
	verdict := "all is as it should be"
	if n := len(r.Problems) + r.More; n > 0 {
		verdict = fmt.Sprintf("%d problems", n)
	}
	_, err := fmt.Fprintln(w, verdict)
	return err
}
