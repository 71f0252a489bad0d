//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"machpager/region"
)

// setResult is what set has changed, in bytes.
type setResult struct {
	Before         int64 `json:"budget_before_bytes"`
	Budget         int64 `json:"budget_bytes"`
	Resident       int64 `json:"resident_bytes"`
	KernelResident int64 `json:"kernel_resident_bytes"` // -1: unknown
}

func newSet() *cobra.Command {
	var socket string
	var asJSON bool
	var resident size
	var wait time.Duration
	c := &cobra.Command{
		Use:   "set --resident SIZE",
		Short: "Change what a running pager may keep in memory",
		Long: `Changes the memory that all objects of a running pager together may occupy. A smaller budget is in force when the command returns: pages were
paged out first. What is wired cannot be; if there is too much of it, or paging out takes longer than --wait, the command fails and the old budget stands.
For root and the user whom the pager runs as.

Sizes are bytes, or have a suffix K, M, G or T (powers of 1024).`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if resident == 0 {
				return usageError{errors.New("nothing to set: give --resident SIZE (see machpager set --help)")}
			}
			if wait <= 0 {
				return usageError{fmt.Errorf("--wait %v: want a positive time (see machpager set --help)", wait)}
			}
			p, err := dial(c.Context(), socket)
			if err != nil {
				return err
			}
			defer p.Close()
			ctx, cancel := context.WithTimeout(c.Context(), wait)
			defer cancel()
			r, err := setResident(ctx, p, int64(resident))
			switch {
			case errors.Is(err, context.DeadlineExceeded):
				return fmt.Errorf("%w (not within %v: wired pages cannot be paged out; give --wait more time, or a larger --resident)", err, wait)
			case err != nil:
				return err
			case asJSON:
				return writeJSON(c.OutOrStdout(), r)
			}
			return writeSet(c.OutOrStdout(), r)
		},
	}
	c.Flags().Var(&resident, "resident", "memory that all objects together may occupy")
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "how long pages may take to be paged out")
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}

func setResident(ctx context.Context, p *region.Pager, n int64) (r setResult, err error) {
	info, err := p.Info(ctx)
	if err != nil {
		return r, err
	}
	r.Before = info.Budget
	if err := p.SetResident(ctx, n); err != nil {
		return r, err
	}
	if info, err = p.Info(ctx); err != nil {
		return r, err
	}
	r.Budget, r.Resident, r.KernelResident = info.Budget, info.Resident, info.KernelResident
	return r, nil
}

func writeSet(w io.Writer, r setResult) error {
	_, err := fmt.Fprintf(w, "budget %d bytes (was %d), resident %d\n", r.Budget, r.Before, r.Resident)
	return err
}
