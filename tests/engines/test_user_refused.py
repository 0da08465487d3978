"""Every reason of the survey of tasks: reached by a program that has the state, before anything is stopped."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pidhosts import PidHost, Program

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.errors import CheckpointFailed, Refused
from migrator.linux import procfs
from migrator.testing.workloads import Workload

pytestmark = pytest.mark.root

BEGIN = r"""
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include "workload.h"
__attribute__((unused)) static void rest(void)
{
	for (;;)
		pause();
}
__attribute__((unused)) static long clone_(unsigned long flags)
{
	return TRY(syscall(SYS_clone, flags, NULL, NULL, NULL, NULL));
}
static volatile int built;
__attribute__((unused)) static int told[2];
#define CHILD(does)						\
	do {							\
		char done;					\
		TRY(pipe(told));				\
		if (!fork()) {					\
			does;					\
			CHECK(write(told[1], "x", 1) == 1, "%m"); \
			rest();					\
		}						\
		CHECK(read(told[0], &done, 1) == 1, "%m");	\
	} while (0)
"""
MAIN = r"""
int main(int argc, char **argv)
{
	wl_start(argc, argv);
"""
THREAD = r"""
	pthread_t thread;

	TRY(pthread_create(&thread, NULL, run, NULL));
	while (!built)
		usleep(1000);
"""
END = r"""
	(void)built;
	wl_ready();
	rest();
}
"""


def in_thread(code: str) -> str:
    return (
        f"static void *run(void *unused)\n{{\n\t(void)unused;\n{code}\n\tbuilt = 1;\n\trest();\n\treturn NULL;\n}}"
        + MAIN
        + THREAD
    )


NAMED_SOCKET = (
    "#include <sys/socket.h>\n#include <sys/stat.h>\n#include <sys/un.h>\n"
    + MAIN
    + """struct sockaddr_un name = { .sun_family = AF_UNIX, .sun_path = "s" };
    *strrchr(argv[1], '/') = 0;
    TRY(chdir(argv[1]));
    TRY(bind(TRY(socket(AF_UNIX, SOCK_STREAM, 0)), (void *)&name, sizeof(name)));
    """
)

STATES = {
    "has other names (link(2))": NAMED_SOCKET + 'TRY(link("s", "t"));',
    "has another name in another directory": NAMED_SOCKET
    + 'TRY(mkdir("d", 0700)); TRY(link("s", "d/t")); TRY(unlink("s"));',
    "is in mnt namespaces of its own": MAIN + "TRY(unshare(CLONE_NEWNS));",
    "is in uts, cgroup namespaces of its own": MAIN + "TRY(unshare(CLONE_NEWUTS | CLONE_NEWCGROUP));",
    "is in user namespaces of its own": MAIN + "TRY(unshare(CLONE_NEWUSER));",
    "is in another net namespace than the root task": MAIN + "CHILD(TRY(unshare(CLONE_NEWNET)));",
    "is in another ipc namespace than its process": in_thread("TRY(unshare(CLONE_NEWIPC));"),
    "its children will be in another time namespace": MAIN + "TRY(unshare(0x80));",
    "its children will be in another pid namespace": MAIN + "TRY(unshare(CLONE_NEWPID));",
    "shares its address space": MAIN + "if (!vfork()) { wl_ready(); rest(); }",
    "shares its table of descriptors": MAIN + "if (!clone_(CLONE_FILES | SIGCHLD)) rest();",
    "shares its working directory": MAIN + "if (!clone_(CLONE_FS | SIGCHLD)) rest();",
    "shares its I/O context": MAIN
    + "TRY(syscall(SYS_ioprio_set, 1, 0, 2 << 13 | 3)); if (!clone_(CLONE_IO | SIGCHLD)) rest();",
    "by signal 10 and not SIGCHLD (clone(2))": MAIN + "signal(SIGUSR1, SIG_IGN); if (!clone_(SIGUSR1)) rest();",
    "its main thread has ended while others run": in_thread("") + "wl_ready(); syscall(SYS_exit, 0);",
    "is traced by": MAIN + "CHILD(TRY(ptrace(PTRACE_TRACEME, 0, 0, 0)));",
    "runs under seccomp": in_thread(
        "struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);"
        "struct sock_fprog program = { 1, &allow };"
        "TRY(prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0));"
        "TRY(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));"
    ),
    "all of SIGWINCH, SIGURG, SIGCHLD wait": MAIN
    + "int all[] = { SIGURG, SIGWINCH, SIGCHLD }; sigset_t set; sigemptyset(&set);"
    + "for (int i = 0; i < 3; i++) sigaddset(&set, all[i]); sigprocmask(SIG_BLOCK, &set, NULL);"
    + "for (int i = 0; i < 3; i++) kill(getpid(), all[i]);",
    "has a NUMA policy": MAIN + "unsigned long node = 1; TRY(syscall(SYS_set_mempolicy, 3, &node, 8));",
    "runs under SCHED_DEADLINE": MAIN
    + "unsigned int a[14] = { 48, 6, 0, 0, 0, 0, 1000000, 0, 10000000, 0, 10000000, 0 };"
    + "TRY(syscall(SYS_sched_setattr, 0, a, 0));",
    "peeked at from an offset": "#include <arpa/inet.h>\n#include <sys/socket.h>\n"
    + MAIN
    + "int fd = TRY(socket(AF_INET, SOCK_STREAM, 0)), zero = 0;"
    + 'if (setsockopt(fd, SOL_SOCKET, SO_PEEK_OFF, &zero, sizeof(zero))) wl_fail("no such option");',
    "a working directory of its own": in_thread("TRY(unshare(CLONE_FS));"),
    "a table of descriptors of its own": in_thread("TRY(unshare(CLONE_FILES));"),
    "System V shared memory": "#include <sys/shm.h>\n"
    + MAIN
    + "int id = TRY(shmget(IPC_PRIVATE, 4096, 0600)); TRY(shmat(id, NULL, 0)); TRY(shmctl(id, IPC_RMID, NULL));",
    "sealed by mseal": MAIN
    + "void *p = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); TRY(syscall(462, p, 4096, 0));",
    "below 4 MiB": MAIN
    + "TRY(mmap((void *)0x200000, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));",
    "a datagram that is not complete": "#include <arpa/inet.h>\n"
    + MAIN
    + "struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(9), .sin_addr.s_addr = htonl(0x7f000001) };"
    + "int fd = TRY(socket(AF_INET, SOCK_DGRAM, 0));"
    + 'TRY(sendto(fd, "abc", 3, MSG_MORE, (struct sockaddr *)&to, sizeof(to)));',
    "a member of the multicast group 239.1.2.3": "#include <arpa/inet.h>\n"
    + MAIN
    + 'struct ip_mreqn group = { .imr_multiaddr.s_addr = inet_addr("239.1.2.3"), .imr_ifindex = 1 };'
    + "int fd = TRY(socket(AF_INET, SOCK_DGRAM, 0));"
    + "TRY(setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &group, sizeof(group)));",
    "a member of the multicast group ff05::77": "#include <arpa/inet.h>\n"
    + MAIN
    + 'struct ipv6_mreq group = { .ipv6mr_interface = 1 }; inet_pton(AF_INET6, "ff05::77", &group.ipv6mr_multiaddr);'
    + "int fd = TRY(socket(AF_INET6, SOCK_DGRAM, 0));"
    + "TRY(setsockopt(fd, IPPROTO_IPV6, IPV6_JOIN_GROUP, &group, sizeof(group)));",
    "what is sent there could reach the wrong one": "#include <sys/socket.h>\n#include <sys/un.h>\n"
    + MAIN
    + 'struct sockaddr_un name = { .sun_family = AF_UNIX }; strcpy(name.sun_path, wl_beside(".sock"));'
    + "for (int i = 0; i < 2; i++) { unlink(name.sun_path);"
    + "TRY(bind(TRY(socket(AF_UNIX, SOCK_DGRAM, 0)), (struct sockaddr *)&name, sizeof(name))); }",
    "its owner for signals (F_SETOWN) is pid 1,": MAIN
    + "int ends[2]; TRY(pipe(ends)); TRY(fcntl(ends[0], F_SETOWN, 1));",
    "that no process of the tree has open": "#include <sys/epoll.h>\n#include <sys/socket.h>\n"
    + MAIN
    + "int ends[2], pair[2], epoll = TRY(epoll_create1(0)); struct epoll_event event = { .events = EPOLLIN };"
    + "TRY(pipe(ends)); TRY(socketpair(AF_UNIX, SOCK_STREAM, 0, pair));"
    + "TRY(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event));"
    + 'char room[CMSG_SPACE(sizeof(int))] = { 0 }; struct iovec one = { "x", 1 };'
    + "struct msghdr sent = { .msg_iov = &one, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };"
    + "struct cmsghdr *c = CMSG_FIRSTHDR(&sent); c->cmsg_level = SOL_SOCKET; c->cmsg_type = SCM_RIGHTS;"
    + "c->cmsg_len = CMSG_LEN(sizeof(int)); memcpy(CMSG_DATA(c), &ends[0], sizeof(int));"
    + "TRY(sendmsg(pair[0], &sent, 0)); close(ends[0]); close(ends[1]);",
    "no process has both this epoll instance and everything": "#include <sys/epoll.h>\n"
    + MAIN
    + "int ends[2], epoll = TRY(epoll_create1(0)); struct epoll_event event = { .events = EPOLLIN };"
    + "TRY(pipe(ends)); TRY(epoll_ctl(epoll, EPOLL_CTL_ADD, ends[0], &event));"
    + "CHILD(close(epoll)); close(ends[0]); close(ends[1]);",
    "connected one way to one without a name": "#include <sys/socket.h>\n"
    + MAIN
    + "int pair[2]; struct sockaddr none = { .sa_family = AF_UNSPEC };"
    + "TRY(socketpair(AF_UNIX, SOCK_DGRAM, 0, pair)); TRY(connect(pair[1], &none, sizeof(none)));",
    "lies outside of the root directory of the tree": "#include <sys/socket.h>\n"
    + "#include <sys/stat.h>\n#include <sys/un.h>\n"
    + MAIN
    + 'struct sockaddr_un name = { .sun_family = AF_UNIX }; strcpy(name.sun_path, wl_beside(".sock"));'
    + "TRY(bind(TRY(socket(AF_UNIX, SOCK_STREAM, 0)), (struct sockaddr *)&name, sizeof(name)));"
    + 'TRY(mkdir(wl_beside(".root"), 0755)); TRY(chroot(wl_beside(".root")));',
}


@pytest.fixture(scope="module")
def host() -> Iterator[PidHost]:
    with PidHost("a") as host:
        yield host


def reasons_for(pid: int) -> list[str]:
    try:
        with UserSource(pid, -1, SourceOptions()) as source:
            source.survey()
    except Refused as refused:
        return refused.reasons
    return []


@pytest.mark.parametrize("reason", STATES)
def test_it_is_refused_with_its_reason(reason: str, host: PidHost, tmp_path: Path) -> None:
    with Program(host, BEGIN + STATES[reason] + END, tmp_path) as program:
        found = host.call("run", reasons_for, host.inner(program.pid))
        assert any(reason in text for text in found), found
        assert all("pid " in text for text in found)


def test_a_process_stopped_by_another_signal_than_sigstop(tmp_path: Path) -> None:
    code = "import os, signal; os.setpgid(0, 0); os.kill(os.getpid(), signal.SIGTTOU)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL) as child:
        try:
            while procfs.stat(child.pid)[3] != "T":
                time.sleep(0.01)
            assert any("is stopped by SIGTTOU" in reason for reason in reasons_for(child.pid))
        finally:
            child.kill()


LATE = """
import ctypes, os, struct, sys, threading, time
def filtered():
    code = ctypes.create_string_buffer(struct.pack("<HBBI", 6, 0, 0, 0x7FFF0000))  # allow all
    program = ctypes.create_string_buffer(struct.pack("@HP", 1, ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
    print("ready", flush=True)
    time.sleep(100)
def elsewhere():
    os.chroot("/"), ctypes.CDLL(None).unshare(0x4000000)
    print("ready", flush=True)
    time.sleep(100)
def interleaved():
    node = ctypes.c_ulong(1)
    assert ctypes.CDLL(None).syscall(238, 3, ctypes.byref(node), 8) == 0
    print("ready", flush=True)
    time.sleep(100)
def child(act):
    if os.fork() == 0:
        act()
print("up", flush=True)
sys.stdin.readline()
{act}
time.sleep(100)
"""


@contextlib.contextmanager
def surveyed(act: str) -> Iterator[tuple[UserSource, Callable[[], None]]]:
    """A program of which the survey is over, and what has it `act`."""
    argv = [sys.executable, "-c", LATE.replace("{act}", act)]
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as program, tempfile.TemporaryFile() as image:  # fmt: skip
        try:
            assert program.stdin is not None and program.stdout is not None
            to, said = program.stdin, program.stdout
            assert said.readline() == "up\n"

            def go_on() -> None:
                to.write("\n")
                to.flush()
                assert said.readline() == "ready\n"

            options = SourceOptions(cgroup_name=f"late-{os.getpid()}")
            with UserSource(program.pid, image.fileno(), options) as source:
                with pytest.raises(Refused):  # for its pipes to us, which are looked at last
                    source.survey()
                yield source, go_on
        finally:
            os.killpg(program.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        ("filtered()", "runs under seccomp"),
        ("threading.Thread(target=filtered).start()", "runs under seccomp"),
        ("child(filtered)", "runs under seccomp"),
        ("child(elsewhere)", "is in another uts namespace"),
        ("threading.Thread(target=interleaved).start()", "has a NUMA policy"),
    ],
)
def test_what_has_come_since_the_survey_is_refused_at_the_freeze(act: str, reason: str) -> None:
    with surveyed(act) as (source, go_on):
        go_on()
        source.instrument()
        with pytest.raises(CheckpointFailed, match=reason):
            source.freeze()
            source.final()
        source.thaw()


def test_a_process_born_since_the_survey_is_carried_tracked_as_it_is() -> None:
    with surveyed("child(lambda: (print('ready', flush=True), time.sleep(100)))") as (source, go_on):
        source.instrument()
        go_on()
        source.round()
        source.freeze()
        with pytest.raises(CheckpointFailed, match=r"fd 0: .*outside of the tree"):  # likewise, and no sooner
            source.final()
        source.thaw()


def test_a_thread_that_ends_meanwhile_takes_nothing_of_its_process_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = procfs.status

    def ended(pid: int, tid: int | None = None) -> dict[str, str]:
        if tid not in (None, pid):
            raise FileNotFoundError(tid)
        return real(pid, tid)

    with Workload("threads", tmp_path, 3) as program, UserSource(program.pid, -1, SourceOptions()) as source:
        monkeypatch.setattr(procfs, "status", ended)
        assert str(program.out) in [fact.path for fact in source.survey().files]
        monkeypatch.undo()
