//go:build linux

package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// group is a memory control group of our own: whoever is in it cannot have more memory than it may, the page cache of its files included.
type group struct {
	dir     string
	unified bool // cgroup version 2
}

// newGroup makes a group. An error says why this machine does not allow it.
func newGroup(name string) (*group, error) {
	parent, unified, err := groupParent("/proc/self/cgroup", "/sys/fs/cgroup")
	if err != nil {
		return nil, err
	}
	g := &group{filepath.Join(parent, name), unified}
	if err := os.Mkdir(g.dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a memory control group: %w", err)
	}
	if _, err := os.Stat(g.file("memory.max", "memory.limit_in_bytes")); err != nil {
		return nil, errors.Join(fmt.Errorf("make a memory control group: %w", err), g.remove())
	}
	return g, nil
}

// groupParent is where a group can be made: below our own with version 1, beside it with version 2, where a group with processes has no others below.
// All limits that hold for us hold there, but in version 2 our own group's.
func groupParent(self, root string) (dir string, unified bool, err error) {
	b, err := os.ReadFile(self)
	if err != nil {
		return "", false, fmt.Errorf("find our control group: %w", err)
	}
	v2 := ""
	for line := range strings.Lines(string(b)) {
		part := strings.SplitN(strings.TrimSpace(line), ":", 3)
		switch {
		case len(part) != 3:
		case slices.Contains(strings.Split(part[1], ","), "memory"):
			return filepath.Join(root, "memory", part[2]), false, nil
		case part[0] == "0":
			v2 = part[2]
		}
	}
	if v2 == "" {
		return "", false, errors.New("there are no memory control groups here")
	}
	dir = filepath.Dir(filepath.Join(root, v2))
	if v2 == "/" {
		dir = root
	}
	handed, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control"))
	if err != nil {
		return "", true, fmt.Errorf("find a memory control group: %w", err)
	}
	if !slices.Contains(strings.Fields(string(handed)), "memory") {
		return "", true, fmt.Errorf("%s does not hand the memory controller down (cgroup.subtree_control)", dir)
	}
	return dir, true, nil
}

func (g *group) file(v2, v1 string) string {
	if g.unified {
		return filepath.Join(g.dir, v2)
	}
	return filepath.Join(g.dir, v1)
}

// join moves a process into the group. What it has stays charged where it was.
func (g *group) join(pid int) error {
	if err := os.WriteFile(filepath.Join(g.dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		return fmt.Errorf("move process %d into a memory control group: %w", pid, err)
	}
	return nil
}

// limit leaves the group n bytes for the pages of files and tmpfs, beside what it has of anonymous, shared and kernel memory now.
func (g *group) limit(n int64) error {
	stat := g.stat()
	n += stat["anon"] + stat["rss"] + stat["shmem"] + stat["kernel"]
	if b, err := os.ReadFile(filepath.Join(g.dir, "memory.kmem.usage_in_bytes")); err == nil {
		k, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		n += k
	}
	var err error
	for range 50 { // reclaim takes its time
		if err = os.WriteFile(g.file("memory.max", "memory.limit_in_bytes"), []byte(strconv.FormatInt(n, 10)), 0); err == nil {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("limit a memory control group to %d bytes: %w", n, err)
}

// unlimit takes the limit off.
func (g *group) unlimit() error {
	none := "-1"
	if g.unified {
		none = "max"
	}
	return os.WriteFile(g.file("memory.max", "memory.limit_in_bytes"), []byte(none), 0)
}

func (g *group) stat() map[string]int64 {
	m := map[string]int64{}
	b, err := os.ReadFile(filepath.Join(g.dir, "memory.stat"))
	if err != nil {
		return m
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 {
			m[f[0]], _ = strconv.ParseInt(f[1], 10, 64)
		}
	}
	return m
}

// remove ends the group, when its processes have ended.
func (g *group) remove() error {
	var err error
	for range 100 {
		if err = os.Remove(g.dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return nil
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("remove a memory control group: %w", err)
}
