//go:build linux

package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"machpager/bench"
)

func newBench() *cobra.Command {
	return group(&cobra.Command{Use: "bench", Short: "Measure"}, newBenchFault(), newBenchPaging())
}

func newBenchFault() *cobra.Command {
	var o bench.FaultOptions
	var out benchOutput
	c := &cobra.Command{
		Use:   "fault",
		Short: "What a page fault costs, beside a C floor and the kernel's own",
		Long: `Measures single-page latencies and streams for machpager, for the least C program that answers faults by the same ioctls (compiled on
the spot: gcc is needed), for userfaultfd-go's mapper (in a binary built with cgo) and for the kernel's own faults, all in one run.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Progress = c.ErrOrStderr()
			r, err := bench.Fault(c.Context(), &o)
			if err != nil {
				return err
			}
			return out.write(c, r)
		},
	}
	f := c.Flags()
	f.StringSliceVar(&o.Systems, "systems", nil, "which systems, by name (default: all)")
	f.IntVar(&o.Rounds, "rounds", 0, "rounds that count (default 9)")
	f.IntVar(&o.Pages, "pages", 0, "pages touched in a round for latencies (default 1000)")
	f.Int64Var(&o.Stream, "stream", 0, "bytes touched in a round for throughput (default 64 MiB)")
	f.IntSliceVar(&o.Clusters, "clusters", nil, "pages per answer (default 1,4,16,64,512)")
	f.Int64Var(&o.Warm, "warm", 0, "bytes of memory to touch beforehand, at most half of what is available, negative for none (default 8 GiB)")
	f.StringVar(&o.Dir, "dir", "", "where the files lie (default $TMPDIR)")
	out.flags(c)
	return c
}

func newBenchPaging() *cobra.Command {
	var o bench.PagingOptions
	var out benchOutput
	var works []string
	budget := size(0)
	c := &cobra.Command{
		Use:   "paging",
		Short: "Work on more memory than may be resident, beside mmap of a file",
		Long: `Measures reading, writing and both in sequence and at random, sorting, breadth-first search in a graph, and a hot set beside a scan, in
memory of up to eight times what may be resident: for each kind of paging space, and for a mapped file in a memory control group of the same size
(where groups can be made: root, as a rule). All contents are checked.

Exit status 5 if a byte was wrong, also without --check.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			o.Progress, o.Budget = c.ErrOrStderr(), int64(budget)
			for _, w := range works {
				o.Works = append(o.Works, bench.Work(w))
			}
			r, err := bench.Paging(c.Context(), &o)
			if err != nil {
				return err
			}
			return out.write(c, r)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.Systems, "system", nil, "one of the systems, by name; may be repeated (default: all)")
	f.StringArrayVar(&works, "work", nil, "one of the kinds of work, by name; may be repeated (default: all)")
	f.Var(&budget, "resident", "memory that may be resident (default 16M)")
	f.Float64Var(&o.Scale, "scale", 0, "multiply what may be resident and all sizes by this (default 1)")
	f.IntSliceVar(&o.Times, "times", nil, "sizes of the memory, by what may be resident (default 1,2,4,8)")
	f.IntVar(&o.Rounds, "rounds", 0, "rounds (default 3)")
	f.StringVar(&o.Dir, "dir", "", "where the files lie (default $TMPDIR)")
	out.flags(c)
	return c
}

// benchReport is what a benchmark measured.
type benchReport interface {
	WriteJSON(io.Writer) error
	WriteTable(io.Writer) error
	WriteSVG(io.Writer) error
	Met() bool
}

// benchOutput says in which forms a report is wanted.
type benchOutput struct {
	json, check bool
	plot        string // name of a file; "": none
}

func (o *benchOutput) flags(c *cobra.Command) {
	c.Flags().StringVar(&o.plot, "svg", "", "write a plot to this file")
	c.Flags().BoolVar(&o.check, "check", false, "end with status 5 if a goal was missed")
	jsonFlag(c, &o.json)
}

func (o *benchOutput) write(c *cobra.Command, r benchReport) (err error) {
	if o.plot != "" {
		if err := writePlot(o.plot, r); err != nil {
			return err
		}
	}
	if o.json {
		err = r.WriteJSON(c.OutOrStdout())
	} else {
		err = r.WriteTable(c.OutOrStdout())
	}
	if err == nil && o.check && !r.Met() {
		err = errGoalMissed
	}
	return err
}

func writePlot(name string, r benchReport) error {
	f, err := os.Create(name)
	if err != nil {
		return fmt.Errorf("write plot: %w", err)
	}
	if err := r.WriteSVG(f); err != nil {
		f.Close()
		return fmt.Errorf("write plot %s: %w", name, err)
	}
	return f.Close()
}
