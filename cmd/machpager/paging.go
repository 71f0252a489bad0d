//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"machpager/region"
)

func newPaging() *cobra.Command {
	return group(&cobra.Command{
		Use:   "paging",
		Short: "List, add and remove the paging files of a running pager",
		Long: `Lists, adds and removes the files in which a running pager keeps what it has paged out, while tasks go on (default_pager_backing_store_create, _delete, _info). The
pager's paging space must be of the kind file or tiered (serve --store). The files have no names, and are gone with the pager.`,
	}, newPagingList(), newPagingAdd(), newPagingRemove())
}

func newPagingList() *cobra.Command {
	return tell(&cobra.Command{
		Use:   "ls",
		Short: "List the paging files",
		Long: `Lists the paging files of a pager, by number, in bytes. READ and WRITTEN are since the file was added; ERRORS are operations that failed, those included that
found the file system full.`,
	}, (*region.Pager).BackingStores, writePaging)
}

// pagingResult is the file that add has added, or remove has removed.
type pagingResult struct {
	ID int `json:"id"`
}

func newPagingAdd() *cobra.Command {
	var socket string
	var asJSON bool
	var o region.BackingStoreOptions
	capacity := size(0)
	c := &cobra.Command{
		Use:   "add [DIR]",
		Short: "Add a paging file",
		Long: `Adds a paging file in the directory DIR, or where the pager's first one is, and prints its number. Pages that are paged out go there from then on, too. For root and the
user whom the pager runs as.

Sizes are bytes, or have a suffix K, M, G or T (powers of 1024).`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			o.Capacity = int64(capacity)
			if o.Preallocate && o.Capacity == 0 {
				return usageError{fmt.Errorf("--preallocate: give --capacity too (see %s --help)", c.CommandPath())}
			}
			dir := ""
			if len(args) == 1 {
				var err error
				if dir, err = directory(args[0]); err != nil {
					return err
				}
			}
			return withPager(c.Context(), socket, func(p *region.Pager) error {
				id, err := p.BackingStoreCreate(c.Context(), dir, &o)
				if err != nil {
					return err
				}
				if asJSON {
					return writeJSON(c.OutOrStdout(), pagingResult{id})
				}
				_, err = fmt.Fprintf(c.OutOrStdout(), "paging file %d\n", id)
				return err
			})
		},
	}
	c.Flags().Var(&capacity, "capacity", "how much it may hold (default what its file system has)")
	c.Flags().Int32Var(&o.Priority, "priority", 0, "files of a higher priority are used first, those of the same in turn")
	c.Flags().BoolVar(&o.Preallocate, "preallocate", false, "take the space for all of --capacity now")
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

// directory makes a path absolute that must be a directory; whether the pager may use it is the pager's to say.
func directory(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", err
	}
	if st, err := os.Stat(abs); err == nil && !st.IsDir() {
		return "", usageError{fmt.Errorf("%s is no directory", path)}
	}
	return abs, nil
}

func newPagingRemove() *cobra.Command {
	var socket string
	var asJSON bool
	c := &cobra.Command{
		Use:   "remove NUMBER",
		Short: "Remove a paging file",
		Long: `Moves the contents of a paging file to the others, and closes it. If they have no room, or this command is interrupted, the file stays in use; nothing is lost. For root and the
user whom the pager runs as.`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			id, err := strconv.ParseUint(args[0], 10, 8)
			if err != nil || id == 0 {
				return usageError{fmt.Errorf("%q: want the number of a paging file (see machpager paging ls)", args[0])}
			}
			return withPager(c.Context(), socket, func(p *region.Pager) error {
				if err := p.BackingStoreDelete(c.Context(), int(id)); err != nil {
					return err
				}
				if asJSON {
					return writeJSON(c.OutOrStdout(), pagingResult{int(id)})
				}
				_, err := fmt.Fprintf(c.OutOrStdout(), "paging file %d removed\n", id)
				return err
			})
		},
	}
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

// withPager calls f with the pager at socket.
func withPager(ctx context.Context, socket string, f func(p *region.Pager) error) error {
	p, err := dial(ctx, socket)
	if err != nil {
		return err
	}
	defer p.Close()
	return f(p)
}

func writePaging(w io.Writer, list []region.BackingStore) error {
	t := tabwriter.NewWriter(w, 0, 8, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "FILE\tPRIORITY\tSIZE\tUSED\tFREE\tREAD\tWRITTEN\tERRORS\t  DIRECTORY")
	for _, f := range list {
		dir := f.Dir
		if f.Leaving {
			dir += " (being removed)"
		}
		fmt.Fprintf(t, "%d\t%d\t%d\t%d\t%d\t%d\t%d\t%d\t  %s\n", f.ID, f.Priority, f.Total, f.Used, f.Free, f.Read, f.Written, f.ReadErrors+f.WriteErrors, dir)
	}
	return t.Flush()
}
