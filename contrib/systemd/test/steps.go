//go:build linux

package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// steps are what is tried, in this order: each finds the service as the one before has left it, running.
var steps = []struct {
	name string
	do   func() error
}{
	{"install as docs/operations.md says", install},
	{"verify the units", verify},
	{"info: root, a member of the group, a stranger", who},
	{"what the service is given: limits, capabilities, confinement", given},
	{"options from /etc/default/machpager", options},
	{"a wrong option is said once, and not tried again", wrongOption},
	{"tasks: root, and a member without privileges", plainTasks},
	{"a member with permission on /dev/userfaultfd, and one that is handed it", device},
	{"demo share and demo sort at the socket", demos},
	{"set, paging, check, debug dump", operate},
	{"reload while a task runs", reload},
	{"kill -9 of the pager: the guardian starts another", killPager},
	{"SIGSTOP of the pager: the watchdog", stopPager},
	{"SIGSTOP of the guardian: systemd's watchdog", stopGuardian},
	{"kill -9 of the guardian: Restart=on-failure", killGuardian},
	{"stop: a task that leaves is waited for", drain},
	{"stop: a task that stays is not", grace},
	{"socket activation", activation},
	{"the journal", readJournal},
	{"stop and disable: nothing is left", uninstall},
}

// source is where the script puts the repository.
const source = "/run/machpager-source"

// install runs the commands of the first block under "As a service", literally.
func install() error {
	docs, err := os.ReadFile(filepath.Join(source, "docs/operations.md"))
	if err != nil {
		return err
	}
	_, section, ok := strings.Cut(string(docs), "\n## As a service\n")
	if !ok {
		return errors.New(`docs/operations.md has no section "As a service"`)
	}
	var commands []string
	for line := range strings.SplitSeq(section, "\n") {
		if c, code := strings.CutPrefix(line, "    "); code {
			commands = append(commands, c)
		} else if len(commands) > 0 {
			break
		}
	}
	if !slices.Contains(commands, "machpager info") {
		return fmt.Errorf("no commands were found: %q", commands)
	}
	out, err := run("bash", "-c", "set -e; cd "+source+"\n"+strings.Join(commands, "\n"))
	if err != nil {
		return err
	}
	fmt.Print(indent(out))
	for _, unit := range []string{"machpager.service", "machpager.socket"} {
		for _, is := range []string{"is-active", "is-enabled"} {
			if _, err := run("systemctl", is, unit); err != nil {
				return err
			}
		}
	}
	return nil
}

func indent(s string) string {
	return "      " + strings.ReplaceAll(strings.TrimSpace(s), "\n", "\n      ") + "\n"
}

func verify() error {
	out, err := run("systemd-analyze", "verify", "machpager.service", "machpager.socket")
	if err != nil || strings.Contains(out, "machpager") {
		return fmt.Errorf("%w: %s", err, out)
	}
	out, err = run("systemd-analyze", "security", "--no-pager", "machpager.service")
	if err != nil {
		return err
	}
	_, exposure, _ := strings.Cut(out, "→ ")
	fmt.Print(indent(exposure))
	return nil
}

func who() error {
	i, err := info()
	if err != nil {
		return err
	}
	if i.Tier != "A" || strconv.Itoa(i.GuardianPID) != property("MainPID") {
		return fmt.Errorf("info says tier %s, guardian %d; the main process is %s", i.Tier, i.GuardianPID, property("MainPID"))
	}
	if out, status, err := runAs(true, "machpager", "info"); err != nil || status != 0 {
		return fmt.Errorf("a member's info: status %d, %v: %s", status, err, out)
	}
	if out, status, err := runAs(false, "machpager", "info"); err != nil || status != 4 || !strings.Contains(out, "permission") {
		return fmt.Errorf("a stranger's info: status %d, want 4; %v: %s", status, err, out)
	}
	if out, status, err := runAs(true, "machpager", "set", "--resident", "1G"); err != nil || status != 4 {
		return fmt.Errorf("a member's set: status %d, want 4; %v: %s", status, err, out)
	}
	return nil
}

func given() error {
	i, err := info()
	if err != nil {
		return err
	}
	if !strings.Contains(i.Frames, "tmpfs") || strings.HasPrefix(i.Confinement, "none") || i.Confinement == "" {
		return fmt.Errorf("frames: %s; confinement: %s", i.Frames, i.Confinement)
	}
	// Where the machine has no CAP_SYS_RESOURCE itself, its systemd gives what it may.
	raises, err := has(1, "status", "CapEff:\t000001ffffffffff")
	if err != nil {
		return err
	}
	for p, name := range map[int]string{i.PagerPID: "machpager-pager", i.GuardianPID: "machpager"} {
		proc := fmt.Sprintf("/proc/%d/", p)
		if ok, err := has(p, "comm", name+"\n"); err != nil || !ok {
			return fmt.Errorf("process %d is not called %s: %v", p, name, err)
		}
		if raises {
			for file, want := range map[string]string{"limits": "Max open files            262144               262144", "oom_score_adj": "-900"} {
				if ok, err := has(p, file, want); err != nil || !ok {
					return fmt.Errorf("%s%s has no %q: %v", proc, file, want, err)
				}
			}
		}
		status, err := os.ReadFile(proc + "status")
		if err != nil {
			return err
		}
		for want, of := range map[string]bool{"NoNewPrivs:\t1": true, "Seccomp:\t2": true, "CapEff:\t0000000000000000": p == i.PagerPID, "CapEff:\t0000000000280000": p == i.GuardianPID} {
			if of && !strings.Contains(string(status), want) {
				return fmt.Errorf("status of %d has no %q: %s", p, want, status)
			}
		}
	}
	return nil
}

// has reports whether a file of a process in /proc contains text.
func has(pid int, file, text string) (bool, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
	return strings.Contains(string(b), text), err
}

// defaults writes the file with the service's options and restarts it.
func defaults(options string) error {
	if err := os.MkdirAll("/etc/default", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile("/etc/default/machpager", []byte("MACHPAGER_OPTIONS="+options+"\n"), 0o644); err != nil {
		return err
	}
	_, err := run("systemctl", "restart", "machpager.service")
	return err
}

func options() error {
	if err := defaults("--resident 64M --user-objects 100"); err != nil {
		return err
	}
	i, err := info()
	if err == nil && i.Budget != 64<<20 {
		err = fmt.Errorf("the budget is %d", i.Budget)
	}
	return err
}

func wrongOption() error {
	since := time.Now()
	if err := defaults("--resident much"); err == nil {
		return errors.New("it started")
	}
	time.Sleep(2500 * time.Millisecond) // twice RestartSec=
	if err := errors.Join(wantProperty("ExecMainStatus", "2"), wantProperty("NRestarts", "0"), wantProperty("ActiveState", "failed"), journal(since, "want a positive number of bytes")); err != nil {
		return err
	}
	return defaults("--resident 64M")
}

func plainTasks() error {
	root, err := newTask(false)
	if err != nil {
		return err
	}
	member, err := newTask(true, "-user-mode-only")
	if err != nil {
		return err
	}
	if err := errors.Join(root.well(), member.well(), root.end(), member.end()); err != nil {
		return err
	}
	// Without the flag it is told what would help.
	if _, err := newTask(true); err == nil || !strings.Contains(err.Error(), "userfaultfd") {
		return fmt.Errorf("a member that may not use userfaultfd: %v", err)
	}
	return nil
}

const userfaultfd = "/dev/userfaultfd"

// device is done on a node of the container's own.
func device() error {
	number, err := os.ReadFile("/sys/class/misc/userfaultfd/dev")
	if err != nil {
		return err
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(number), "%d:%d", &major, &minor); err != nil {
		return err
	}
	os.Remove(userfaultfd)
	if err := unix.Mknod(userfaultfd, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor))); err != nil {
		return fmt.Errorf("make %s: %w", userfaultfd, err)
	}
	// As in docs/operations.md.
	if _, err := run("sh", "-ec", "chgrp machpager /dev/userfaultfd; chmod 660 /dev/userfaultfd"); err != nil {
		return err
	}
	t, err := newTask(true)
	if err != nil {
		return err
	}
	if err := errors.Join(t.well(), t.end()); err != nil {
		return err
	}
	// The user of the pager alone, who hands it out.
	if _, err := run("sh", "-ec", "chown machpager:root /dev/userfaultfd; chmod 600 /dev/userfaultfd"); err != nil {
		return err
	}
	if _, err := newTask(true); err == nil {
		return errors.New("a member can use a device that it may not open")
	}
	if err := defaults("--resident 64M --hand-out-userfaultfd"); err != nil {
		return err
	}
	if t, err = newTask(true); err != nil {
		return err
	}
	return errors.Join(t.well(), t.end())
}

func demos() error {
	if _, err := run("machpager", "demo", "share", "--socket", "/run/machpager/pager.sock"); err != nil {
		return err
	}
	_, err := run("machpager", "demo", "sort", "--socket", "/run/machpager/pager.sock", "--size", "96M")
	return err
}

// operate is the commands for root and the pager's user: the paging file is opened by who asks, outside of the unit's sandbox.
func operate() error {
	t, err := newTask(false)
	if err != nil {
		return err
	}
	if _, err := run("sh", "-ec", `
		machpager set --resident 32M
		machpager paging add /var/tmp
		machpager paging ls
		machpager paging remove 1
		machpager paging ls
		machpager check
		machpager debug dump
		machpager ls`); err != nil {
		return err
	}
	return errors.Join(t.well(), t.end())
}

// pagers are the pid of the pager and of its guardian.
func pagers() (pager, guardian int, err error) {
	i, err := info()
	return i.PagerPID, i.GuardianPID, err
}

// another runs do, which ends the pager, and is an error if its tasks do not find all of their memory with another pager of the same guardian.
func another(limit time.Duration, message string, do func(pager int) error) error {
	root, err := newTask(false)
	if err != nil {
		return err
	}
	member, err := newTask(true, "-user-mode-only")
	if err != nil {
		return err
	}
	since := time.Now()
	pager, guardian, err := pagers()
	if err != nil {
		return err
	}
	if err := do(pager); err != nil {
		return err
	}
	if err := until(limit, "another pager", func() bool { p, _, err := pagers(); return err == nil && p != pager }); err != nil {
		return err
	}
	fmt.Printf("      another pager after %.2f s\n", time.Since(since).Seconds())
	if _, g, err := pagers(); err != nil || g != guardian {
		return fmt.Errorf("the guardian was %d and is %d, %v", guardian, g, err)
	}
	return errors.Join(root.well(), member.well(), root.end(), member.end(), wantProperty("NRestarts", "0"), wantProperty("MainPID", strconv.Itoa(guardian)),
		wantProperty("ActiveState", "active"), journal(since, message))
}

func reload() error {
	return another(0, "the pager serves", func(int) error { _, err := run("systemctl", "reload", "machpager.service"); return err })
}

func killPager() error {
	return another(5*time.Second, "the pager has died; starting another on what it left", func(pager int) error { return unix.Kill(pager, unix.SIGKILL) })
}

// watchdog has the service start with another WatchdogSec=.
func watchdog(seconds int) error {
	const dir = "/run/systemd/system/machpager.service.d"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(dir+"/watchdog.conf", fmt.Appendf(nil, "[Service]\nWatchdogSec=%d\n", seconds), 0o644); err != nil {
		return err
	}
	if _, err := run("systemctl", "daemon-reload"); err != nil {
		return err
	}
	_, err := run("systemctl", "restart", "machpager.service")
	return err
}

func stopPager() error {
	if err := watchdog(3); err != nil {
		return err
	}
	return another(15*time.Second, "ending it", func(pager int) error { return unix.Kill(pager, unix.SIGSTOP) })
}

func stopGuardian() error {
	return lost(func(guardian int) error { return unix.Kill(guardian, unix.SIGSTOP) })
}

func killGuardian() error {
	if err := watchdog(60); err != nil {
		return err
	}
	return lost(func(guardian int) error { return unix.Kill(guardian, unix.SIGKILL) })
}

// lost runs do, which ends the guardian, and is an error if systemd does not start another, or a task sees anything but its own data and errors.
func lost(do func(guardian int) error) error {
	t, err := newTask(false)
	if err != nil {
		return err
	}
	if answer, err := t.ask("out"); err != nil || answer != "ok" {
		return fmt.Errorf("page out: %s, %v", answer, err)
	}
	if _, err := run("systemctl", "reset-failed", "machpager.service"); err != nil { // NRestarts from 0
		return err
	}
	before, err := strconv.Atoi(property("NRestarts"))
	if err != nil {
		return err
	}
	pager, guardian, err := pagers()
	if err != nil {
		return err
	}
	start := time.Now()
	if err := do(guardian); err != nil {
		return err
	}
	if err := until(30*time.Second, "the service runs anew", func() bool {
		return property("ActiveState") == "active" && property("MainPID") != strconv.Itoa(guardian) && property("MainPID") != "0"
	}); err != nil {
		return err
	}
	fmt.Printf("      runs anew after %.2f s\n", time.Since(start).Seconds())
	if err := wantProperty("NRestarts", strconv.Itoa(before+1)); err != nil {
		return err
	}
	if unix.Kill(pager, 0) == nil {
		return fmt.Errorf("the pager %d of the guardian that is gone is still there", pager)
	}
	if err := t.bereft(); err != nil {
		return err
	}
	if t, err = newTask(false); err != nil {
		return err
	}
	return errors.Join(t.well(), t.end())
}

// stopped stops the service, while do runs, and returns how long that took.
func stopped(do func()) (time.Duration, error) {
	start, done := time.Now(), make(chan error, 1)
	go func() { _, err := run("systemctl", "stop", "machpager.service"); done <- err }()
	do()
	err := <-done
	return time.Since(start), errors.Join(err, wantProperty("Result", "success"), wantProperty("ActiveState", "inactive"))
}

func drain() error {
	t, err := newTask(false)
	if err != nil {
		return err
	}
	var well, ended error
	took, err := stopped(func() {
		time.Sleep(2 * time.Second)
		well = t.well() // it is served until it leaves
		ended = t.end()
	})
	if err == nil && (took < 2*time.Second || took > 6*time.Second) {
		err = fmt.Errorf("the stop took %v; the task left after two seconds", took)
	}
	if err := errors.Join(err, well, ended); err != nil {
		return err
	}
	_, err = run("systemctl", "start", "machpager.service")
	return err
}

func grace() error {
	t, err := newTask(false)
	if err != nil {
		return err
	}
	if answer, err := t.ask("out"); err != nil || answer != "ok" {
		return fmt.Errorf("page out: %s, %v", answer, err)
	}
	took, err := stopped(func() {})
	if err == nil && (took < 9*time.Second || took > 15*time.Second) {
		err = fmt.Errorf("the stop took %v; --grace is 10 s", took)
	}
	if err != nil {
		return err
	}
	return t.bereft()
}

// activation begins with the service stopped: the socket is there.
func activation() error {
	if err := wantProperty("ActiveState", "inactive"); err != nil {
		return err
	}
	t, err := newTask(true, "-user-mode-only")
	if err != nil {
		return err
	}
	return errors.Join(t.well(), t.end(), wantProperty("ActiveState", "active"))
}

// readJournal holds what the service has written: records, but for the stacks of a guardian that systemd's watchdog has ended, and what the guardian says to who started it.
func readJournal() error {
	out, err := run("journalctl", "--no-pager", "-o", "json", "-u", "machpager.service", "_SYSTEMD_UNIT=machpager.service")
	if err != nil {
		return err
	}
	records, others := 0, 0
	for line := range strings.SplitSeq(strings.TrimSpace(out), "\n") {
		var entry struct {
			Message  string `json:"MESSAGE"`
			Priority string `json:"PRIORITY"`
		}
		if err := json.Unmarshal([]byte(line), &entry); err != nil {
			return fmt.Errorf("%w: %s", err, line)
		}
		var record struct{ Time, Level, Msg, Process string }
		if err := json.Unmarshal([]byte(entry.Message), &record); err != nil {
			others++
			continue
		}
		if record.Time == "" || record.Level == "" || record.Msg == "" || record.Process == "" {
			return fmt.Errorf("not a whole record: %s", entry.Message)
		}
		records++
	}
	fmt.Printf("      %d records, %d other lines\n", records, others)
	if records < 20 {
		return errors.New("that is too few")
	}
	return nil
}

func uninstall() error {
	pager, guardian, err := pagers()
	if err != nil {
		return err
	}
	if _, err := run("systemctl", "disable", "--now", "machpager.socket", "machpager.service"); err != nil {
		return err
	}
	for _, pid := range []int{pager, guardian} {
		if unix.Kill(pid, 0) == nil {
			return fmt.Errorf("process %d is still there", pid)
		}
	}
	left, err := filepath.Glob("/var/lib/machpager/*")
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("left: %q", left)
	}
	if out, status, err := runAs(true, "machpager", "info"); err != nil || status != 3 {
		return fmt.Errorf("info with nobody there: status %d, want 3; %v: %s", status, err, out)
	}
	return nil
}
