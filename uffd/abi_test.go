//go:build linux

package uffd

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// abi is what this package believes, by the kernel's names. Every entry is compared with the kernel's headers.
var abi = []struct {
	since   string // a macro that tells that the headers are new enough; "": always there
	c       string // C expression
	believe uint64
}{
	{"", "SYS_userfaultfd", unix.SYS_USERFAULTFD},
	{"", "UFFD_API", apiVersion},
	{"", "UFFD_USER_MODE_ONLY", userModeOnly},
	{"USERFAULTFD_IOC_NEW", "USERFAULTFD_IOC_NEW", userfaultfdIocNew},

	{"", "UFFDIO_API", uint64(uffdioAPI)},
	{"", "UFFDIO_REGISTER", uint64(uffdioRegister)},
	{"", "UFFDIO_UNREGISTER", uint64(uffdioUnregister)},
	{"", "UFFDIO_WAKE", uint64(uffdioWake)},
	{"", "UFFDIO_COPY", uint64(uffdioCopy)},
	{"", "UFFDIO_ZEROPAGE", uint64(uffdioZeropage)},
	{"", "UFFDIO_WRITEPROTECT", uint64(uffdioWriteProtect)},
	{"", "UFFDIO_CONTINUE", uint64(uffdioContinue)},
	{"UFFDIO_POISON", "UFFDIO_POISON", uint64(uffdioPoison)},
	{"UFFDIO_MOVE", "UFFDIO_MOVE", uint64(uffdioMove)},
	{"PAGEMAP_SCAN", "PAGEMAP_SCAN", uint64(pagemapScan)},

	{"", "(__u64)1 << _UFFDIO_REGISTER", uint64(IoctlRegister)},
	{"", "(__u64)1 << _UFFDIO_UNREGISTER", uint64(IoctlUnregister)},
	{"", "(__u64)1 << _UFFDIO_WAKE", uint64(IoctlWake)},
	{"", "(__u64)1 << _UFFDIO_COPY", uint64(IoctlCopy)},
	{"", "(__u64)1 << _UFFDIO_ZEROPAGE", uint64(IoctlZeropage)},
	{"", "(__u64)1 << _UFFDIO_WRITEPROTECT", uint64(IoctlWriteProtect)},
	{"", "(__u64)1 << _UFFDIO_CONTINUE", uint64(IoctlContinue)},
	{"", "(__u64)1 << _UFFDIO_API", uint64(IoctlAPI)},
	{"_UFFDIO_POISON", "(__u64)1 << _UFFDIO_POISON", uint64(IoctlPoison)},
	{"_UFFDIO_MOVE", "(__u64)1 << _UFFDIO_MOVE", uint64(IoctlMove)},

	{"", "UFFD_FEATURE_PAGEFAULT_FLAG_WP", uint64(FeatureWriteProtect)},
	{"", "UFFD_FEATURE_EVENT_FORK", uint64(FeatureEventFork)},
	{"", "UFFD_FEATURE_EVENT_REMAP", uint64(FeatureEventRemap)},
	{"", "UFFD_FEATURE_EVENT_REMOVE", uint64(FeatureEventRemove)},
	{"", "UFFD_FEATURE_MISSING_HUGETLBFS", uint64(FeatureMissingHugetlb)},
	{"", "UFFD_FEATURE_MISSING_SHMEM", uint64(FeatureMissingShmem)},
	{"", "UFFD_FEATURE_EVENT_UNMAP", uint64(FeatureEventUnmap)},
	{"", "UFFD_FEATURE_SIGBUS", uint64(FeatureSigbus)},
	{"", "UFFD_FEATURE_THREAD_ID", uint64(FeatureThreadID)},
	{"", "UFFD_FEATURE_MINOR_HUGETLBFS", uint64(FeatureMinorHugetlb)},
	{"", "UFFD_FEATURE_MINOR_SHMEM", uint64(FeatureMinorShmem)},
	{"", "UFFD_FEATURE_EXACT_ADDRESS", uint64(FeatureExactAddress)},
	{"", "UFFD_FEATURE_WP_HUGETLBFS_SHMEM", uint64(FeatureWriteProtectShmem)},
	{"UFFD_FEATURE_WP_UNPOPULATED", "UFFD_FEATURE_WP_UNPOPULATED", uint64(FeatureWPUnpopulated)},
	{"UFFD_FEATURE_POISON", "UFFD_FEATURE_POISON", uint64(FeaturePoison)},
	{"UFFD_FEATURE_WP_ASYNC", "UFFD_FEATURE_WP_ASYNC", uint64(FeatureWPAsync)},
	{"UFFD_FEATURE_MOVE", "UFFD_FEATURE_MOVE", uint64(FeatureMove)},

	{"", "UFFDIO_REGISTER_MODE_MISSING", uint64(RegisterMissing)},
	{"", "UFFDIO_REGISTER_MODE_WP", uint64(RegisterWP)},
	{"", "UFFDIO_REGISTER_MODE_MINOR", uint64(RegisterMinor)},
	{"", "UFFDIO_COPY_MODE_DONTWAKE", uint64(CopyDontWake)},
	{"", "UFFDIO_COPY_MODE_WP", uint64(CopyWP)},
	{"", "UFFDIO_ZEROPAGE_MODE_DONTWAKE", uint64(ZeropageDontWake)},
	{"", "UFFDIO_WRITEPROTECT_MODE_WP", uint64(WriteProtectWP)},
	{"", "UFFDIO_WRITEPROTECT_MODE_DONTWAKE", uint64(WriteProtectDontWake)},
	{"", "UFFDIO_CONTINUE_MODE_DONTWAKE", uint64(ContinueDontWake)},
	{"UFFDIO_CONTINUE_MODE_WP", "UFFDIO_CONTINUE_MODE_WP", uint64(ContinueWP)},
	{"UFFDIO_POISON_MODE_DONTWAKE", "UFFDIO_POISON_MODE_DONTWAKE", uint64(PoisonDontWake)},
	{"UFFDIO_MOVE_MODE_DONTWAKE", "UFFDIO_MOVE_MODE_DONTWAKE", uint64(MoveDontWake)},
	{"UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES", "UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES", uint64(MoveAllowSrcHoles)},

	{"", "UFFD_EVENT_PAGEFAULT", uint64(EventPagefault)},
	{"", "UFFD_EVENT_FORK", uint64(EventFork)},
	{"", "UFFD_EVENT_REMAP", uint64(EventRemap)},
	{"", "UFFD_EVENT_REMOVE", uint64(EventRemove)},
	{"", "UFFD_EVENT_UNMAP", uint64(EventUnmap)},
	{"", "UFFD_PAGEFAULT_FLAG_WRITE", uint64(FaultWrite)},
	{"", "UFFD_PAGEFAULT_FLAG_WP", uint64(FaultWP)},
	{"", "UFFD_PAGEFAULT_FLAG_MINOR", uint64(FaultMinor)},

	{"PAGEMAP_SCAN", "PAGE_IS_WPALLOWED", uint64(PageWPAllowed)},
	{"PAGEMAP_SCAN", "PAGE_IS_WRITTEN", uint64(PageWritten)},
	{"PAGEMAP_SCAN", "PAGE_IS_FILE", uint64(PageFile)},
	{"PAGEMAP_SCAN", "PAGE_IS_PRESENT", uint64(PagePresent)},
	{"PAGEMAP_SCAN", "PAGE_IS_SWAPPED", uint64(PageSwapped)},
	{"PAGEMAP_SCAN", "PAGE_IS_PFNZERO", uint64(PageZeroPFN)},
	{"PAGEMAP_SCAN", "PAGE_IS_HUGE", uint64(PageHuge)},
	{"PAGE_IS_SOFT_DIRTY", "PAGE_IS_SOFT_DIRTY", uint64(PageSoftDirty)},
	{"PAGE_IS_GUARD", "PAGE_IS_GUARD", uint64(PageGuard)},
	{"PAGEMAP_SCAN", "PM_SCAN_WP_MATCHING", uint64(ScanWPMatching)},
	{"PAGEMAP_SCAN", "PM_SCAN_CHECK_WPASYNC", uint64(ScanCheckWPAsync)},

	{"", "sizeof(struct uffdio_api)", uint64(unsafe.Sizeof(apiArg{}))},
	{"", "offsetof(struct uffdio_api, features)", uint64(unsafe.Offsetof(apiArg{}.features))},
	{"", "offsetof(struct uffdio_api, ioctls)", uint64(unsafe.Offsetof(apiArg{}.ioctls))},
	{"", "sizeof(struct uffdio_range)", uint64(unsafe.Sizeof(rangeArg{}))},
	{"", "offsetof(struct uffdio_range, len)", uint64(unsafe.Offsetof(rangeArg{}.length))},
	{"", "sizeof(struct uffdio_register)", uint64(unsafe.Sizeof(registerArg{}))},
	{"", "offsetof(struct uffdio_register, mode)", uint64(unsafe.Offsetof(registerArg{}.mode))},
	{"", "offsetof(struct uffdio_register, ioctls)", uint64(unsafe.Offsetof(registerArg{}.ioctls))},
	{"", "sizeof(struct uffdio_copy)", uint64(unsafe.Sizeof(copyArg{}))},
	{"", "offsetof(struct uffdio_copy, dst)", uint64(unsafe.Offsetof(copyArg{}.dst))},
	{"", "offsetof(struct uffdio_copy, src)", uint64(unsafe.Offsetof(copyArg{}.src))},
	{"", "offsetof(struct uffdio_copy, len)", uint64(unsafe.Offsetof(copyArg{}.length))},
	{"", "offsetof(struct uffdio_copy, mode)", uint64(unsafe.Offsetof(copyArg{}.mode))},
	{"", "offsetof(struct uffdio_copy, copy)", uint64(unsafe.Offsetof(copyArg{}.done))},
	{"UFFDIO_MOVE", "sizeof(struct uffdio_move)", uint64(unsafe.Sizeof(copyArg{}))},
	{"UFFDIO_MOVE", "offsetof(struct uffdio_move, dst)", uint64(unsafe.Offsetof(copyArg{}.dst))},
	{"UFFDIO_MOVE", "offsetof(struct uffdio_move, src)", uint64(unsafe.Offsetof(copyArg{}.src))},
	{"UFFDIO_MOVE", "offsetof(struct uffdio_move, len)", uint64(unsafe.Offsetof(copyArg{}.length))},
	{"UFFDIO_MOVE", "offsetof(struct uffdio_move, mode)", uint64(unsafe.Offsetof(copyArg{}.mode))},
	{"UFFDIO_MOVE", "offsetof(struct uffdio_move, move)", uint64(unsafe.Offsetof(copyArg{}.done))},
	{"", "sizeof(struct uffdio_zeropage)", uint64(unsafe.Sizeof(fillArg{}))},
	{"", "offsetof(struct uffdio_zeropage, mode)", uint64(unsafe.Offsetof(fillArg{}.mode))},
	{"", "offsetof(struct uffdio_zeropage, zeropage)", uint64(unsafe.Offsetof(fillArg{}.done))},
	{"", "sizeof(struct uffdio_continue)", uint64(unsafe.Sizeof(fillArg{}))},
	{"", "offsetof(struct uffdio_continue, mode)", uint64(unsafe.Offsetof(fillArg{}.mode))},
	{"", "offsetof(struct uffdio_continue, mapped)", uint64(unsafe.Offsetof(fillArg{}.done))},
	{"UFFDIO_POISON", "sizeof(struct uffdio_poison)", uint64(unsafe.Sizeof(fillArg{}))},
	{"UFFDIO_POISON", "offsetof(struct uffdio_poison, mode)", uint64(unsafe.Offsetof(fillArg{}.mode))},
	{"UFFDIO_POISON", "offsetof(struct uffdio_poison, updated)", uint64(unsafe.Offsetof(fillArg{}.done))},
	{"", "sizeof(struct uffdio_writeprotect)", uint64(unsafe.Sizeof(writeProtectArg{}))},
	{"", "offsetof(struct uffdio_writeprotect, mode)", uint64(unsafe.Offsetof(writeProtectArg{}.mode))},

	{"", "sizeof(struct uffd_msg)", uint64(unsafe.Sizeof(Msg{}))},
	{"", "offsetof(struct uffd_msg, event)", uint64(unsafe.Offsetof(Msg{}.event))},
	{"", "offsetof(struct uffd_msg, arg.pagefault.flags)", uint64(unsafe.Offsetof(Msg{}.arg))},
	{"", "offsetof(struct uffd_msg, arg.pagefault.address)", uint64(unsafe.Offsetof(Msg{}.arg)) + 8},
	{"", "offsetof(struct uffd_msg, arg.pagefault.feat.ptid)", uint64(unsafe.Offsetof(Msg{}.arg)) + 16},
	{"", "sizeof(((struct uffd_msg *)0)->arg.pagefault.feat.ptid)", 4},
	{"", "offsetof(struct uffd_msg, arg.fork.ufd)", uint64(unsafe.Offsetof(Msg{}.arg))},
	{"", "sizeof(((struct uffd_msg *)0)->arg.fork.ufd)", 4},
	{"", "offsetof(struct uffd_msg, arg.remap.from)", uint64(unsafe.Offsetof(Msg{}.arg))},
	{"", "offsetof(struct uffd_msg, arg.remap.to)", uint64(unsafe.Offsetof(Msg{}.arg)) + 8},
	{"", "offsetof(struct uffd_msg, arg.remap.len)", uint64(unsafe.Offsetof(Msg{}.arg)) + 16},
	{"", "offsetof(struct uffd_msg, arg.remove.start)", uint64(unsafe.Offsetof(Msg{}.arg))},
	{"", "offsetof(struct uffd_msg, arg.remove.end)", uint64(unsafe.Offsetof(Msg{}.arg)) + 8},

	{"PAGEMAP_SCAN", "sizeof(struct pm_scan_arg)", uint64(unsafe.Sizeof(scanArg{}))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, size)", uint64(unsafe.Offsetof(scanArg{}.size))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, flags)", uint64(unsafe.Offsetof(scanArg{}.flags))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, start)", uint64(unsafe.Offsetof(scanArg{}.start))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, end)", uint64(unsafe.Offsetof(scanArg{}.end))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, walk_end)", uint64(unsafe.Offsetof(scanArg{}.walkEnd))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, vec)", uint64(unsafe.Offsetof(scanArg{}.vec))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, vec_len)", uint64(unsafe.Offsetof(scanArg{}.vecLen))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, max_pages)", uint64(unsafe.Offsetof(scanArg{}.maxPages))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, category_inverted)", uint64(unsafe.Offsetof(scanArg{}.inverted))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, category_mask)", uint64(unsafe.Offsetof(scanArg{}.mask))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, category_anyof_mask)", uint64(unsafe.Offsetof(scanArg{}.anyOf))},
	{"PAGEMAP_SCAN", "offsetof(struct pm_scan_arg, return_mask)", uint64(unsafe.Offsetof(scanArg{}.returned))},
	{"PAGEMAP_SCAN", "sizeof(struct page_region)", uint64(unsafe.Sizeof(PageRegion{}))},
	{"PAGEMAP_SCAN", "offsetof(struct page_region, end)", uint64(unsafe.Offsetof(PageRegion{}.End))},
	{"PAGEMAP_SCAN", "offsetof(struct page_region, categories)", uint64(unsafe.Offsetof(PageRegion{}.Categories))},
}

// TestABI compiles a C program against the kernel's headers and compares. Entries newer than the headers stay unchecked here; the tests
// of their ioctls on the running kernel check them too.
func TestABI(t *testing.T) {
	var src strings.Builder
	src.WriteString("#include <linux/userfaultfd.h>\n#include <linux/fs.h>\n#include <sys/syscall.h>\n#include <stddef.h>\n#include <stdio.h>\nint main(void) {\n")
	for i, e := range abi {
		line := fmt.Sprintf("\tprintf(\"%d %%llu\\n\", (unsigned long long)(%s));\n", i, e.c)
		if e.since != "" {
			line = fmt.Sprintf("#ifdef %s\n%s#endif\n", e.since, line)
		}
		src.WriteString(line)
	}
	src.WriteString("\treturn 0;\n}\n")

	dir := t.TempDir()
	file, prog := filepath.Join(dir, "abi.c"), filepath.Join(dir, "abi")
	if err := os.WriteFile(file, []byte(src.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("gcc", "-Wall", "-Werror", "-o", prog, file).CombinedOutput(); err != nil {
		t.Fatalf("compile against <linux/userfaultfd.h>: %v (install gcc and the kernel's headers)\n%s", err, out)
	}
	out, err := exec.Command(prog).Output()
	if err != nil {
		t.Fatal(err)
	}
	checked := make([]bool, len(abi))
	for line := range bytes.Lines(out) {
		var i int
		var v uint64
		if _, err := fmt.Sscan(string(line), &i, &v); err != nil {
			t.Fatal(err)
		}
		checked[i] = true
		if e := abi[i]; e.believe != v {
			t.Errorf("%s is %#x in the kernel's headers, %#x here", e.c, v, e.believe)
		}
	}
	var old []string
	for i, e := range abi {
		if !checked[i] {
			if e.since == "" {
				t.Errorf("%s was not checked", e.c)
			}
			if !slices.Contains(old, e.since) {
				old = append(old, e.since)
			}
		}
	}
	if len(old) > 0 {
		t.Logf("the installed headers are older than: %s", strings.Join(old, ", "))
	}
}
