"""State that was written ahead of the freeze and has changed since: what counts is how it stood in the end."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from pidhosts import HostedWorkload, PidHost, Program, migrate, restore_from_file, save_to_file

from migrator.engine.base import DestinationOptions, SourceOptions
from migrator.engine.user.descriptors import DescriptorRestore, PredumpedFiles, collection, fdinfo
from migrator.engine.user.descriptors import Holder as Owner
from migrator.engine.user.descriptors.classify import Root
from migrator.engine.user.descriptors.survey import look
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.restore.destination import UserDestination
from migrator.image.codec import HEADER, REGISTRY, Record
from migrator.image.objhash import ObjHash
from migrator.image.records_files import File, FileTable
from migrator.linux import file_locks, procfs, urgency

pytestmark = pytest.mark.root

# Changes everything that is pre-dumped, all the time, and checks that each change is still there when it comes back.
RESTLESS = """
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <pthread.h>
#include "workload.h"
static void on_usr(int sig) { (void)sig; }
static char stacks[2][65536];
static void *other(void *arg)
{
	unsigned long turn = 0;
	char name[16], seen[16];
	while (!wl_stopping) {
		stack_t want = { .ss_sp = stacks[turn % 2], .ss_size = 32768 + 4096 * (turn % 2) }, have;
		snprintf(name, sizeof(name), "other-%lu", turn % 1000);
		TRY(sigaltstack(&want, NULL));
		TRY(prctl(PR_SET_NAME, name, 0, 0, 0));
		wl_sleep_us(700);
		TRY(sigaltstack(NULL, &have));
		TRY(prctl(PR_GET_NAME, seen, 0, 0, 0));
		CHECK(have.ss_sp == want.ss_sp && have.ss_size == want.ss_size, "turn %lu", turn);
		CHECK(!strcmp(name, seen), "%s %s", name, seen);
		turn++;
	}
	return arg;
}
int main(int argc, char **argv)
{
	unsigned long turn = 0, ticks = 0;
	char here[4096];
	pthread_t thread;
	int fd, copy;

	wl_start(argc, argv);
	pthread_create(&thread, NULL, other, NULL);
	TRY(mkdir(wl_beside("one"), 0755));
	TRY(mkdir(wl_beside("two"), 0755));
	fd = TRY(open(wl_beside("data"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	TRY(ftruncate(fd, 1 << 20));
	copy = TRY(dup(fd));
	wl_ready();
	for (turn = 0; !wl_stopping; turn++) {
		struct sigaction want = { .sa_handler = turn % 3 ? on_usr : SIG_IGN, .sa_flags = turn % 2 ? SA_RESTART : 0 };
		struct sigaction have;
		struct rlimit limit = { 100 + turn % 50, 4096 }, seen;
		struct stat a, b;
		off_t at = turn * 37 % (1 << 20);

		TRY(sigaction(SIGUSR1, &want, NULL));
		umask(turn % 0777);
		TRY(chdir(wl_beside(turn % 2 ? "one" : "two")));
		TRY(setrlimit(RLIMIT_CORE, &limit));
		TRY(lseek(fd, at, SEEK_SET));
		if (turn % 5 == 0) { /* shared with `fd`, or a description of its own */
			TRY(close(copy));
			copy = turn % 2 ? TRY(dup(fd)) : TRY(open(wl_beside("data"), O_RDWR));
		}
		wl_sleep_us(500);
		TRY(sigaction(SIGUSR1, NULL, &have));
		CHECK(have.sa_handler == want.sa_handler, "turn %lu", turn);
		CHECK((have.sa_flags & SA_RESTART) == want.sa_flags, "turn %lu", turn);
		CHECK(umask(0) == turn % 0777, "turn %lu", turn);
		TRY(stat(".", &a));
		TRY(stat(wl_beside(turn % 2 ? "one" : "two"), &b));
		CHECK(a.st_ino == b.st_ino, "turn %lu in %s", turn, getcwd(here, sizeof(here)));
		TRY(getrlimit(RLIMIT_CORE, &seen));
		CHECK(seen.rlim_cur == limit.rlim_cur, "turn %lu", turn);
		CHECK(lseek(fd, 0, SEEK_CUR) == at, "turn %lu", turn);
		TRY(lseek(fd, 7, SEEK_SET));
		CHECK((lseek(copy, 0, SEEK_CUR) == 7) == (turn / 5 * 5 % 2), "turn %lu", turn);
		if (turn % 100 == 0)
			wl_line("tick %lu", ++ticks);
	}
	pthread_join(thread, NULL);
	wl_ok();
}
"""


def take_for_many(least: int) -> None:
    collection.MANY = least


@pytest.fixture(params=[collection.MANY, 0], ids=["few", "as of many"])
def hosts(request: pytest.FixtureRequest) -> Iterator[tuple[PidHost, PidHost]]:
    """Both ways to look at descriptors: one by one, and by what was known of them."""
    with PidHost("a") as a, PidHost("b") as b:
        for host in (a, b):
            host.call("run", take_for_many, request.param)
        yield a, b


def test_a_program_that_never_rests_is_moved_as_it_was_in_the_end(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    here, there = hosts
    with Program(here, RESTLESS, tmp_path) as program:
        for _ in range(6):
            migrate(program, here, there)
            program.check_alive_and_progressing(ticks=1)
            here, there = there, here
        program.finish()


PIPES = """
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include "workload.h"
/* Changes one of its pipes in every turn, and checks all of them: contents, flags, capacity, who shares what. */
#define N 6
static struct one { int r, w, flags, size, waits; unsigned char first; } all[N];
static void fresh(struct one *p, unsigned long turn)
{
	int ends[2];

	if (p->size) {
		TRY(close(p->r));
		if (p->w >= 0)
			TRY(close(p->w));
	}
	TRY(pipe2(ends, turn % 3 ? 0 : O_CLOEXEC));
	*p = (struct one){ ends[0], ends[1], 0, 65536, 0, 0 };
}
static void put(struct one *p, unsigned long turn)
{
	unsigned char data[3000];
	int n = 1 + turn * 61 % sizeof(data);

	struct pollfd poller = { p->w, POLLOUT, 0 };

	if (p->w < 0 || p->waits + n > 12000 || TRY(poll(&poller, 1, 0)) == 0)
		return;
	for (int i = 0; i < n; i++)
		data[i] = p->first + p->waits + i;
	CHECK(write(p->w, data, n) == n, "turn %lu", turn);
	p->waits += n;
}
static void take(struct one *p, unsigned long turn)
{
	unsigned char data[16384];
	int got;

	if (!p->waits)
		return;
	got = TRY(read(p->r, data, sizeof(data)));
	CHECK(got > 0, "turn %lu: %d", turn, got);
	for (int i = 0; i < got; i++)
		CHECK(data[i] == (unsigned char)(p->first + i), "turn %lu byte %d", turn, i);
	p->first += got;
	p->waits -= got;
}
static void change(struct one *p, unsigned long turn, int how)
{
	char path[64];
	int end;

	switch (how) {
	case 0:
		fresh(p, turn);
		break;
	case 1: /* packets, or no waiting, for whoever writes */
		if (!p->waits)
			p->flags ^= O_DIRECT;
		if (turn % 2)
			p->flags ^= O_NONBLOCK;
		if (p->w >= 0)
			TRY(fcntl(p->w, F_SETFL, p->flags));
		break;
	case 2:
		end = fcntl(p->r, F_SETPIPE_SZ, turn % 2 ? 131072 : 65536);
		p->size = end > 0 ? end : p->size; /* not smaller than what is in it */
		break;
	case 3:
		take(p, turn);
		break;
	case 4: /* another description of the same end, under the same number */
		snprintf(path, sizeof(path), "/proc/self/fd/%d", p->r);
		end = TRY(open(path, O_RDONLY));
		TRY(dup2(end, p->r));
		TRY(close(end));
		break;
	case 5: /* nobody writes any more: the reader sees an end */
		if (p->w >= 0)
			TRY(close(p->w));
		p->w = -1;
		break;
	case 6: /* other rights */
		TRY(fchmod(p->r, turn % 2 ? 0600 : 0660));
		break;
	default:
		put(p, turn);
	}
}
static void check(struct one *p, unsigned long turn)
{
	struct pollfd poller = { p->r, POLLIN, 0 };
	int waits, n = TRY(poll(&poller, 1, 0));

	TRY(ioctl(p->r, FIONREAD, &waits));
	CHECK(waits == p->waits, "turn %lu: %d wait, not %d", turn, waits, p->waits);
	CHECK(fcntl(p->r, F_GETPIPE_SZ) == p->size, "turn %lu: %d", turn, fcntl(p->r, F_GETPIPE_SZ));
	CHECK(n == (p->waits || p->w < 0), "turn %lu: %x", turn, poller.revents);
	CHECK(!(fcntl(p->r, F_GETFL) & (O_NONBLOCK | O_DIRECT)), "turn %lu", turn);
	if (p->w >= 0)
		CHECK((fcntl(p->w, F_GETFL) & (O_NONBLOCK | O_DIRECT)) == p->flags, "turn %lu", turn);
}
int main(int argc, char **argv)
{
	unsigned long ticks = 0;

	wl_start(argc, argv);
	for (int i = 0; i < N; i++)
		fresh(all + i, i);
	wl_ready();
	for (unsigned long turn = 0; !wl_stopping; turn++) {
		unsigned long dice = wl_mix(turn);

		change(all + dice % N, turn, dice / N % 12);
		put(all + dice / 97 % N, turn);
		wl_sleep_us(1000);
		for (int i = 0; i < N; i++)
			check(all + i, turn);
		if (turn % 50 == 0)
			wl_line("tick %lu", ++ticks);
	}
	for (int i = 0; i < N; i++)
		while (all[i].waits)
			take(all + i, 0);
	wl_ok();
}
"""


def test_pipes_that_change_all_the_time_are_moved_as_they_were_in_the_end(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    here, there = hosts
    with Program(here, PIPES, tmp_path) as program:
        for _ in range(12):
            migrate(program, here, there)
            program.check_alive_and_progressing(ticks=1)
            here, there = there, here
        program.finish()


CONNECTIONS = """
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include "workload.h"
/* Changes one of its connections in every turn, over loopback with both ends here, and checks all of them. */
#define N 6
static struct one { int a, b, nodelay, idle, flags, size, ended, waits; unsigned char first; } all[N];
static struct sockaddr_in address = { .sin_family = AF_INET };
static int listener;
static void set(int fd, int level, int name, int value)
{
	TRY(setsockopt(fd, level, name, &value, sizeof(value)));
}
static int get(int fd, int level, int name)
{
	int value = 0;
	socklen_t size = sizeof(value);

	TRY(getsockopt(fd, level, name, &value, &size));
	return value;
}
static void fresh(struct one *p)
{
	if (p->size) {
		TRY(close(p->a));
		wl_sleep_us(1000); /* one end without the other */
		TRY(close(p->b));
	}
	*p = (struct one){ .size = 1 };
	p->a = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	TRY(connect(p->a, (void *)&address, sizeof(address)));
	p->b = TRY(accept4(listener, NULL, NULL, 0));
}
static void put(struct one *p, unsigned long turn)
{
	unsigned char data[2000];
	int n = 1 + turn * 61 % sizeof(data);

	if (p->ended || p->waits + n > 12000)
		return;
	for (int i = 0; i < n; i++)
		data[i] = p->first + p->waits + i;
	CHECK(write(p->a, data, n) == n, "turn %lu", turn);
	p->waits += n;
}
static void take(struct one *p, unsigned long turn)
{
	unsigned char data[16384];

	for (int got; p->waits; p->waits -= got) {
		got = TRY(recv(p->b, data, sizeof(data), 0));
		CHECK(got > 0, "turn %lu: %d", turn, got);
		for (int i = 0; i < got; i++)
			CHECK(data[i] == (unsigned char)(p->first + i), "turn %lu byte %d", turn, i);
		p->first += got;
	}
}
static void change(struct one *p, unsigned long turn, int how)
{
	switch (how) {
	case 0:
		take(p, turn);
		fresh(p);
		break;
	case 1:
		set(p->a, IPPROTO_TCP, TCP_NODELAY, p->nodelay ^= 1);
		break;
	case 2:
		set(p->b, IPPROTO_TCP, TCP_KEEPIDLE, p->idle = 100 + turn % 1000);
		break;
	case 3:
		TRY(fcntl(p->a, F_SETFL, p->flags ^= O_NONBLOCK));
		break;
	case 4:
		set(p->b, SOL_SOCKET, SO_RCVBUF, p->size = 40000 + 2 * (turn % 1000));
		break;
	case 5: /* half of it ends */
		if (!p->ended)
			TRY(shutdown(p->a, SHUT_WR));
		p->ended = 1;
		break;
	case 6:
		take(p, turn);
		break;
	case 7: /* under another number */
		how = TRY(dup(p->a));
		TRY(close(p->a));
		p->a = how;
		break;
	default:
		put(p, turn);
	}
}
static void check(struct one *p, unsigned long turn)
{
	char byte;

	CHECK(get(p->a, IPPROTO_TCP, TCP_NODELAY) == p->nodelay, "turn %lu", turn);
	CHECK(!p->idle || get(p->b, IPPROTO_TCP, TCP_KEEPIDLE) == p->idle, "turn %lu", turn);
	CHECK((fcntl(p->a, F_GETFL) & O_NONBLOCK) == p->flags, "turn %lu", turn);
	CHECK(p->size == 1 || get(p->b, SOL_SOCKET, SO_RCVBUF) == 2 * p->size, "turn %lu", turn);
	if (p->waits || p->ended)
		CHECK(recv(p->b, &byte, 1, MSG_PEEK) == (p->waits > 0), "turn %lu", turn);
}
int main(int argc, char **argv)
{
	unsigned long ticks = 0;
	socklen_t size = sizeof(address);

	wl_start(argc, argv);
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	listener = TRY(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
	/* Here, where connections of its port have just ended, nobody could bind it again without. */
	TRY(setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &(int){ 1 }, sizeof(int)));
	TRY(bind(listener, (void *)&address, size));
	TRY(listen(listener, 16));
	TRY(getsockname(listener, (void *)&address, &size));
	for (int i = 0; i < N; i++)
		fresh(all + i);
	wl_ready();
	for (unsigned long turn = 0; !wl_stopping; turn++) {
		unsigned long dice = wl_mix(turn);

		change(all + dice % N, turn, dice / N % 12);
		put(all + dice / 97 % N, turn);
		wl_sleep_us(3000);
		for (int i = 0; i < N; i++)
			check(all + i, turn);
		if (turn % 20 == 0)
			wl_line("tick %lu", ++ticks);
	}
	for (int i = 0; i < N; i++)
		take(all + i, 0);
	wl_ok();
}
"""


@pytest.mark.parametrize("least", [collection.MANY, 0], ids=["few", "as of many"])
def test_connections_that_change_all_the_time_are_moved_as_they_were_in_the_end(tmp_path: Path, least: int) -> None:
    with (
        PidHost("a", own_network=True) as here,
        PidHost("b", own_network=True) as there,
        Program(here, CONNECTIONS, tmp_path) as program,
    ):
        for host in (here, there):
            host.call("run", take_for_many, least)
        for _ in range(12):
            migrate(program, here, there)
            program.check_alive_and_progressing(ticks=1)
            here, there = there, here
        program.finish()


class Stream:
    """What is written, as the reader will have it."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def encoded(self, raw: bytes) -> None:
        kind, _ = HEADER.unpack_from(raw)
        self.records.append(REGISTRY[kind].decode(raw[HEADER.size :]))


class Surroundings:
    netns = None

    def __init__(self) -> None:
        self.root_fd = os.open("/", os.O_PATH)

    def pid_of(self, vpid: int) -> int:
        return 0

    def shm_fd(self, objref: int) -> int:
        return -1


def opened(restore: DescriptorRestore, table: FileTable, number: int) -> int:
    (objref,) = [d.file_objref for d in table.descriptors if d.fd == number]
    return restore._files[objref]


def predump_us() -> tuple[PredumpedFiles, Stream]:
    stream = Stream()
    predumped = PredumpedFiles(ObjHash(), stream, os.getpid())
    pidfd = os.pidfd_open(os.getpid())
    predumped.predump(Owner(os.getpid(), os.getpid(), pidfd))
    os.close(pidfd)
    return predumped, stream


def test_a_predumped_file_that_was_replaced_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with path.open() as file:
        _, stream = predump_us()
        number = file.fileno()
        restore = DescriptorRestore(Surroundings())
        restore.final = False
        for rec in stream.records:
            restore.record(rec)
        table = next(rec for rec in stream.records if isinstance(rec, FileTable))
        (tmp_path / "new").write_text("new")
        (tmp_path / "new").rename(path)
        restore.final = True
        restore.settle([table.objref])
        assert os.read(opened(restore, table, number), 10) == b"new"
        restore.close()


def test_a_predumped_file_that_is_gone_matters_only_if_it_is_still_open_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with path.open() as file:
        _, stream = predump_us()
        number = file.fileno()
    path.unlink()
    restore = DescriptorRestore(Surroundings())
    restore.final = False
    for rec in stream.records:
        restore.record(rec)
    table = next(rec for rec in stream.records if isinstance(rec, FileTable))
    restore.final = True
    table.descriptors = [d for d in table.descriptors if d.fd != number]
    restore.record(table)
    restore.settle([table.objref])
    restore.close()


def test_what_stands_in_the_stream_is_not_written_again(tmp_path: Path) -> None:
    with (tmp_path / "state").open("w+") as file:
        predumped, stream = predump_us()
        known = len(stream.records)
        pidfd = os.pidfd_open(os.getpid())
        predumped.predump(Owner(os.getpid(), os.getpid(), pidfd))
        file.write("more")
        file.flush()
        predumped.predump(Owner(os.getpid(), os.getpid(), pidfd))
        os.close(pidfd)
        later = stream.records[known:]
        files = [rec for rec in later if isinstance(rec, File) and rec.path.startswith(str(tmp_path))]
        assert [(rec.path, rec.pos) for rec in files] == [(str(tmp_path / "state"), 4)]


def test_a_number_that_is_another_pipes_by_the_time_its_flags_are_read_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a pipe would seem to have an end more than there are."""
    (one, other), (third, fourth) = os.pipe(), os.pipe2(os.O_NONBLOCK)
    ends, read = {one, other, third, fourth}, fdinfo.read
    pidfd = os.pidfd_open(os.getpid())
    us = Owner(os.getpid(), os.getpid(), pidfd)
    root = Root(os.getpid())
    monkeypatch.setattr(fdinfo, "read", lambda pid, number: read(pid, fourth if number == one else number))
    assert {item.number for item in look(us, root, []) if item.number in ends} == {other, third, fourth}
    root.close()
    for fd in (*ends, pidfd):
        os.close(fd)


def test_files_that_were_opened_since_are_looked_at_again(tmp_path: Path) -> None:
    predumped, stream = predump_us()
    pidfd = os.pidfd_open(os.getpid())
    us = Owner(os.getpid(), os.getpid(), pidfd)
    with (tmp_path / "later").open("w"), (tmp_path / "too").open("w"):
        assert predumped.has_grown(us)
        predumped.predump(us)
        assert not predumped.has_grown(us)
    os.close(pidfd)
    assert not predumped.has_grown(us)
    assert str(tmp_path / "later") in {rec.path for rec in stream.records if isinstance(rec, File)}


EARLY = """
#include "workload.h"
/* Opens, closes and duplicates files by path all the time, and nothing else: what was given early may be all. */
int main(int argc, char **argv)
{
	int a, b, c = -1;

	wl_start(argc, argv);
	a = TRY(open(wl_beside("a"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	b = TRY(open("/etc/passwd", O_RDONLY | O_CLOEXEC));
	wl_ready();
	for (unsigned long turn = 0; !wl_stopping; turn++) {
		char written[32], seen[32] = "";
		int n = snprintf(written, sizeof(written), "turn %lu", turn);

		TRY(pwrite(a, written, n, 0));
		TRY(lseek(a, n, SEEK_SET));
		TRY(lseek(b, turn % 100, SEEK_SET));
		if (argc > 2 && turn % 7 == 0)
			c = TRY(turn % 2 ? dup(a) : open(wl_beside("a"), O_RDONLY));
		wl_sleep_us(1000);
		CHECK(pread(a, seen, n, 0) == n && !strcmp(seen, written), "%s, not %s", seen, written);
		CHECK(lseek(a, 0, SEEK_CUR) == n && lseek(b, 0, SEEK_CUR) == (off_t)(turn % 100), "turn %lu", turn);
		CHECK(fcntl(b, F_GETFD) == FD_CLOEXEC && fcntl(a, F_GETFD) == 0, "turn %lu", turn);
		if (c >= 0 && turn % 7 == 5) {
			TRY(close(c));
			c = -1;
		}
		CHECK(fcntl(c >= 0 ? c + 1 : b + 1, F_GETFD) == -1 && errno == EBADF, "one too many");
		if (turn % 20 == 0)
			wl_line("tick %lu", turn);
	}
	wl_ok();
}
"""


@pytest.mark.parametrize("changing", [(), ("changing",)], ids=["the same in the end", "changing"])
def test_descriptors_that_were_given_early_are_those_of_the_end(
    hosts: tuple[PidHost, PidHost], tmp_path: Path, changing: tuple[str, ...]
) -> None:
    here, there = hosts
    with Program(here, EARLY, tmp_path, *changing) as program:
        for _ in range(5):
            migrate(program, here, there)
            program.check_alive_and_progressing(ticks=1)
            here, there = there, here
        program.finish()


LOCKED = """
#include <sys/file.h>
#include <sys/wait.h>
#include "workload.h"
/* What only descriptors and locks know changes all the time; each change is still there a moment later. */
int main(int argc, char **argv)
{
	int whole, range, part, pipes[2], other;

	wl_start(argc, argv);
	whole = TRY(open(wl_beside("whole"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	range = TRY(open(wl_beside("range"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	part = TRY(open(wl_beside("part"), O_RDWR | O_CREAT | O_TRUNC, 0600));
	other = TRY(open(wl_beside("range"), O_RDWR));
	TRY(pipe(pipes));
	wl_ready();
	for (unsigned long turn = 0; !wl_stopping; turn++) {
		struct flock lock = { .l_type = turn % 3 ? F_WRLCK : F_UNLCK, .l_start = turn % 50, .l_len = 5 };
		struct flock all = { .l_type = F_UNLCK }, seen;
		int fd;

		TRY(flock(whole, turn % 2 ? LOCK_EX : LOCK_UN));
		TRY(fcntl(range, F_OFD_SETLK, &all));
		TRY(fcntl(range, F_OFD_SETLK, &lock));
		TRY(fcntl(part, F_SETLK, &all));
		TRY(fcntl(part, F_SETLK, &lock));
		TRY(fcntl(part, F_SETFL, turn % 5 ? O_APPEND : 0));
		TRY(fcntl(whole, F_SETFD, turn % 7 ? FD_CLOEXEC : 0));
		TRY(fcntl(range, F_SETOWN, turn % 3 ? getpid() : 0));
		TRY(ftruncate(part, turn % 1000));
		TRY(fcntl(pipes[1], F_SETFL, turn % 2 ? O_NONBLOCK : 0));
		wl_sleep_us(1500);
		fd = TRY(open(wl_beside("whole"), O_RDWR));
		CHECK((flock(fd, LOCK_EX | LOCK_NB) != 0) == turn % 2, "turn %lu", turn);
		TRY(close(fd));
		seen = (struct flock){ .l_type = F_WRLCK };
		TRY(fcntl(other, F_OFD_GETLK, &seen));
		CHECK(seen.l_type == lock.l_type && (seen.l_type == F_UNLCK || seen.l_start == lock.l_start), "turn %lu", turn);
		if (turn % 10 == 0) {
			pid_t child = TRY(fork());
			int status;

			if (!child) {
				seen = (struct flock){ .l_type = F_WRLCK };
				fcntl(part, F_GETLK, &seen);
				_exit(seen.l_type == lock.l_type && (seen.l_type == F_UNLCK || seen.l_pid == getppid()) ? 0 : 1);
			}
			CHECK(waitpid(child, &status, 0) == child && status == 0, "the lock of turn %lu: %x", turn, status);
		}
		CHECK((fcntl(part, F_GETFL) & O_APPEND) == (turn % 5 ? O_APPEND : 0), "turn %lu", turn);
		CHECK(fcntl(whole, F_GETFD) == (turn % 7 ? FD_CLOEXEC : 0), "turn %lu", turn);
		CHECK(fcntl(range, F_GETOWN) == (turn % 3 ? getpid() : 0), "turn %lu", turn);
		CHECK((fcntl(pipes[1], F_GETFL) & O_NONBLOCK) == (turn % 2 ? O_NONBLOCK : 0), "turn %lu", turn);
		if (turn % 20 == 0)
			wl_line("tick %lu", turn);
	}
	wl_ok();
}
"""


def test_locks_and_flags_that_change_all_the_time_are_those_of_the_end(
    hosts: tuple[PidHost, PidHost], tmp_path: Path
) -> None:
    here, there = hosts
    with Program(here, LOCKED, tmp_path) as program:
        for _ in range(5):
            save_to_file(program, here, tmp_path / "image")  # gone, and its locks with it, when the copy is made
            restore_from_file(program, there, tmp_path / "image")
            program.check_alive_and_progressing(ticks=1)
            here, there = there, here
        program.finish()


def test_a_list_of_locks_names_the_inodes_of_all_that_are_locked(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        inode = os.fstat(file.fileno()).st_ino
        before = file_locks.LockList().inodes()
        fcntl.flock(file, fcntl.LOCK_EX)
        after = file_locks.LockList().inodes()
    assert before is not None and after is not None and inode in after - before


def test_the_list_of_locks_is_read_as_urgently_as_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(file_locks, "locked_inodes", lambda: seen.append(os.sched_getscheduler(0)))
    file_locks.LockList().inodes()
    urgency.raise_tasks([0])
    try:
        file_locks.LockList().inodes()
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    assert [policy & ~os.SCHED_RESET_ON_FORK for policy in seen] == [os.SCHED_OTHER, os.SCHED_FIFO]


def test_a_list_that_is_not_one_of_all_locks_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_locks, "complete", lambda: False)
    assert file_locks.locked_inodes() is None


def test_a_long_list_of_locks_that_keeps_changing_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "{}: POSIX  ADVISORY  WRITE 3568 fd:00:{} 0 EOF\n"
    stable = tmp_path / "locks"
    stable.write_text("".join(line.format(n, 1000 + n) for n in range(100)))
    monkeypatch.setattr(file_locks, "PATH", str(stable))
    assert file_locks.locked_inodes() == set(range(1000, 1100))
    serial = itertools.count()
    monkeypatch.setattr(file_locks, "_read_all", lambda: stable.read_bytes() + line.format(1, next(serial)).encode())
    assert file_locks.locked_inodes() is None


def _room() -> int:
    """For how many descriptors the kernel has room in the table of this process."""
    return int(procfs.status(os.getpid())["FDSize"])


def _room_when_saving(pid: int, path: str) -> tuple[int, int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with UserSource(pid, fd, SourceOptions(cgroup_name=f"room-{os.getpid()}")) as source:
        source.survey()
        source.instrument("user")
        source.round()
        source.seize()
        before = _room()
        source.freeze()
        source.final()
        after = _room()
        source.hold()
    os.close(fd)
    source.release()
    return before, after


def _room_when_restoring(path: str) -> tuple[int, int]:
    rooms = [0, 0]
    fd = os.open(path, os.O_RDONLY)
    with UserDestination(fd, DestinationOptions(cgroup_name=f"room-{os.getpid()}")) as destination:
        destination.on_round = lambda _number: rooms.__setitem__(0, _room())
        destination.build()
        destination.hold()
        rooms[1] = _room()
        destination.discard()
    os.close(fd)
    return rooms[0], rooms[1]


def test_the_tables_of_both_agents_have_room_for_all_descriptors_before_the_freeze(tmp_path: Path) -> None:
    """To make it longer the kernel waits for all processors: 5 ms and more each time."""
    pipes = 700
    with (
        PidHost("a") as a,
        PidHost("b") as b,
        HostedWorkload(a, "many", tmp_path, "pipes", pipes) as workload,
    ):
        before, after = a.call("run", _room_when_saving, a.inner(workload.pid), str(tmp_path / "image"))
        assert before == after > 2 * pipes
        before, after = b.call("run", _room_when_restoring, str(tmp_path / "image"))
        assert before == after > 2 * pipes


def _policies_when_stopping(pid: int) -> list[int]:
    found = [os.sched_getscheduler(0)]
    with UserSource(pid, os.open(os.devnull, os.O_WRONLY), SourceOptions(cgroup_name=f"stop-{os.getpid()}")) as source:
        source.survey()
        source.instrument("user")
        (process,) = source.tree.living
        with source._memory.instruments.stopped(process, pid):
            found.append(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
    return [*found, os.sched_getscheduler(0)]


def test_a_task_that_is_stopped_for_a_moment_does_not_wait_for_our_turn(tmp_path: Path) -> None:
    with PidHost("a") as a, HostedWorkload(a, "counter", tmp_path) as workload:
        policies = a.call("run", _policies_when_stopping, a.inner(workload.pid))
        assert policies == [os.SCHED_OTHER, os.SCHED_FIFO, os.SCHED_OTHER]
        workload.check_alive_and_progressing()


def _sent_ahead(pid: int, path: str, reader: str) -> set[str]:
    """The kinds of records that come before the freeze."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with UserSource(pid, fd, SourceOptions(cgroup_name=f"ahead-{os.getpid()}")) as source:
        source.survey()
        source.instrument(reader)
        source.round()
        source.round()
        kinds, raw = set(), Path(path).read_bytes()
        while raw:
            kind, length = HEADER.unpack_from(raw)
            kinds.add(REGISTRY[kind].__name__)
            raw = raw[length:]
    os.close(fd)
    return kinds


@pytest.mark.parametrize(("what", "record"), [("pipes", "Pipe"), ("connections", "Socket")])
@pytest.mark.parametrize("reader", ["user", "kernel", ""])
def test_pipes_and_connections_go_ahead_to_who_drops_them_again(
    tmp_path: Path, reader: str, what: str, record: str
) -> None:
    with PidHost("a") as a, HostedWorkload(a, "many", tmp_path, what, 10) as workload:
        kinds = a.call("run", _sent_ahead, a.inner(workload.pid), str(tmp_path / "image"), reader)
        assert {"Task", "File", "FileTable"} <= kinds
        assert (record in kinds) == (reader == "user")
        workload.check_alive_and_progressing()
