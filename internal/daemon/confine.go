package daemon

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"machpager/internal/confine"
	"machpager/pager/emm"
)

// When a pager confines itself.
const (
	ConfineAuto   = "auto"   // unless the program has memory managers of its own, which may need anything; as far as it can be had
	ConfineAlways = "always" // or it does not start
	ConfineNever  = "never"
)

// Confines are all of them.
var Confines = []string{ConfineAuto, ConfineAlways, ConfineNever}

// Confines reports whether a pager with so many memory managers of the program's own is to confine itself, as far as it can.
func (c Config) Confines(managers int) bool {
	return c.Confine == ConfineAlways || c.Confine != ConfineNever && managers == 0
}

// confine gives up what this process does not need to serve: docs/security.md has the list, with the reason for each. All that needs more has been done, and no task has been heard.
func (d *Daemon) confine(ctx context.Context) error {
	switch mode := d.config.Confine; {
	case mode != "" && !slices.Contains(Confines, mode):
		return fmt.Errorf("confine: %q: want one of %q: %w", mode, Confines, emm.InvalidArgument)
	case mode == ConfineNever:
		d.confinement = "none (switched off)"
		return nil
	case !d.config.Confines(len(d.managers)):
		d.confinement = "none (the program has memory managers of its own, which may need anything)"
		return nil
	}
	err := confine.Have()
	if err == nil {
		err = d.giveUp(ctx)
	} else if d.config.Confine != ConfineAlways && errors.Is(err, errors.ErrUnsupported) {
		d.confinement = fmt.Sprintf("none (%v)", err)
		d.log.Warn("the pager keeps its privileges and can open any file", "why", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("confine: %w", err)
	}
	d.confinement = "no capabilities, no file by name (landlock)"
	return nil
}

func (d *Daemon) giveUp(ctx context.Context) error {
	// The kernel wants CAP_SYS_ADMIN for it, and landlock forbids it.
	err := d.frames.ResizeBy(func(mountfd, ctlfd int, size int64) error {
		return d.guardian.Resize(context.WithoutCancel(ctx), mountfd, ctlfd, size)
	})
	if err != nil {
		return err
	}
	_, _ = time.Now().Zone() // the log's: read from a file, once
	if err := confine.Capabilities(); err != nil {
		return err
	}
	// Frames are opened anew for each task, by the descriptor's name in /proc, where there is also what a task's userfaultfd can do and on which CPU its threads are.
	rules := []confine.Rule{{Path: "/proc", Access: confine.Read}}
	if fd := d.frames.MountFD(); fd >= 0 {
		rules = append(rules, confine.Rule{Dir: fd, Access: confine.Read | confine.Write})
	}
	if d.config.Socket != "" {
		rules = append(rules, confine.Rule{Path: filepath.Dir(d.config.Socket), Access: confine.Remove}) // the socket, at the end
	}
	return confine.Files(rules)
}
