"""One state of the kernel after the other, taken along: small programs that know what must be the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, Program, migrate, save_to_file, tour

from migrator.errors import Refused
from migrator.linux import procfs, vdso

pytestmark = pytest.mark.root


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


def there_and_back(moving: HostedWorkload, hosts: tuple[PidHost, PidHost], times: int = 2) -> None:
    tour(moving, *hosts, [3] * times)


WAITS = r"""
#include <poll.h>
#include <semaphore.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <linux/futex.h>
#include "workload.h"

#define LIMIT 3000000000LL

static int wait_in(int kind)
{
	struct timespec limit = { 3, 0 }, left;
	struct timeval limit_us = { 3, 0 };
	int quiet[2], epoll = epoll_create1(0), word = 7;
	struct pollfd pfd = { .events = POLLIN };
	struct epoll_event event;
	fd_set set;

	TRY(pipe(quiet));
	pfd.fd = quiet[0];
	event = (struct epoll_event){ .events = EPOLLIN };
	TRY(epoll_ctl(epoll, EPOLL_CTL_ADD, quiet[0], &event));
	FD_ZERO(&set);
	FD_SET(quiet[0], &set);
	switch (kind) {
	case 0: return nanosleep(&limit, NULL);
	case 1: return nanosleep(&limit, &left);
	case 2: return -clock_nanosleep(CLOCK_MONOTONIC, 0, &limit, NULL);
	case 3:
		clock_gettime(CLOCK_MONOTONIC, &limit);
		limit.tv_sec += 3;
		return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &limit, NULL);
	case 4: return poll(&pfd, 1, 3000);
	case 5: return ppoll(&pfd, 1, &limit, NULL);
	case 6: return select(quiet[0] + 1, &set, NULL, NULL, &limit_us);
	case 7: return pselect(quiet[0] + 1, &set, NULL, NULL, &limit, NULL);
	case 8: return epoll_wait(epoll, &event, 1, 3000);
	case 9: return syscall(SYS_futex, &word, FUTEX_WAIT, 7, &limit) < 0 && errno == ETIMEDOUT ? 0 : -1;
	}
	return -2;
}

int main(int argc, char **argv)
{
	int kind, status;

	wl_start(argc, argv);
	for (kind = 0; kind < 10; kind++) {
		if (fork())
			continue;
		wl_line("waiting %d", kind);
		int64_t before = now_ns();
		int result = wait_in(kind), error = errno;
		int64_t took = now_ns() - before;
		CHECK(result == 0, "kind %d: %d, %s", kind, result, strerror(error));
		CHECK(took >= LIMIT - 1000000, "kind %d: %ld us", kind, (long)(took / 1000));
		CHECK(took < 2 * LIMIT + 2000000000LL, "kind %d: %ld us", kind, (long)(took / 1000));
		wl_line("waited %d %ld us", kind, (long)(took / 1000));
		_exit(0);
	}
	wl_sleep_us(100000);
	wl_ready();
	for (kind = 0; kind < 10; kind++) {
		while (wait(&status) < 0 && errno == EINTR)
			;
		CHECK(!status, "status %x", status);
	}
	wl_line("tick 1");
	wl_ok();
}
"""


def test_waits_with_a_limit_go_on_for_what_is_left_of_them(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    """None is shorter, and those of which the kernel tells the rest are not longer. The rest of the others is reckoned
    from when a task ran last: on a busy machine that is not known for each, which then takes the whole time again."""
    with Program(hosts[0], WAITS, tmp_path) as waiting:
        time.sleep(1)
        migrate(waiting, *hosts)
        lines = waiting.wait_for(lambda lines: "ok" in lines or not waiting.alive(), seconds=15)
    took = {int(line.split()[1]): int(line.split()[2]) for line in lines if line.startswith("waited")}
    assert took.keys() == set(range(10))
    in_time = {kind for kind, us in took.items() if us < 3_900_000}
    assert in_time >= {1, 2, 3, 5, 6, 7}, took
    assert in_time & {0, 4, 8, 9}, took


STOPPED = r"""
#include <sys/wait.h>
#include "workload.h"
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	pid_t child = fork();
	if (!child)
		for (;;)
			wl_sleep_us(1000);
	TRY(kill(child, SIGSTOP));
	wl_sleep_us(50000);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		char path[64], state = 0;
		snprintf(path, sizeof(path), "/proc/%d/stat", child);
		for (int tries = 0; state != 'T' && tries < 5000; tries++) { /* it may be just stopping again */
			FILE *f = fopen(path, "r");
			CHECK(f && fscanf(f, "%*d (%*[^)]) %c", &state) == 1, "%s", path);
			fclose(f);
			wl_sleep_us(1000);
		}
		CHECK(state == 'T', "state %c", state);
		wl_line("tick %ld", n);
		wl_sleep_us(20000);
	}
	TRY(kill(child, SIGCONT));
	TRY(kill(child, SIGKILL));
	wl_ok();
}
"""


def test_a_stopped_process_stays_stopped_and_can_be_continued(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], STOPPED, tmp_path) as moving:
        there_and_back(moving, hosts)
        moving.finish()


POLLING = r"""
#include <poll.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include "workload.h"
static struct pollfd polled[2];
int main(int argc, char **argv)
{
	int quiet[2], ready[2], status;
	struct pollfd seen[2];
	struct iovec mine = { seen, sizeof(seen) }, theirs = { polled, sizeof(polled) };

	wl_start(argc, argv);
	TRY(pipe(quiet));
	TRY(pipe(ready));
	pid_t child = fork();
	if (!child) {
		polled[0] = (struct pollfd){ quiet[0], POLLIN, 0 };
		polled[1] = (struct pollfd){ ready[0], POLLIN, 0 };
		CHECK(poll(polled, 2, 60000) == 1, "poll");
		CHECK(!polled[0].revents && polled[1].revents == POLLIN, "%d %d", polled[0].revents, polled[1].revents);
		_exit(0);
	}
	wl_sleep_us(50000);
	TRY(kill(child, SIGSTOP));
	TRY(waitpid(child, &status, WUNTRACED));
	TRY(write(ready[1], "x", 1)); /* the call was interrupted before, and has told of nothing */
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		CHECK(process_vm_readv(child, &mine, 1, &theirs, 1, 0) == sizeof(seen), "%m");
		CHECK(seen[1].fd == ready[0] && !seen[1].revents, "fd %d: %x", seen[1].fd, seen[1].revents);
		wl_line("tick %ld", n);
		wl_sleep_us(20000);
	}
	TRY(kill(child, SIGCONT));
	TRY(waitpid(child, &status, 0));
	CHECK(!status, "status %x", status);
	wl_ok();
}
"""


def test_an_interrupted_poll_of_what_is_ready_by_now_is_kept_as_it_was(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], POLLING, tmp_path) as moving:
        there_and_back(moving, hosts)
        moving.finish()


LAST_STEPS = """
	struct itimerspec every = { { 0, 5000000 }, { 0, 5000000 } };
	int timer = timerfd_create(CLOCK_MONOTONIC, 0), listener = socket(AF_UNIX, SOCK_STREAM, 0);
	unsigned long expired;
	TRY(timerfd_settime(timer, 0, &every, NULL));
	struct sockaddr_un name = { .sun_family = AF_UNIX };
	snprintf(name.sun_path, sizeof(name.sun_path), "%s.socket", argv[1]);
	TRY(bind(listener, (struct sockaddr *)&name, sizeof(name)));
	TRY(listen(listener, 5));
	wl_ready();
"""
SETTLED = "#include <sys/socket.h>\n#include <sys/timerfd.h>\n#include <sys/un.h>" + STOPPED.replace(
    "wl_ready();", LAST_STEPS
).replace("wl_sleep_us(20000);", "while (read(timer, &expired, 8) != 8 && !wl_stopping);")


def test_nothing_is_left_undone_by_an_agent_that_dies_ahead_of_the_last_step(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], SETTLED, tmp_path) as moving:
        migrate(moving, *hosts, last="settle")
        moving.check_alive_and_progressing()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(f"{moving.out}.socket")
        moving.finish()


RELATIONS = r"""
#include <sys/prctl.h>
#include <sys/wait.h>
#include "workload.h"
static void idle(void) { signal(SIGTERM, SIG_DFL); for (;;) pause(); }
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	TRY(prctl(PR_SET_CHILD_SUBREAPER, 1));
	if (!fork()) { /* a group whose leader has ended */
		TRY(setpgid(0, 0));
		for (int i = 0; i < 2; i++)
			if (!fork()) idle();
		_exit(0);
	}
	wait(NULL);
	if (!fork()) { /* a session whose leader has ended, with a group in it */
		TRY(setsid());
		if (!fork()) { TRY(setpgid(0, 0)); if (!fork()) idle(); idle(); }
		if (!fork()) idle();
		wl_sleep_us(20000);
		_exit(0);
	}
	wait(NULL);
	if (!fork()) { TRY(setsid()); if (!fork()) idle(); idle(); }
	if (!fork()) _exit(3); /* a zombie */
	wl_sleep_us(20000);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		wl_line("tick %ld", n);
		wl_sleep_us(20000);
	}
	wl_ok();
}
"""


def relations(host: PidHost) -> dict[int, tuple[int, int, int, str]]:
    """inner pid: parent (0 for process 1), group, session, state, of all below a host's process 1."""
    out = {}
    for pid in procfs.descendants(host.pid)[1:]:
        state = procfs.status(pid)
        parent = procfs.ns_pid(procfs.status(int(state["PPid"])))
        out[procfs.ns_pid(state)] = (
            0 if parent == 1 else parent,
            procfs.ns_pid(state, "NSpgid"),
            procfs.ns_pid(state, "NSsid"),
            state["State"][0],
        )
    return out


def test_groups_and_sessions_of_ended_leaders_and_zombies(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], RELATIONS, tmp_path) as moving:
        before = relations(hosts[0])
        assert len(before) == 9
        migrate(moving, *hosts)
        moving.check_alive_and_progressing(ticks=1)
        assert relations(hosts[1]) == before
        migrate(moving, hosts[1], hosts[0])
        moving.check_alive_and_progressing(ticks=1)
        assert relations(hosts[0]) == before


MEMORY = r"""
#include <sys/mman.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096UL
static const char constants[3 * PAGE] __attribute__((aligned(4096))) = "constant";
int main(int argc, char **argv)
{
	unsigned long *shared, *hidden, *sparse, *executable, *zeros;
	int fd, memfd;

	char *relro = (char *)constants;

	asm volatile("" : "+r"(relro)); /* the compiler knows what constants are, and is wrong here */
	wl_start(argc, argv);
	shared = mmap(NULL, 16 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	hidden = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	hidden[512] = 4711;
	TRY(mprotect(hidden, 4 * PAGE, PROT_NONE));
	sparse = mmap(NULL, 64UL << 30, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	CHECK(sparse != MAP_FAILED, "%s", strerror(errno));
	sparse[(63UL << 30) / 8] = 63;
	zeros = mmap(NULL, 32UL << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(zeros, 0, 32UL << 20);
	executable = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memcpy(executable, "\xb8\x2a\0\0\0\xc3", 6);
	TRY(mprotect(executable, PAGE, PROT_READ | PROT_EXEC));
	TRY(mprotect(relro + PAGE, PAGE, PROT_READ | PROT_WRITE));
	strcpy(relro + PAGE, "dirty");
	TRY(mprotect(relro + PAGE, PAGE, PROT_READ));
	fd = TRY(open("/proc/self/exe", O_RDONLY));
	char *file = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	file[100] = 'x';
	memfd = TRY(memfd_create("thing", MFD_CLOEXEC));
	TRY(ftruncate(memfd, 8 * PAGE));
	unsigned long *mapped = mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
	mapped[1024] = 5;
	if (!fork())
		for (;;) {
			__atomic_add_fetch(&shared[0], 1, __ATOMIC_SEQ_CST);
			__atomic_add_fetch(&mapped[0], 1, __ATOMIC_SEQ_CST);
			wl_sleep_us(500);
		}
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		unsigned long before = __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST), through, value;

		for (int tries = 0; __atomic_load_n(&shared[0], __ATOMIC_SEQ_CST) == before; tries++) {
			CHECK(tries < 1000, "the child is not seen"); /* on a busy machine its turn comes late */
			wl_sleep_us(10000);
		}
		TRY(pread(memfd, &value, 8, 0));
		through = mapped[0];
		CHECK(through >= value && through - value < 100000, "memfd %lu mapping %lu", value, through);
		CHECK(mapped[1024] == 5, "memfd");
		TRY(mprotect(hidden, 4 * PAGE, PROT_READ));
		CHECK(hidden[512] == 4711 && !hidden[0], "hidden %lu", hidden[512]);
		TRY(mprotect(hidden, 4 * PAGE, PROT_NONE));
		CHECK(sparse[(63UL << 30) / 8] == 63 && !sparse[0], "sparse");
		CHECK(((int (*)(void))executable)() == 42, "code");
		CHECK(!strcmp(relro, "constant") && !strcmp(relro + PAGE, "dirty"), "%s %s", relro, relro + PAGE);
		CHECK(file[100] == 'x' && file[1] == 'E', "file");
		CHECK(!zeros[(n * 4096) % (32UL << 17)], "zeros");
		shared[1 + n % 8000] = n;
		wl_line("tick %ld", n);
	}
	wl_ok();
}
"""


def test_hidden_sparse_shared_dirty_and_executable_memory(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], MEMORY, tmp_path) as moving:
        there_and_back(moving, hosts, 4)
        moving.finish()


def test_zeros_and_reservations_cost_no_bytes(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], MEMORY, tmp_path) as moving:
        save_to_file(moving, hosts[0], tmp_path / "image", rounds=2)
    assert os.path.getsize(tmp_path / "image") < 1 << 20


BIG = r"""
#include <sys/mman.h>
#include "workload.h"
#define PAGE 4096UL
#define PAGES 8192UL
static unsigned long *base;
static unsigned generation[PAGES];
static uint64_t state = 88172645463325252ULL;
static unsigned long pick(unsigned long n)
{
	state = wl_mix(state + 1);
	return state % n;
}
static void check(unsigned long page)
{
	unsigned long *at = base + page * 512;
	CHECK(at[0] == generation[page] && at[511] == generation[page] * 3,
		"page %lu: %lu %lu, not %u", page, at[0], at[511], generation[page]);
}
static int moves(unsigned long *from, unsigned long *to, unsigned long pages)
{
	return mremap(from, pages * PAGE, pages * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) != MAP_FAILED;
}
/* Where a hole was filled while it was tracked there are several mappings: they move page by page. */
static void move(unsigned long *from, unsigned long *to, unsigned long pages)
{
	if (moves(from, to, pages))
		return;
	CHECK(errno == EFAULT, "%s", strerror(errno));
	for (unsigned long i = 0; i < pages; i++)
		if (!msync(from + i * 512, PAGE, MS_ASYNC)) /* not moved yet */
			CHECK(moves(from + i * 512, to + i * 512, 1), "%s", strerror(errno));
}
static void fill(unsigned long page)
{
	base[page * 512] = ++generation[page];
	base[page * 512 + 511] = generation[page] * 3UL;
}
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	base = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	for (unsigned long i = 0; i < PAGES; i++)
		if (i % 7 < 5)
			fill(i);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		unsigned long at = pick(PAGES - 600), count = 1 + pick(n % 3 ? 4 : 600);
		for (int i = 0; i < 20; i++) {
			fill(pick(PAGES));
			check(pick(PAGES));
		}
		switch (n % 40) {
		case 10:
			TRY(madvise(base + at * 512, count * PAGE, MADV_DONTNEED));
			memset(&generation[at], 0, count * sizeof(int));
			break;
		case 20: /* a hole, filled again */
			TRY(munmap(base + at * 512, count * PAGE));
			CHECK(mmap(base + at * 512, count * PAGE, PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED, "mmap");
			memset(&generation[at], 0, count * sizeof(int));
			break;
		case 30: { /* to somewhere else */
			unsigned long *moved = mmap(NULL, PAGES * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

			for (unsigned long i = 0; i < PAGES; i += 64)
				move(base + i * 512, moved + i * 512, 64);
			base = moved;
			break;
		}
		}
		if (n % 100 == 0) {
			for (unsigned long i = 0; i < PAGES; i++)
				check(i);
			wl_line("tick %ld", n / 100);
		}
		wl_sleep_us(200);
	}
	wl_ok();
}
"""


def test_a_big_mapping_that_is_dropped_cut_and_moved_all_the_time(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], BIG, tmp_path) as moving:
        there_and_back(moving, hosts, 8)
        moving.finish()


BEYOND = r"""
#include <fcntl.h>
#include <sys/mman.h>
#include "workload.h"
#define PAGE 4096UL
#define PAGES 64UL
/* As a loader of programs: a file is mapped with what lies beyond its end, and memory over that at once. */
int main(int argc, char **argv)
{
	char path[4096], page[PAGE], *home = NULL;
	wl_start(argc, argv);
	snprintf(path, sizeof path, "%s.file", argv[1]);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	memset(page, 7, PAGE);
	CHECK(write(fd, page, PAGE) == PAGE, "%s", strerror(errno));
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		char *base = mmap(home, PAGES * PAGE, n & 1 ? PROT_READ : PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
		CHECK(base != MAP_FAILED, "%s", strerror(errno));
		home = base;
		if (n % 7 == 0)
			wl_sleep_us(300);
		CHECK(mmap(base + PAGE, (PAGES - 1) * PAGE, PROT_READ | PROT_WRITE,
			MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) != MAP_FAILED, "mmap");
		for (unsigned long i = 1; i < PAGES; i++)
			base[i * PAGE] = n % 3 ? (char)(n + i) : 0;
		if (n % 5 == 0)
			wl_sleep_us(300);
		CHECK(base[0] == 7, "page 0 has %d", base[0]);
		for (unsigned long i = 1; i < PAGES; i++)
			CHECK(base[i * PAGE] == (n % 3 ? (char)(n + i) : 0), "page %lu has %d", i, base[i * PAGE]);
		TRY(munmap(base, PAGES * PAGE));
		if (n % 100 == 0)
			wl_line("tick %ld", n / 100);
	}
	wl_ok();
}
"""


def test_memory_that_is_mapped_over_what_lies_beyond_the_end_of_a_file(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    """What is sent of it while it is still taken for the file's has no place at the destination, and no meaning."""
    with Program(hosts[0], BEYOND, tmp_path) as moving:
        tour(moving, *hosts, [40] * 4)
        moving.finish()


JOINED = r"""
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <signal.h>
#include "workload.h"
#define PAGE 4096UL
/* A child splits and joins a private mapping of a file all the time. Two pages are zero, and are not so in the file. */
int main(int argc, char **argv)
{
	char path[4096], page[PAGE], zeros[PAGE] = { 0 };
	wl_start(argc, argv);
	snprintf(path, sizeof path, "%s.file", argv[1]);
	int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	for (int i = 0; i < 6; i++) {
		memset(page, 7 + i, PAGE);
		CHECK(write(fd, page, PAGE) == PAGE, "%s", strerror(errno));
	}
	char *base = mmap(NULL, 6 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(base != MAP_FAILED, "%s", strerror(errno));
	if (fork()) {
		wl_ready();
		for (long n = 1; !wl_stopping; n++) {
			wl_line("tick %ld", n);
			wl_sleep_us(10000);
		}
		CHECK(getppid() > 0, "no parent");
		wl_ok();
	}
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	memset(base + PAGE, 0, PAGE);
	memset(base + 4 * PAGE, 0, PAGE);
	base[2 * PAGE] = 1;
	for (long n = 1;; n++) {
		TRY(mprotect(base, 3 * PAGE, PROT_READ));
		wl_sleep_us(40000);
		TRY(mprotect(base, 3 * PAGE, PROT_READ | PROT_WRITE));
		wl_sleep_us(40000);
		CHECK(!memcmp(base + PAGE, zeros, PAGE), "page 1 has %d", base[PAGE]);
		CHECK(!memcmp(base + 4 * PAGE, zeros, PAGE), "page 4 has %d", base[4 * PAGE]);
		CHECK(base[0] == 7 && base[2 * PAGE] == 1 && base[5 * PAGE] == 12, "%d %d", base[0], base[2 * PAGE]);
		if (n % 10 == 0)
			wl_line("child %ld", n);
	}
}
"""


def test_zeros_over_a_file_whose_mapping_is_split_and_joined(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], JOINED, tmp_path) as moving:
        there_and_back(moving, hosts, 6)
        moving.wait_for(lambda lines: sum(line.startswith("child") for line in lines) > 1, seconds=15)
        moving.finish()


TRAPS = r"""
#include "workload.h"
static volatile long traps;
static void on_trap(int sig) { (void)sig; traps++; }
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	signal(SIGTRAP, on_trap);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		asm volatile("int3");
		CHECK(traps == n, "%ld traps, not %ld", traps, n);
		wl_line("tick %ld", n);
		usleep(n % 3 * 3000);
	}
	wl_ok();
}
"""


def test_a_program_that_handles_its_own_breakpoints(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], TRAPS, tmp_path) as moving:
        there_and_back(moving, hosts, 6)
        moving.finish()


SHORT = r"""
#include "workload.h"
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		struct timespec ts = { 0, n % 40 * 25000 };
		CHECK(!nanosleep(&ts, NULL) || wl_stopping, "%s", strerror(errno));
		if (n % 500 == 0)
			wl_line("tick %ld", n);
	}
	wl_ok();
}
"""


def test_sleeps_that_are_almost_over_leave_nothing_behind(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], SHORT, tmp_path) as moving:
        there_and_back(moving, hosts, 12)
        assert min(v.start for v in procfs.maps(moving.pid)) > 4 << 20  # where the restarting code stood
        moving.finish()


EXECUTES = r"""
#include <sys/wait.h>
#include <spawn.h>
#include "workload.h"
extern char **environ;
int main(int argc, char **argv)
{
	if (argc > 2) { /* what is executed: a child with memory of its own */
		char *memory = calloc(1, 1 << 20);
		memset(memory, argv[2][0], 1 << 20);
		usleep(15000);
		for (int i = 0; i < 1 << 20; i++)
			if (memory[i] != argv[2][0])
				_exit(9);
		_exit(argv[2][0] - 'a');
	}
	wl_start(argc, argv);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		char letter[2] = { 'a' + n % 5, 0 };
		char *args[] = { argv[0], argv[1], letter, NULL };
		int status;
		pid_t pid;

		CHECK(posix_spawn(&pid, argv[0], NULL, NULL, args, environ) == 0, "spawn");
		while (waitpid(pid, &status, 0) < 0)
			CHECK(errno == EINTR, "%s", strerror(errno));
		CHECK(WIFEXITED(status) && WEXITSTATUS(status) == n % 5, "status %x", status);
		wl_line("tick %ld", n);
	}
	wl_ok();
}
"""


def test_programs_that_are_spawned_and_execute_all_the_time(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], EXECUTES, tmp_path) as moving:
        there_and_back(moving, hosts, 6)
        moving.finish()


VFORK = r"""
#include <sys/wait.h>
#include "workload.h"
int main(int argc, char **argv)
{
	wl_start(argc, argv);
	wl_ready();
	for (long n = 1; !wl_stopping; n++) {
		pid_t pid = vfork();
		if (!pid) {
			usleep(30000); /* a parent in a killable sleep that no tracer can interrupt */
			_exit(0);
		}
		while (waitpid(pid, NULL, 0) < 0)
			CHECK(errno == EINTR, "%s", strerror(errno));
		wl_line("tick %ld", n);
		usleep(2000);
	}
	wl_ok();
}
"""


def test_a_parent_that_waits_in_vfork_is_stopped_once_its_child_has_gone_on(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], VFORK, tmp_path) as moving:
        there_and_back(moving, hosts, 4)
        moving.finish()


LEADERLESS = r"""
#include <pthread.h>
#include "workload.h"
static void *run(void *unused) { for (;;) pause(); return unused; }
int main(int argc, char **argv)
{
	pthread_t thread;
	wl_start(argc, argv);
	if (!fork()) {
		pthread_create(&thread, NULL, run, NULL);
		pthread_exit(NULL);
	}
	wl_sleep_us(30000);
	wl_ready();
	for (;;)
		pause();
}
"""


def test_a_process_whose_leader_has_ended_is_refused(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], LEADERLESS, tmp_path) as moving, pytest.raises(Refused, match="main thread has ended"):
        migrate(moving, *hosts)


QUEUED = r"""
#include <pthread.h>
#include <sys/syscall.h>
#include "workload.h"
static volatile pid_t tid;
static sigset_t set;
static void *run(void *unused)
{
	struct timespec none = { 0, 0 };
	siginfo_t info;

	(void)unused;
	tid = gettid();
	for (long n = 1; !wl_stopping; n++) {
		for (int i = 0; i < 40; i++) {
			siginfo_t queued = { .si_signo = SIGRTMIN + 3 + i % 3, .si_code = SI_QUEUE };
			queued.si_value.sival_int = n * 100 + i;
			queued.si_pid = getpid();
			TRY(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), queued.si_signo, &queued));
		}
		TRY(kill(getpid(), SIGUSR2));
		wl_sleep_us(20000);
		for (int i = 0; i < 40; i++) {
			int number = i < 14 ? i * 3 : i < 27 ? (i - 14) * 3 + 1 : (i - 27) * 3 + 2;
			CHECK(sigtimedwait(&set, &info, &none) == SIGRTMIN + 3 + number % 3,
				"queue %d: %d", i, info.si_signo);
			CHECK(info.si_value.sival_int == n * 100 + number && info.si_code == SI_QUEUE,
				"value %d is %d", number, info.si_value.sival_int);
		}
		CHECK(sigtimedwait(&set, &info, &none) < 0, "one too many");
		sigset_t user;
		sigemptyset(&user);
		sigaddset(&user, SIGUSR2);
		CHECK(sigtimedwait(&user, &info, &none) == SIGUSR2 && info.si_code == SI_USER, "SIGUSR2 is lost");
		wl_line("tick %ld", n);
	}
	return NULL;
}
int main(int argc, char **argv)
{
	pthread_t thread;
	sigset_t blocked;

	wl_start(argc, argv);
	sigemptyset(&set);
	for (int i = 0; i < 3; i++)
		sigaddset(&set, SIGRTMIN + 3 + i);
	blocked = set;
	sigaddset(&blocked, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &blocked, NULL);
	pthread_create(&thread, NULL, run, NULL);
	wl_ready();
	while (!wl_stopping)
		wl_sleep_us(10000);
	pthread_join(thread, NULL);
	wl_ok();
}
"""


MANY_QUEUED = r"""
#include "workload.h"
#define COUNT 10000

int main(int argc, char **argv)
{
	struct timespec none = { 0, 0 };
	siginfo_t info;
	sigset_t set;
	int i;

	wl_start(argc, argv);
	sigemptyset(&set);
	sigaddset(&set, SIGRTMIN + 3);
	TRY(sigprocmask(SIG_BLOCK, &set, NULL));
	for (i = 0; i < COUNT; i++)
		TRY(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){ .sival_int = i }));
	wl_ready();
	for (long tick = 1; !wl_stopping; tick++) {
		wl_line("tick %ld", tick);
		wl_sleep_us(2000);
	}
	for (i = 0; i < COUNT; i++)
		CHECK(sigtimedwait(&set, &info, &none) > 0 && info.si_value.sival_int == i, "signal %d", i);
	CHECK(sigtimedwait(&set, &info, &none) < 0, "one too many");
	wl_ok();
}
"""


def test_thousands_of_queued_signals_keep_their_order(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with Program(hosts[0], MANY_QUEUED, tmp_path) as moving:
        there_and_back(moving, hosts, 2)
        moving.finish()


def test_queues_of_signals_of_a_thread_and_of_its_process_with_what_they_carry(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], QUEUED, tmp_path) as moving:
        there_and_back(moving, hosts, 4)
        moving.finish()


def test_credentials_of_an_ordinary_user(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with HostedWorkload(hosts[0], "creds", tmp_path, 4321, 4322) as moving:
        there_and_back(moving, hosts, 2)
        moving.finish()


def test_a_task_that_has_lost_its_memory_is_not_taken_for_one_without_a_vdso() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ProcessLookupError, match=f"pid {ended.pid} has ended"):
        vdso.digest(ended.pid)
    ended.wait()


def test_a_workload_killed_while_it_moves_is_reported(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    with HostedWorkload(hosts[0], "counter", tmp_path) as moving:
        os.kill(moving.pid, signal.SIGKILL)
        with pytest.raises(Exception, match=r"(ended|no such|No such|gone)"):
            migrate(moving, *hosts)
