//go:build linux

package spawn

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"machpager/internal/confine"
	"machpager/internal/daemon"
	"machpager/internal/frames"
	"machpager/internal/guardian"
)

// The roles, by argv[0].
const (
	roleGuardian = "machpager-guardian"
	rolePager    = "machpager-pager"
)

// self is this program, also if its file was replaced or removed.
const self = "/proc/self/exe"

// Descriptors of the children.
const (
	linkFD   = 3 // the socket with the greeting: of the guardian to the task, of the pager to its guardian
	clientFD = 4 // of the pager: the task's socket, if there is one, or the listening socket that a service manager made
)

// hello is the greeting on fd 3.
type hello struct {
	Version int
	Role    string
	Config  daemon.Config
	Client  bool // there is a socket on clientFD
	JSON    bool // log as JSON; else as text
	Pipe    bool // standard error is a pipe of our own, to a program that may stand still
	Level   slog.Level
}

const helloVersion = 1

// helloMagic begins the greeting, so that no other packet is taken for one.
var helloMagic = []byte("machpager child\n")

func (h hello) packet() ([]byte, error) {
	b, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("make greeting: %w", err)
	}
	return append(bytes.Clone(helloMagic), b...), nil
}

var mainCalled atomic.Bool

// ownManagers is how many managers Main was given.
var ownManagers int

// Main serves if this process is a child made by Start or Serve, and then does not return. It belongs on the first line of main, and of TestMain: every
// init of the program has run in the child by then. managers are the program's own memory managers, for objects that name them.
//
// The program runs that far three times: in the guardian, in the pager, and, a quarter of a second after the pager began to serve, in the standby, which takes the pager's place
// when that dies (Options.NoStandby: only then). So what comes before Main, every init too, should neither cost much nor leave anything behind.
//
// A pager without managers of the program's own gives up what it does not need when it begins to serve: all capabilities, and, by landlock(7), every file that it
// would open by name. With such managers it does not, for nobody knows what they need: Options.Confine "always" says that they make do with what they
// have opened by the time the pager serves, and with the files that objects are made with. docs/security.md
func Main(managers ...Manager) {
	frames.MountMain()
	mainCalled.Store(true)
	ownManagers = len(managers)
	role := os.Args[0]
	if role != roleGuardian && role != rolePager {
		return
	}
	h, ok, err := readHello(role)
	if !ok {
		return // a program that is merely called so
	}
	// In ps, top and what the out-of-memory killer says; else it is called exe, as the link that was executed. At most 15 bytes are kept.
	_ = os.WriteFile("/proc/self/comm", []byte(role), 0)
	// The end of the socket is the only sign to end. SIGPIPE: whoever read the log may be gone.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGPIPE)
	if h.Pipe {
		// Nothing here waits for who reads, not even a panic.
		unix.SetNonblock(1, true)
		unix.SetNonblock(2, true)
	}
	log, flush := newLog(h.JSON, h.Level)
	if err == nil {
		err = serveRole(h, managers, log.With("process", role))
	}
	flush()
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", role, err)
		switch {
		case errors.Is(err, daemon.ErrState):
			os.Exit(guardian.ExitState)
		case daemon.Refused(err):
			os.Exit(daemon.StatusRefused)
		}
		os.Exit(1)
	}
	os.Exit(0)
}

func serveRole(h hello, managers []Manager, log *slog.Logger) error {
	link := os.NewFile(linkFD, "link")
	unix.CloseOnExec(linkFD)
	if h.Role == rolePager {
		o := daemon.Options{Config: h.Config, Managers: managers, Guardian: link, Log: log}
		if h.Client {
			unix.CloseOnExec(clientFD)
			o.Client = os.NewFile(clientFD, "client")
		}
		if h.Config.Activated {
			unix.CloseOnExec(clientFD)
			o.Listener = os.NewFile(clientFD, "listener")
		}
		return daemon.Run(o)
	}
	h.Role, h.Client = rolePager, true
	b, err := h.packet()
	if err != nil {
		return err
	}
	return guardian.Run(guardian.Options{Command: pagerCommand, SetMountSize: frames.SetMountSize, Hello: b, Client: link,
		Restarts: restarts(h.Config), Standby: standby(h.Config), Settled: h.Config.Settled, Ready: func(int) { lessen(h.Config, log) }, Log: log})
}

// pagerCommand is the command of a pager that is this program.
func pagerCommand() *exec.Cmd { return pagerOf(self) }

func pagerOf(path string) *exec.Cmd {
	cmd := childCommand(path, rolePager)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd
}

// defaultRestarts is how many deaths in a row are answered with a new pager.
const defaultRestarts = 5

func restarts(c daemon.Config) int {
	if c.Restarts == 0 {
		return defaultRestarts
	}
	return max(c.Restarts, 0)
}

// standbyAfter is how long a pager must have served for another to be started beside it: programs that are over by then do without.
const standbyAfter = 250 * time.Millisecond

func standby(c daemon.Config) time.Duration {
	if c.NoStandby {
		return 0
	}
	return standbyAfter
}

// lessen takes from this process, a guardian whose pager serves, the capabilities that neither it nor a pager that it starts again needs: all but those for the size of the frames' tmpfs,
// and for a userfaultfd.
func lessen(c daemon.Config, log *slog.Logger) {
	if !c.Confines(ownManagers) {
		return
	}
	if err := confine.Capabilities(confine.SysAdmin, confine.SysPtrace); err != nil {
		log.Warn("the guardian keeps its capabilities", "why", err)
	}
}

// readHello takes the greeting from fd 3. false: there is none, and nothing was taken.
func readHello(role string) (h hello, ok bool, err error) {
	if t, err := unix.GetsockoptInt(linkFD, unix.SOL_SOCKET, unix.SO_TYPE); err != nil || t != unix.SOCK_SEQPACKET {
		return h, false, nil
	}
	b := make([]byte, 64<<10)
	for _, flags := range [...]int{unix.MSG_DONTWAIT | unix.MSG_PEEK, unix.MSG_DONTWAIT} {
		n, _, err := unix.Recvfrom(linkFD, b, flags)
		if err != nil || !bytes.HasPrefix(b[:n], helloMagic) {
			return h, false, nil
		}
		if flags&unix.MSG_PEEK == 0 {
			b = b[:n]
		}
	}
	h, err = parseHello(b, role)
	return h, true, err
}

// parseHello reads a packet that begins with the magic.
func parseHello(b []byte, role string) (h hello, err error) {
	if err := json.Unmarshal(b[len(helloMagic):], &h); err != nil {
		return h, fmt.Errorf("read greeting: %w", err)
	}
	if h.Version != helloVersion || h.Role != role {
		return h, fmt.Errorf("read greeting: version %d for %q, this is version %d of %q (run the same release of machpager): %w", h.Version, h.Role,
			helloVersion, role, errors.ErrUnsupported)
	}
	return h, nil
}
