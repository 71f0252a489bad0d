package daemon

import (
	"context"
	"fmt"

	"machpager/pager/emm"
	"machpager/pager/vnode"
)

// The built-in managers of objects over files: see package vnode. They take no argument, but the file.
const (
	fileManager    = "file"    // vnode.File
	checkedManager = "checked" // vnode.Checked
)

// builtIn reports whether a manager is one of them.
func builtIn(name string) bool { return name == fileManager || name == checkedManager }

// protector is a manager whose objects cannot be mapped with every access (Mach: the max_protection of a vm_map).
type protector interface{ MaxProtection() emm.Prot }

// readOnly reports whether the object can only be mapped read-only.
func (o *object) readOnly() bool {
	p, ok := o.manager.(protector)
	return ok && p.MaxProtection()&emm.ProtWrite == 0
}

// openManager makes the manager of an object that names one. On success the file is the manager's.
func (d *Daemon) openManager(ctx context.Context, s objectSpec, o *object) (emm.Manager, error) {
	var got emm.Manager
	var err error
	switch m := d.managers[s.manager]; {
	case builtIn(s.manager) && s.file == nil:
		return nil, fmt.Errorf("it needs the file (ObjectOptions.File): %w", emm.InvalidArgument)
	case builtIn(s.manager) && s.arg != "":
		return nil, fmt.Errorf("it takes no argument: files are opened by their users, and handed over open (ObjectOptions.File): %w", emm.InvalidArgument)
	case builtIn(s.manager):
		open := vnode.File
		if s.manager == checkedManager {
			open = vnode.Checked
		}
		got, err = open(s.file, s.size, &vnode.Options{Log: d.log, Lost: o.lost.Load(), OnLost: func() {
			o.lost.Store(true)
			if err := d.holdRecord(o); err != nil {
				d.log.Error("a file lost writes, and the next pager will not know", "object", o.vm.ID(), "err", err)
			}
		}})
	case m == nil:
		return nil, fmt.Errorf("no memory manager has this name: %w", emm.InvalidName)
	default:
		got, err = m.Open(ctx, s.arg, s.file)
	}
	if err != nil {
		return nil, err // and no *vnode.Pager in an interface
	}
	if got == nil {
		return nil, fmt.Errorf("it gave nothing: %w", emm.Failure)
	}
	return got, nil
}

// fileSize is the size of an object whose size is to be its file's.
func fileSize(s objectSpec) (int64, error) {
	size := vnode.FileSize
	if s.manager == checkedManager {
		size = vnode.CheckedSize
	}
	n, err := size(s.file)
	if err != nil {
		return 0, err
	}
	if n == 0 {
		return 0, fmt.Errorf("the file is empty: give the size that the object is to have: %w", emm.InvalidArgument)
	}
	return n, nil
}
