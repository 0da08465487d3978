"""Memory in files that no other host has: deleted ones that are mapped, and private mappings of memfds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import PidHost, Program
from test_user_states import there_and_back

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.errors import Refused
from migrator.testing.workloads import descendants

pytestmark = pytest.mark.root


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


DELETED = r"""
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096L
#define PAGES 64L

static char *map_file(const char *path, int shared, int keep, int *fd)
{
	char page[PAGE];
	long i;

	*fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0640);
	CHECK(*fd >= 0, "%s: %m", path);
	for (i = 0; i < PAGES; i++) {
		memset(page, 'a' + i % 26, PAGE);
		CHECK(pwrite(*fd, page, i == PAGES - 1 ? 100 : PAGE, i * PAGE) > 0, "%m");
	}
	char *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, shared ? MAP_SHARED : MAP_PRIVATE, *fd, 0);
	CHECK(at != MAP_FAILED, "%m");
	TRY(unlink(path));
	if (!keep)
		close(*fd);
	return at;
}

static void check_rest(const char *at, const char *what)
{
	long i;

	for (i = 8; i < PAGES; i++)
		CHECK(at[i * PAGE + 50] == 'a' + i % 26, "%s page %ld: %d", what, i, at[i * PAGE + 50]);
	CHECK(at[(PAGES - 1) * PAGE + 99] && !at[(PAGES - 1) * PAGE + 100], "%s: its end", what);
}

int main(int argc, char **argv)
{
	char path[4096];
	int fd, none;
	long tick;
	struct stat status;

	wl_start(argc, argv);
	char *shared = map_file(wl_beside(".shared"), 1, 0, &none);
	char *private = map_file(wl_beside(".private"), 0, 0, &none);
	char *both = map_file(wl_beside(".both"), 1, 1, &fd);
	TRY(fchown(fd, 7, 8));
	snprintf(path, sizeof(path), "/dev/shm/migrator-test-%d", getpid());
	char *memory = map_file(path, 1, 0, &none);
	int memfd = memfd_create("private", 0);
	CHECK(write(memfd, "constant", 8) == 8, "%m");
	char *copy = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, memfd, 0);
	char *pure = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, memfd, 0);
	copy[0] = 'C';
	sem_t *sem = (sem_t *)memory;
	TRY(sem_init(sem, 1, 0));
	pid_t child = fork();
	if (!child) {
		for (tick = 1;; tick++) {
			while (sem_wait(sem))
				;
			CHECK(*(long *)(memory + PAGE) == tick && *(long *)(shared + PAGE) == tick, "tick %ld", tick);
			*(long *)(memory + 2 * PAGE) = tick;
		}
	}
	wl_ready();
	for (tick = 1; !wl_stopping; tick++) {
		*(long *)(memory + PAGE) = *(long *)(shared + PAGE) = *(long *)(private + PAGE) = tick;
		sem_post(sem);
		while (*(volatile long *)(memory + 2 * PAGE) != tick)
			wl_sleep_us(50);
		CHECK(pwrite(fd, &tick, sizeof(tick), PAGE + 8) == sizeof(tick), "%m");
		CHECK(*(long *)(both + PAGE + 8) == tick, "a descriptor and a mapping of one file differ");
		CHECK(*(long *)(private + PAGE) == tick, "private");
		check_rest(shared, "shared");
		check_rest(private, "private");
		check_rest(both, "both");
		check_rest(memory, "memory");
		CHECK(!memcmp(copy, "Constant", 8) && !memcmp(pure, "constant", 8), "memfd: %s, %s", copy, pure);
		TRY(fstat(fd, &status));
		CHECK(!status.st_nlink && status.st_uid == 7 && status.st_gid == 8, "its owner");
		CHECK((status.st_mode & 07777) == 0640, "%o", status.st_mode);
		CHECK(status.st_size == (PAGES - 1) * PAGE + 100, "%ld bytes", (long)status.st_size);
		wl_line("tick %ld", tick);
		wl_sleep_us(2000);
	}
	CHECK(!waitpid(child, NULL, WNOHANG), "the child has ended");
	kill(child, SIGKILL);
	wl_ok();
}
"""


def test_mappings_of_deleted_files_and_of_memfds_keep_what_is_in_them(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], DELETED, tmp_path) as moving:
        there_and_back(moving, hosts, 4)
        moving.finish()


EQUAL = r"""
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096L

int main(int argc, char **argv)
{
	int fd, page, status;
	long tick;

	wl_start(argc, argv);
	fd = open(wl_beside(".mapped"), O_RDWR | O_CREAT | O_TRUNC, 0600);
	CHECK(fd >= 0, "%m");
	for (page = 0; page < 4; page++) {
		char contents[PAGE];

		memset(contents, 'f', PAGE);
		TRY(write(fd, contents, PAGE) == PAGE ? 0 : -1);
	}
	volatile char *at = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	CHECK(at != MAP_FAILED, "%m");
	at[0] = 'p';
	pid_t child = fork();
	if (!child) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		at[PAGE] = 'c';
		at[2 * PAGE] = 'f';		/* its own page, of the file's contents */
		kill(getpid(), SIGSTOP);
		CHECK(at[0] == 'p' && at[PAGE] == 'c' && at[2 * PAGE] == 'f', "own: %c%c%c", at[0], at[PAGE], at[2 * PAGE]);
		CHECK(at[3 * PAGE] == 'F', "the file's: %c", at[3 * PAGE]);
		_exit(23);
	}
	TRY(waitpid(child, &status, WUNTRACED));
	wl_ready();
	for (tick = 1; !wl_stopping; tick++) {
		wl_line("tick %ld", tick);
		wl_sleep_us(2000);
	}
	for (page = 0; page < 4; page++)
		CHECK(pwrite(fd, "F", 1, page * PAGE) == 1, "%m");
	CHECK(at[0] == 'p' && at[2 * PAGE] == 'F', "%c%c", at[0], at[2 * PAGE]);
	TRY(kill(child, SIGCONT));
	TRY(waitpid(child, &status, 0));
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 23, "the child: %#x", status);
	wl_ok();
}
"""


def test_a_page_of_its_own_that_is_like_its_file_does_not_change_with_it(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], EQUAL, tmp_path) as moving:
        there_and_back(moving, hosts, 2)
        moving.finish()


FORKED = r"""
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096L
#define PAGES 4096L
#define WORKERS 4

struct told { volatile long number; char rest[PAGE - sizeof(long)]; } *told;
static unsigned char *heap, *fixed, *names, *hidden;

static long contents(long page, int who)
{
	if (who == 3 && page >= 1024 && page < 1040)
		return 0;			/* dropped by the worker */
	if (who && page % 512 == who)
		return page * 1000 + who;	/* written by the worker */
	if (!who && page % 512 == 100)
		return page * 1000 + 77;	/* written by the parent, later */
	return page + 1;
}

static void check(int who, long tick)
{
	long page;

	for (page = 0; page < PAGES; page++) {
		long there = *(volatile long *)(heap + page * PAGE + 8);

		CHECK(there == contents(page, who), "worker %d page %ld tick %ld: %ld", who, page, tick, there);
	}
	CHECK(*(volatile long *)(heap + 200 * PAGE + 2048) == (who ? 0 : tick - 1), "worker %d: the parent's write", who);
	CHECK(fixed[0] == (who ? 0 : 'p'), "worker %d has what its parent wrote after fork(2)", who);
	CHECK(!memcmp(names, who == 2 ? "second" : "parent", 6), "worker %d: %.6s", who, (char *)names);
	if (who == 2) {
		TRY(mprotect(hidden, PAGE, PROT_READ));
		CHECK(hidden[0] == 'h', "hidden");
		TRY(mprotect(hidden, PAGE, PROT_NONE));
	}
}

static void work(int who)
{
	static long deep;
	long page, seen = 0;
	unsigned char *own = NULL;

	for (page = who; page < PAGES; page += 512)
		*(long *)(heap + page * PAGE + 8) = contents(page, who);
	if (who == 2) {
		memcpy(names, "second", 6);
		TRY(mprotect(hidden, PAGE, PROT_NONE));
	}
	if (who == 3)
		TRY(madvise(heap + 1024 * PAGE, 16 * PAGE, MADV_DONTNEED));
	if (who == 4) {
		own = mmap(heap + PAGES * PAGE, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		CHECK(own != MAP_FAILED, "%m");
		sbrk(256 * PAGE);
	}
	for (;; told[who].number = seen) {
		while (told[0].number == seen)
			wl_sleep_us(100);
		seen = told[0].number;
		check(who, seen);
		deep += seen;
		if (own)
			own[seen % 64 * PAGE] = seen;
	}
}

int main(int argc, char **argv)
{
	pid_t workers[WORKERS + 1];
	long page, tick;
	int who;

	wl_start(argc, argv);
	heap = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	names = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	fixed = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	hidden = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	told = mmap(NULL, (WORKERS + 1) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	for (page = 0; page < PAGES; page++)
		*(long *)(heap + page * PAGE + 8) = page + 1;
	memcpy(names, "parent", 6);
	hidden[0] = 'h';
	for (who = 1; who <= WORKERS; who++)
		if (!(workers[who] = fork())) {
			if (who == WORKERS && fork())	/* one is a grandchild */
				for (;;)
					pause();
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			work(who);
		}
	for (page = 100; page < PAGES; page += 512)
		*(long *)(heap + page * PAGE + 8) = contents(page, 0);
	fixed[0] = 'p';
	wl_ready();
	for (tick = 1; !wl_stopping; tick++) {
		check(0, tick);
		*(long *)(heap + 200 * PAGE + 2048) = tick;
		told[0].number = tick;
		for (who = 1; who <= WORKERS; who++)
			while (told[who].number != tick)
				wl_sleep_us(100);
		wl_line("tick %ld", tick);
	}
	for (who = 1; who <= WORKERS; who++)
		kill(workers[who], SIGKILL);
	wl_ok();
}
"""


def proportional(root: int) -> int:
    """KiB that a tree has of memory of its own, what processes share counted once."""
    total = 0
    for pid in [root, *descendants(root)]:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            total += int(line.split()[1]) if line.startswith("Pss_Anon:") else 0
    return total


def test_processes_still_share_what_fork_left_them_in_common(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    """16 MiB that five processes have: each has written some, one dropped some, one has mappings of its own."""
    with Program(hosts[0], FORKED, tmp_path) as moving:
        moving.check_alive_and_progressing(ticks=1)
        before = proportional(moving.pid)
        there_and_back(moving, hosts, 2)
        after = proportional(moving.pid)
        moving.finish()
    assert 16 << 10 < before < 24 << 10
    assert after < before + (1 << 10)


def test_saving_a_tree_that_runs_leaves_shared_what_it_shares(tmp_path: Path) -> None:
    """Reading memory by process_vm_readv(2) makes a copy of each page that is shared by copy-on-write."""
    host = PidHost("a")
    with host, Program(host, FORKED, tmp_path) as running:
        running.check_alive_and_progressing(ticks=1)
        before = proportional(running.pid)
        with open("/dev/null", "wb") as nowhere, UserSource(running.pid, nowhere.fileno(), SourceOptions()) as source:
            source.instrument("user")
            for _ in range(3):
                source.round()
        assert proportional(running.pid) < before + (1 << 10)
        running.check_alive_and_progressing()
        running.finish()


COUNTER = r"""
#include "workload.h"

int main(int argc, char **argv)
{
	long tick;

	wl_start(argc, argv);
	wl_ready();
	for (tick = 1; !wl_stopping; tick++) {
		wl_line("tick %ld", tick);
		wl_sleep_us(2000);
	}
	wl_ok();
}
"""


def test_a_program_whose_file_was_replaced_moves_with_it(hosts: tuple[PidHost, PidHost], tmp_path: Path) -> None:
    moving = Program(hosts[0], COUNTER, tmp_path)
    installed = tmp_path / "daemon"
    shutil.copy(moving.command[0], installed)
    moving.command[0] = str(installed)
    with moving:
        installed.with_suffix(".new").write_bytes(b"the next version")
        installed.with_suffix(".new").rename(installed)
        assert os.readlink(f"/proc/{moving.pid}/exe") == f"{installed} (deleted)"
        there_and_back(moving, hosts, 4)
        assert os.readlink(f"/proc/{moving.pid}/exe").endswith(" (deleted)")
        assert installed.read_bytes() == b"the next version"
        moving.finish()


NAMED = r"""
#include <sys/mman.h>
#include "workload.h"

int main(int argc, char **argv)
{
	char other[4096];
	int fd;

	wl_start(argc, argv);
	fd = open(wl_beside(".first"), O_RDWR | O_CREAT, 0600);
	TRY(ftruncate(fd, 4096));
	CHECK(mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0) != MAP_FAILED, "%m");
	snprintf(other, sizeof(other), "%s-other", wl_beside(".first"));
	TRY(link(wl_beside(".first"), other));
	TRY(unlink(wl_beside(".first")));
	close(fd);
	wl_ready();
	while (!wl_stopping)
		pause();
	wl_ok();
}
"""


def test_a_mapped_file_that_lost_the_name_it_was_opened_by_is_refused_while_it_has_others(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], NAMED, tmp_path) as moving:
        with pytest.raises(Refused, match="its name was removed, but it has others"):
            there_and_back(moving, hosts, 1)
        moving.finish()


FLEETING = r"""
#include <sys/mman.h>
#include <sys/wait.h>
#include "workload.h"
#define PAGE 4096L
#define PAGES 512L

int main(int argc, char **argv)
{
	long tick, i;
	int memfd = memfd_create("fleeting", 0);
	long size = PAGES * PAGE;

	wl_start(argc, argv);
	TRY(ftruncate(memfd, size));
	long *anon = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memset(anon, 1, size);
	wl_ready();
	for (tick = 1; !wl_stopping; tick++) {
		long page = tick % PAGES * PAGE / sizeof(long);
		pid_t child = fork();
		if (!child) { /* writes what only its own page tables know of, and ends */
			anon[page] = tick;
			long *mine = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
			mine[page] = tick;
			munmap(mine, size);
			_exit(0);
		}
		while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
			;
		for (i = tick > PAGES ? tick - PAGES + 1 : 1; i <= tick; i++) {
			long there = -1, at = i % PAGES * PAGE;
			CHECK(pread(memfd, &there, sizeof(there), at) == sizeof(there), "%m");
			CHECK(there == i, "memfd page %ld: %ld", i % PAGES, there);
			CHECK(anon[at / sizeof(long)] == i, "anonymous page %ld: %ld", i % PAGES, anon[at / sizeof(long)]);
		}
		wl_line("tick %ld", tick);
	}
	wl_ok();
}
"""


def test_what_a_process_wrote_to_shared_memory_stays_when_it_has_ended(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    with Program(hosts[0], FLEETING, tmp_path) as moving:
        there_and_back(moving, hosts, 4)
        moving.finish()
