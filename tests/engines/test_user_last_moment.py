"""What a program changes when everything has been read ahead, and it is about to be stopped: the copy has it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import PidHost, Program, migrate

from migrator.engine.user.dump import vma_flags as of_mappings
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed
from migrator.linux import vma_flags

pytestmark = pytest.mark.root

# Waits for a file "go", changes something about itself, says "done", and checks it once there is "check".
WAITING = """
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/personality.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sched.h>
#include <pthread.h>
#include <grp.h>
#include "workload.h"
#define LENGTH (16 << 12)
static char *memory;
#define UNUSED __attribute__((unused))
UNUSED static int has_flag(void *start, const char *flag)
{
	char line[4096], head[32];
	FILE *file = fopen("/proc/self/smaps", "r");
	int here = 0, found = 0;

	snprintf(head, sizeof(head), "%lx-", (unsigned long)start);
	while (fgets(line, sizeof(line), file)) {
		if (strchr(line, '-') && strchr(line, '-') < strchr(line, ' '))
			here = !strncmp(line, head, strlen(head));
		if (here && !strncmp(line, "VmFlags:", 8) && strstr(line, flag))
			found = 1;
	}
	fclose(file);
	return found;
}
UNUSED static unsigned long field(int number)
{
	char text[4096], *at;
	FILE *file = fopen("/proc/self/stat", "r");

	CHECK(fgets(text, sizeof(text), file), "stat");
	fclose(file);
	at = strrchr(text, ')') + 1;
	for (number -= 2; number > 1; number--)
		at = strchr(at + 1, ' ');
	return strtoul(at + 1, NULL, 10);
}
static void write_text(const char *path, const char *text)
{
	FILE *file = fopen(path, "w");

	CHECK(file && fputs(text, file) >= 0 && !fclose(file), "%s", path);
}
CHANGES
static void wait_for(const char *name)
{
	while (access(wl_beside(name), F_OK) && !wl_stopping)
		usleep(500);
}
static void *other(void *arg)
{
	wait_for("go");
	if (!wl_stopping) {
		in_thread();
		write_text(wl_beside("done"), "");
		wait_for("check");
		check_in_thread();
		wl_line("as it was");
	}
	return arg;
}
int main(int argc, char **argv)
{
	pthread_t thread;

	wl_start(argc, argv);
	memory = mmap((void *)0x200000000, LENGTH, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	memset(memory, 7, LENGTH);
	before();
	pthread_create(&thread, NULL, other, NULL);
	wl_ready();
	pthread_join(thread, NULL);
	CHECK(wl_stopping || (memory[0] == 7 && memory[LENGTH - 1] == 7), "contents");
	while (!wl_stopping)
		usleep(500);
	wl_ok();
}
"""


def flag_is(flag: str, change: str, *, first: str = "", there: bool = True) -> tuple[str, str, str]:
    """What is done ahead, in the last moment, and checked."""
    return first, change, f'CHECK({"" if there else "!"}has_flag(memory, " {flag}"), "{flag}");'


def advice(number: str) -> str:
    return f"TRY(madvise(memory, LENGTH, {number}));"


CHANGES = {
    "MADV_DONTFORK": flag_is("dc", advice("MADV_DONTFORK")),
    "MADV_DOFORK": flag_is("dc", advice("MADV_DOFORK"), first=advice("MADV_DONTFORK"), there=False),
    "MADV_WIPEONFORK": flag_is("wf", advice("MADV_WIPEONFORK")),
    "MADV_DONTDUMP": flag_is("dd", advice("MADV_DONTDUMP")),
    "MADV_SEQUENTIAL": flag_is("sr", advice("MADV_SEQUENTIAL")),
    "mlock": flag_is("lo", "TRY(mlock(memory, LENGTH));"),
    "munlock": flag_is("lo", "TRY(munlock(memory, LENGTH));", first="TRY(mlock(memory, LENGTH));", there=False),
    "mlock2": flag_is("lf", "TRY(syscall(325, memory, LENGTH, 1));", first="TRY(mlock(memory, LENGTH));"),
    "advice on a part": flag_is("dc", "TRY(madvise(memory, 4096, MADV_DONTFORK));"),
    "oom_score_adj": (
        "",
        'write_text("/proc/self/oom_score_adj", "123");',
        'FILE *f = fopen("/proc/self/oom_score_adj", "r"); int n; CHECK(fscanf(f, "%d", &n) == 1 && n == 123, "n");',
    ),
    "PR_SET_MM": (
        "",
        """struct prctl_mm_map map = { field(26), field(27), field(45), field(46), field(47), (unsigned long)sbrk(0),
		(unsigned long)memory, field(48), field(49), field(50), field(51), NULL, 0, -1 };
	TRY(prctl(PR_SET_MM, PR_SET_MM_MAP, &map, sizeof(map), 0));""",
        'CHECK(field(28) == (unsigned long)memory, "%lx", field(28));',
    ),
    "nice": ("", "TRY(setpriority(PRIO_PROCESS, 0, 7));", 'CHECK(getpriority(PRIO_PROCESS, 0) == 7, "nice");'),
    "policy": (
        "",
        "struct sched_param p = { 0 }; TRY(sched_setscheduler(0, SCHED_BATCH, &p));",
        'CHECK(sched_getscheduler(0) == SCHED_BATCH, "policy");',
    ),
    "affinity": (
        "",
        "cpu_set_t one; CPU_ZERO(&one); CPU_SET(1, &one); TRY(sched_setaffinity(0, sizeof(one), &one));",
        'cpu_set_t now; TRY(sched_getaffinity(0, sizeof(now), &now)); CHECK(CPU_COUNT(&now) == 1, "affinity");',
    ),
    "ioprio_set": (
        "",
        "TRY(syscall(251, 1, 0, 2 << 13 | 3));",
        'CHECK(syscall(252, 1, 0) == (2 << 13 | 3), "I/O priority");',
    ),
    "personality": (
        "",
        "TRY(personality(ADDR_NO_RANDOMIZE));",
        'CHECK(personality(0xffffffff) == ADDR_NO_RANDOMIZE, "personality");',
    ),
    "groups": (
        "",
        "gid_t g[] = { 7, 8 }; TRY(syscall(116, 2, g));",
        'gid_t h[9]; CHECK(syscall(115, 9, h) == 2 && h[1] == 8, "groups");',
    ),
    "user": (
        "",
        "TRY(syscall(117, -1, -1, 77));",
        'uid_t a, b, c; TRY(getresuid(&a, &b, &c)); CHECK(!a && !b && c == 77, "user");',
    ),
    "bounding set": (
        "",
        "TRY(prctl(PR_CAPBSET_DROP, 21, 0, 0, 0));",
        'CHECK(!prctl(PR_CAPBSET_READ, 21, 0, 0, 0), "bounding set");',
    ),
    "no_new_privs": (
        "",
        "TRY(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));",
        'CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "no_new_privs");',
    ),
}
REFUSED = {
    "sealed by mseal": ("", "TRY(syscall(462, memory, LENGTH, 0));", ""),
    "runs under SCHED_DEADLINE": (
        "",
        """struct { unsigned size, policy; unsigned long long flags; int nice; unsigned priority;
	unsigned long long runtime, deadline, period; } a = { 48, 6, 0, 0, 0, 10000000, 30000000, 30000000 };
	TRY(syscall(314, 0, &a, 0));""",
        "",
    ),
}


def source_text(changes: tuple[str, str, str]) -> str:
    functions = "".join(
        f"static void {name}(void)\n{{\n\t{body}\n}}\n"
        for name, body in zip(("before", "in_thread", "check_in_thread"), changes, strict=True)
    )
    return WAITING.replace("CHANGES", functions)


def change_in_the_last_moment(out: str, smaps: float | None) -> None:
    """In a host: a program is let change itself when all that is read ahead has been read.
    `smaps`: the kernel's own words of flags are not there, and smaps may take so many seconds."""
    seize = UserSource.seize

    def seize_and_let_change(self: UserSource) -> None:
        seize(self)
        Path(f"{out}.go").touch()
        deadline = time.monotonic() + 20
        while not Path(f"{out}.done").exists():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    UserSource.seize = seize_and_let_change  # type: ignore[method-assign]
    if smaps is not None:
        of_mappings._QUICK = smaps

        def none(self: vma_flags.VmaFlags, pid: int) -> bool:
            return False

        vma_flags.VmaFlags.prepare = none  # type: ignore[method-assign]


@pytest.fixture
def hosts() -> Iterator[tuple[PidHost, PidHost]]:
    with PidHost("a") as a, PidHost("b") as b:
        yield a, b


def move(
    hosts: tuple[PidHost, PidHost], folder: Path, changes: tuple[str, str, str], smaps: float | None = None
) -> None:
    here, there = hosts
    with Program(here, source_text(changes), folder) as program:
        here.call("run", change_in_the_last_moment, str(program.out), smaps)
        migrate(program, here, there)
        Path(f"{program.out}.check").touch()
        deadline = time.monotonic() + 20
        while "as it was" not in program.out.read_text():
            assert program.alive() and time.monotonic() < deadline, program.out.read_text()
            time.sleep(0.005)
        program.finish()


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_program_changes_in_the_last_moment_is_changed(
    hosts: tuple[PidHost, PidHost], what: str, tmp_path: Path
) -> None:
    move(hosts, tmp_path, CHANGES[what])


@pytest.mark.parametrize("what", ["MADV_DONTFORK", "munlock", "advice on a part"])
def test_a_kernel_without_words_of_flags_is_asked_by_smaps(
    hosts: tuple[PidHost, PidHost], what: str, tmp_path: Path
) -> None:
    move(hosts, tmp_path, CHANGES[what], 20.0)


@pytest.mark.parametrize("what", ["mlock", "munlock"])
def test_a_lock_is_seen_where_smaps_takes_too_long(hosts: tuple[PidHost, PidHost], what: str, tmp_path: Path) -> None:
    move(hosts, tmp_path, CHANGES[what], 0.0)


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_carried_is_refused_at_the_freeze(
    hosts: tuple[PidHost, PidHost], what: str, tmp_path: Path
) -> None:
    here, there = hosts
    with Program(here, source_text(REFUSED[what]), tmp_path) as program:
        here.call("run", change_in_the_last_moment, str(program.out), None)
        with pytest.raises(CheckpointFailed, match=what):
            migrate(program, here, there)
        assert program.alive()
        program.finish()
