// The C floor: the least code that answers page faults of another process with the same ioctls as machpager. It keeps no page table, asks
// nobody, stores nothing: what it costs is what the kernel costs, and a pager cannot be faster than this in the same way.
//
// usage: floor, with a SOCK_SEQPACKET socket on fd 3. One message comes in, struct hello with two descriptors, a userfaultfd and the file
// behind the memory; one byte goes back when faults are being answered. The process ends when the socket does.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/userfaultfd.h>

#ifndef UFFDIO_CONTINUE_MODE_WP
#define UFFDIO_CONTINUE_MODE_WP ((__u64)1 << 1) // Linux 6.4
#endif

enum { PAGE = 4096, EXTENT = 2 << 20 };

// How to answer; the same numbers are in floor.go.
enum {
	STORED = 1 << 0, // the pages have contents
	PWRITE = 1 << 1, // fill by pwrite to the file and CONTINUE, not by COPY
	POLL = 1 << 2,   // the descriptor does not block: poll, then read
};

struct hello {
	uint64_t base[2]; // where the client has mapped the file, one or two times
	uint64_t size;    // bytes of one mapping
	uint64_t cluster; // bytes per answer, a power of two
	uint64_t flags;
};

static struct hello h;
static int uffd, file;
static uint8_t *source; // what the pages contain; with STORED h.size bytes, else one cluster of zeros

static void die(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	_exit(1);
}

static void *memory(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		die("mmap");
	memset(p, 0, size); // a read fault would map the shared page of zeros: faster to copy from than any real source
	for (size_t i = 0; i < size; i += PAGE)
		((volatile uint8_t *)p)[i] = 0;
	return p;
}

static void receive(void)
{
	union {
		char buf[CMSG_SPACE(2 * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec iov = {&h, sizeof h};
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.buf, .msg_controllen = sizeof control.buf};
	ssize_t n = recvmsg(3, &msg, MSG_CMSG_CLOEXEC);
	if (n == 0)
		_exit(0);
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	if (n != sizeof h || c == NULL || c->cmsg_len != CMSG_LEN(2 * sizeof(int)))
		die("receive hello");
	int fd[2];
	memcpy(fd, CMSG_DATA(c), sizeof fd);
	uffd = fd[0];
	file = fd[1];
}

static void *watch(void *unused)
{
	char b;
	while (read(3, &b, 1) < 0 && errno == EINTR)
		;
	_exit(0);
	return unused;
}

static void wake(uint64_t addr, uint64_t len)
{
	struct uffdio_range r = {addr, len};
	if (ioctl(uffd, UFFDIO_WAKE, &r) && errno != ENOENT && errno != ESRCH)
		die("UFFDIO_WAKE");
}

// failed decides about an ioctl that did not do its work: a duplicate is woken, whatever else goes wrong ends the handler.
static void failed(const char *what, uint64_t addr, uint64_t len)
{
	if (errno != EEXIST && errno != EAGAIN)
		die(what);
	wake(addr, len);
}

static void copy(uint64_t addr, const uint8_t *src, uint64_t mode)
{
	struct uffdio_copy c = {.dst = addr, .src = (uint64_t)src, .len = h.cluster, .mode = mode};
	if (ioctl(uffd, UFFDIO_COPY, &c))
		failed("UFFDIO_COPY", addr, h.cluster);
}

static void resume(uint64_t addr, uint64_t len, uint64_t mode)
{
	struct uffdio_continue c = {.range = {addr, len}, .mode = mode};
	if (ioctl(uffd, UFFDIO_CONTINUE, &c))
		failed("UFFDIO_CONTINUE", addr, len);
}

static void unprotect(uint64_t addr)
{
	struct uffdio_writeprotect w = {.range = {addr, PAGE}, .mode = 0};
	if (ioctl(uffd, UFFDIO_WRITEPROTECT, &w))
		failed("UFFDIO_WRITEPROTECT", addr, PAGE);
}

static void answer(uint64_t addr, uint64_t flags)
{
	if (flags & UFFD_PAGEFAULT_FLAG_WP) {
		unprotect(addr);
		return;
	}
	int write = flags & UFFD_PAGEFAULT_FLAG_WRITE;
	if (flags & UFFD_PAGEFAULT_FLAG_MINOR) {
		resume(addr, PAGE, write ? 0 : UFFDIO_CONTINUE_MODE_WP);
		return;
	}
	uint64_t base = h.base[addr - h.base[0] < h.size ? 0 : 1];
	uint64_t off = (addr - base) & ~(h.cluster - 1);
	const uint8_t *src = h.flags & STORED ? source + off : source;
	if (!(h.flags & PWRITE)) {
		copy(base + off, src, write ? 0 : UFFDIO_COPY_MODE_WP);
		return;
	}
	if (pwrite(file, src, h.cluster, off) != (ssize_t)h.cluster)
		die("pwrite");
	resume(base + off, h.cluster, write ? 0 : UFFDIO_CONTINUE_MODE_WP);
}

int main(void)
{
	receive();
	source = memory(h.flags & STORED ? h.size : h.cluster);
	if (h.flags & STORED)
		for (uint64_t i = 0; i < h.size / 8; i++) // the contents that bench expects: see pattern in client.go
			((uint64_t *)source)[i] = (i / 512 + 1) * 0x9E3779B97F4A7C15ull;
	pthread_t t;
	if ((errno = pthread_create(&t, NULL, watch, NULL)))
		die("pthread_create");
	if (write(3, "r", 1) != 1)
		die("write");
	for (;;) {
		struct uffd_msg m[16];
		if (h.flags & POLL) {
			struct pollfd p = {uffd, POLLIN, 0};
			if (poll(&p, 1, -1) < 0 && errno != EINTR)
				die("poll");
		}
		ssize_t n = read(uffd, m, sizeof m);
		if (n < 0) {
			if (errno == EAGAIN || errno == EINTR)
				continue;
			die("read userfaultfd");
		}
		for (int i = 0; i < (int)(n / sizeof m[0]); i++)
			if (m[i].event == UFFD_EVENT_PAGEFAULT)
				answer(m[i].arg.pagefault.address & ~(uint64_t)(PAGE - 1), m[i].arg.pagefault.flags);
	}
}
