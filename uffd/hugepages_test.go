//go:build linux

package uffd

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"syscall"
)

// keeperName is argv[0] of the child process that reserves huge pages, and gives them back when the tests are over, however they end.
const keeperName = "uffd-test-keeper"

const (
	hugePages = 24
	hugePool  = "/proc/sys/vm/nr_hugepages"
)

type keeper struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// startKeeper reserves huge pages and sets hugeSize and haveHuge. stop may be called in any case.
func startKeeper() (keeper, error) {
	var err error
	if hugeSize, err = meminfo("Hugepagesize:"); err != nil {
		return keeper{}, err
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{keeperName}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // out of reach of what kills the process group of the tests
	in, err := cmd.StdinPipe()
	if err != nil {
		return keeper{}, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return keeper{}, err
	}
	if err := cmd.Start(); err != nil {
		return keeper{}, err
	}
	k := keeper{cmd, in}
	said := make([]byte, 256)
	n, err := out.Read(said)
	if answer := string(bytes.TrimSpace(said[:n])); answer != "reserved" {
		return k, fmt.Errorf("reserve huge pages: %s (%v)", answer, err)
	}
	haveHuge = true
	return k, nil
}

func (k keeper) stop() {
	if k.cmd != nil {
		k.stdin.Close()
		k.cmd.Wait()
	}
}

// keeperMain is the child's main: reserve, tell, wait for the end of the input, give back.
func keeperMain() {
	signal.Ignore()
	if err := addHugePages(hugePages); err != nil {
		fmt.Println(err)
		os.Exit(0)
	}
	fmt.Println("reserved")
	io.Copy(io.Discard, os.Stdin)
	if err := addHugePages(-hugePages); err != nil {
		fmt.Fprintln(os.Stderr, "uffd tests: give huge pages back:", err)
	}
	os.Exit(0)
}

// addHugePages changes the size of the pool, or leaves it as it was.
func addHugePages(n int64) error {
	before, err := readInt(hugePool)
	if err != nil {
		return err
	}
	if err := writeInt(hugePool, max(before+n, 0)); err != nil {
		return err
	}
	if now, err := readInt(hugePool); err != nil || now < before+n {
		writeInt(hugePool, before)
		return fmt.Errorf("only %d of %d were added (%v)", now-before, n, err)
	}
	return nil
}

func writeInt(path string, n int64) error {
	return os.WriteFile(path, strconv.AppendInt(nil, n, 10), 0)
}
