//go:build linux

// Machpager pages the memory of real processes: see `machpager help`.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"machpager/bench"
	"machpager/internal/daemon"
	"machpager/internal/demo"
	"machpager/region"
	"machpager/region/spawn"
)

func main() {
	spawn.Main() // the pager and its guardian are this program too
	bench.Main()
	demo.Main()
	os.Exit(run())
}

// run is the command. It returns the exit status.
func run() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	root := newRoot()
	if err := root.ExecuteContext(ctx); err != nil {
		fmt.Fprintln(root.ErrOrStderr(), "machpager:", err)
		return exitStatus(err)
	}
	return 0
}

// The exit statuses, as the help tells them.
const (
	exitFailed  = 1
	exitUsage   = 2
	exitNoPager = 3
	exitRefused = daemon.StatusRefused
	exitDiffers = 5
)

const long = `machpager pages the memory of real processes in user space, in the manner of Mach's External Memory Management.

A program maps a memory object and gets ordinary memory. Each page is absent until it is touched; the page fault is answered by the
pager, another process, which also takes pages back and keeps them in a store.

Exit status: 0 success, 1 failure, 2 wrong usage, 3 no pager answers at the socket, 4 the system does not permit it or is too old,
5 contents differ (demo) or a goal is missed (bench).`

// usageError is a wrong command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// errGoalMissed is a benchmark with a figure that is worse than promised.
var errGoalMissed = errors.New("a goal was missed")

func exitStatus(err error) int {
	var usage usageError
	switch {
	case errors.As(err, &usage):
		return exitUsage
	case errors.Is(err, demo.ErrDiffers), errors.Is(err, demo.ErrOverBudget), errors.Is(err, errGoalMissed), errors.Is(err, bench.ErrWrong):
		return exitDiffers
	case errors.Is(err, region.ErrPagerGone), errors.Is(err, unix.ENOENT) && isDial(err), errors.Is(err, unix.ECONNREFUSED):
		return exitNoPager
	case errors.Is(err, spawn.ErrRefused), daemon.Refused(err):
		return exitRefused
	}
	return exitFailed
}

// isDial reports whether err comes from reaching the pager, not from a file that the user named.
func isDial(err error) bool {
	var dial dialError
	return errors.As(err, &dial)
}

// dialError is a pager that cannot be reached.
type dialError struct{ error }

func (e dialError) Unwrap() error { return e.error }

// dial reaches the pager at socket.
func dial(ctx context.Context, socket string) (*region.Pager, error) {
	p, err := region.Dial(ctx, socket, nil)
	if err != nil {
		return nil, dialError{err}
	}
	return p, nil
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:           "machpager",
		Short:         "A user-space pager for real processes",
		Long:          long,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
	})
	root.AddCommand(newServe(), newDemo(), newBench(), newList(), newInfo(), newSet(), newPaging(), newUpgrade(), newCheck(), newDebug(), newVersion())
	wrapArgs(root)
	return root
}

// group makes a command that has others below it and does nothing by itself.
func group(c *cobra.Command, sub ...*cobra.Command) *cobra.Command {
	c.AddCommand(sub...)
	var names []string
	for _, s := range c.Commands() {
		names = append(names, s.Name())
	}
	slices.Sort(names)
	c.RunE = func(c *cobra.Command, args []string) error {
		if len(args) == 0 {
			return c.Help()
		}
		return usageError{fmt.Errorf("unknown command %q for %q: want one of %s (see %s --help)", args[0], c.CommandPath(), strings.Join(names, ", "), c.CommandPath())}
	}
	return c
}

// wrapArgs makes usage errors of what a command's Args says.
func wrapArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(c *cobra.Command, args []string) error {
			if err := check(c, args); err != nil {
				return usageError{fmt.Errorf("%w (see %s --help)", err, c.CommandPath())}
			}
			return nil
		}
	}
	for _, sub := range c.Commands() {
		wrapArgs(sub)
	}
}

// socketFlag adds --socket.
func socketFlag(c *cobra.Command, socket *string) {
	c.Flags().StringVar(socket, "socket", "", "the pager's socket (default $"+region.SocketEnv+", else "+region.DefaultSocket+")")
}

// jsonFlag adds --json.
func jsonFlag(c *cobra.Command, on *bool) {
	c.Flags().BoolVar(on, "json", false, "write JSON")
}

func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "\t")
	return e.Encode(v)
}
