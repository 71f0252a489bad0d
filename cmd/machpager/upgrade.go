//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

// upgradeResult is what upgrade has done.
type upgradeResult struct {
	Before        int    `json:"pager_pid_before"`
	Pager         int    `json:"pager_pid"`
	VersionBefore string `json:"version_before"`
	Version       string `json:"version"`
}

func newUpgrade() *cobra.Command {
	var socket string
	var asJSON bool
	var wait time.Duration
	c := &cobra.Command{
		Use:   "upgrade",
		Short: "Replace a running pager by the program that is installed now",
		Long: `Starts the program that the pager's executable file contains now, and has it take the place of the pager: objects, mappings and contents stay, and tasks
notice a pause. If the new program cannot take over the state of the old one, the old one stays and the command says why. SIGHUP to the guardian (machpager
serve) does the same. For root and the user whom the pager runs as.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if wait <= 0 {
				return usageError{fmt.Errorf("--wait %v: want a positive time (see machpager upgrade --help)", wait)}
			}
			p, err := dial(c.Context(), socket)
			if err != nil {
				return err
			}
			defer p.Close()
			ctx, cancel := context.WithTimeout(c.Context(), wait)
			defer cancel()
			before, err := p.Info(ctx)
			if err != nil {
				return err
			}
			err = p.Upgrade(ctx)
			if errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("%w (not within %v; whether it is still under way, machpager info tells)", err, wait)
			}
			if err != nil {
				return err
			}
			after, err := p.Info(ctx)
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(c.OutOrStdout(), upgradeResult{Before: before.PagerPID, Pager: after.PagerPID, VersionBefore: before.Version, Version: after.Version})
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "the pager is process %d, version %s (was %d, version %s)\n", after.PagerPID, after.Version, before.PagerPID, before.Version)
			return err
		},
	}
	c.Flags().DurationVar(&wait, "wait", 30*time.Second, "how long it may take")
	socketFlag(c, &socket)
	jsonFlag(c, &asJSON)
	return c
}
