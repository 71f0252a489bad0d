//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"machpager/region"
)

// tell completes a command that asks the pager at --socket, and writes the answer as text or JSON.
func tell[T any](c *cobra.Command, ask func(*region.Pager, context.Context) (T, error), write func(io.Writer, T) error) *cobra.Command {
	var socket string
	var asJSON bool
	c.Args = cobra.NoArgs
	c.RunE = func(c *cobra.Command, _ []string) error {
		return withPager(c.Context(), socket, func(p *region.Pager) error {
			answer, err := ask(p, c.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(c.OutOrStdout(), answer)
			}
			return write(c.OutOrStdout(), answer)
		})
	}
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

func newList() *cobra.Command {
	return tell(&cobra.Command{
		Use:   "ls",
		Short: "List the memory objects of a pager",
		Long:  "Lists the memory objects of a pager (default_pager_objects): sizes in bytes. It lists no ports: those are capabilities.",
	}, (*region.Pager).Objects, writeObjects)
}

func writeObjects(w io.Writer, list []region.ObjectInfo) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "OBJECT\tSIZE\tPAGE\tRESIDENT\tSTORED\tMAPPINGS\t")
	for _, o := range list {
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%d\t%d\t\n", o.ID, o.Size, o.PageSize, o.Resident, o.Stored, o.Mappings)
	}
	return t.Flush()
}

func newInfo() *cobra.Command {
	return tell(&cobra.Command{
		Use:   "info",
		Short: "Tell how a pager is doing, and what it is permitted to do",
		Long: `Tells what a pager has in memory and in paging space (default_pager_info), in bytes, and its privilege tier:

  A  root, or CAP_SYS_PTRACE and CAP_SYS_ADMIN: everything
  B  vm.unprivileged_userfaultfd=1, or permission on /dev/userfaultfd: everything, without a tmpfs that Linux does not swap
  C  neither: plain touches only; system calls on missing memory fail with EFAULT`,
	}, (*region.Pager).Info, writeInfo)
}

func writeInfo(w io.Writer, i region.Info) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	row := func(name string, value any) { fmt.Fprintf(t, "%s\t%v\n", name, value) }
	amount := func(n int64) string { // -1: unknown
		if n < 0 {
			return "-"
		}
		return strconv.FormatInt(n, 10)
	}
	row("machpager", i.Version)
	row("linux", i.Kernel)
	row("tier", i.Tier+": "+i.TierText)
	row("confinement", i.Confinement)
	row("quotas", i.Quotas)
	row("pager", i.PagerPID)
	row("guardian", i.GuardianPID)
	row("frames", i.Frames)
	row("budget", amount(i.Budget))
	row("resident", amount(i.Resident))
	row("resident (kernel)", amount(i.KernelResident))
	row("paging space", amount(i.PagingTotal))
	row("paging space free", amount(i.PagingFree))
	row("page sizes", fmt.Sprintf("%d to %d", i.MinPageSize, i.MaxPageSize))
	row("tasks", i.Tasks)
	row("objects", i.Objects)
	row("mappings", i.Mappings)
	return t.Flush()
}
