//go:build linux

package main

import (
	"fmt"
	"runtime"

	"github.com/spf13/cobra"

	"machpager/internal/daemon"
	"machpager/internal/ipc"
)

func newVersion() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "version",
		Short: "Tell the version of this program and of its protocol",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if asJSON {
				return writeJSON(c.OutOrStdout(), struct {
					Version  string `json:"version"`
					Protocol int    `json:"protocol"`
					Go       string `json:"go"`
				}{daemon.Version, ipc.Version, runtime.Version()})
			}
			_, err := fmt.Fprintf(c.OutOrStdout(), "machpager %s, protocol %d, %s\n", daemon.Version, ipc.Version, runtime.Version())
			return err
		},
	}
	jsonFlag(c, &asJSON)
	return c
}
