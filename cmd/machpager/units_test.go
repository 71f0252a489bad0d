//go:build linux

package main

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/unit"

	"machpager/region"
)

// A parsedUnit has the values of a unit file, by Section/Name=, in their order.
type parsedUnit map[string][]string

func readUnit(t *testing.T, name string) parsedUnit {
	t.Helper()
	b, err := os.ReadFile("../../contrib/systemd/" + name)
	if err != nil {
		t.Fatal(err)
	}
	options, err := unit.DeserializeOptions(bytes.NewReader(b))
	if err != nil {
		t.Fatal(name, err)
	}
	u := parsedUnit{}
	for _, o := range options {
		u[o.Section+"/"+o.Name] = append(u[o.Section+"/"+o.Name], o.Value)
	}
	return u
}

// is fails unless a setting is there once, and so.
func (u parsedUnit) is(t *testing.T, setting, want string) {
	t.Helper()
	if got := u[setting]; !slices.Equal(got, []string{want}) {
		t.Errorf("%s= is %q, want %q", setting, got, want)
	}
}

// TestUnits holds the units against the command: what they call exists, takes the flags that they give, ends with the statuses that they name and within the
// time that they leave. What they do under a systemd is contrib/systemd/test's.
func TestUnits(t *testing.T) {
	service, socket := readUnit(t, "machpager.service"), readUnit(t, "machpager.socket")
	const program = "/usr/local/bin/machpager"

	// The command lines.
	const start = program + " serve --dir ${STATE_DIRECTORY} --log-format json $MACHPAGER_OPTIONS"
	service.is(t, "Service/ExecStart", start)
	service.is(t, "Service/ExecReload", program+" upgrade")
	for _, line := range []string{start, program + " upgrade"} {
		words := strings.Fields(strings.NewReplacer("${STATE_DIRECTORY}", "/var/lib/machpager", " $MACHPAGER_OPTIONS", " --resident 8G --log-level warn").Replace(line))
		c, args, err := newRoot().Find(words[1:])
		if err == nil {
			err = c.ParseFlags(args)
		}
		if err == nil {
			err = c.ValidateArgs(c.Flags().Args())
		}
		if err != nil {
			t.Errorf("%s: %v", line, err)
		}
	}

	// What serve is to systemd.
	service.is(t, "Service/Type", "notify")
	service.is(t, "Service/NotifyAccess", "main")
	service.is(t, "Service/KillMode", "mixed")
	service.is(t, "Service/Restart", "on-failure")
	service.is(t, "Service/RestartPreventExitStatus", fmt.Sprintf("%d %d", exitUsage, exitRefused))
	service.is(t, "Service/Environment", "GOTRACEBACK=crash") // else a crash ends with 2, too
	grace, err := time.ParseDuration(newServe().Flags().Lookup("grace").DefValue)
	if err != nil {
		t.Fatal(err)
	}
	if stop, err := strconv.Atoi(strings.Join(service["Service/TimeoutStopSec"], "")); err != nil || time.Duration(stop)*time.Second < 2*grace {
		t.Errorf("TimeoutStopSec= is %q; --grace is %v", service["Service/TimeoutStopSec"], grace)
	}

	// The socket.
	socket.is(t, "Socket/ListenSequentialPacket", region.DefaultSocket)
	service.is(t, "Unit/Requires", "machpager.socket")
	service.is(t, "Unit/After", "machpager.socket")
	service.is(t, "Install/Also", "machpager.socket")

	// The user.
	service.is(t, "Service/User", "machpager")
	socket.is(t, "Socket/SocketUser", "machpager")
	socket.is(t, "Socket/SocketGroup", "machpager")
	socket.is(t, "Socket/SocketMode", "0660")
	sysusers, err := os.ReadFile("../../contrib/systemd/machpager.sysusers")
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^u machpager - `).Match(sysusers) {
		t.Errorf("machpager.sysusers does not make the user machpager: %s", sysusers)
	}

	// What tier A needs, and no more.
	service.is(t, "Service/CapabilityBoundingSet", "CAP_SYS_ADMIN CAP_SYS_PTRACE")
	service.is(t, "Service/AmbientCapabilities", "CAP_SYS_ADMIN CAP_SYS_PTRACE")
	calls := strings.Fields(strings.Join(service["Service/SystemCallFilter"], " "))
	for _, call := range []string{"@system-service", "@mount", "userfaultfd", "cachestat", "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"} {
		if !slices.Contains(calls, call) {
			t.Errorf("SystemCallFilter= has no %s", call)
		}
	}

	// What the operator is told.
	docs := readDoc(t, "docs/operations.md")
	for _, want := range []string{
		"`TasksMax=`, kernel.threads-max) | one for each connection, its fault reader, and some dozen | " + strings.Join(service["Service/TasksMax"], ""),
		strings.Join(service["Service/LimitNOFILE"], "") + " for all there can be",
		"/usr/local/bin/\n", "contrib/systemd/machpager.{service,socket} /etc/systemd/system/\n", "contrib/systemd/machpager.sysusers /usr/lib/sysusers.d/machpager.conf",
		strings.TrimPrefix(strings.Join(service["Unit/Documentation"], ""), "file:") + "\n",
		strings.TrimPrefix(strings.Join(service["Service/EnvironmentFile"], ""), "-"), "MACHPAGER_OPTIONS=",
	} {
		if !strings.Contains(docs, want) {
			t.Errorf("docs/operations.md does not say %q", want)
		}
	}
}
