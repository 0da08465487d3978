"""The descriptor by which writes are tracked is in the program's table for microseconds: whatever happens in them, it
does not stay there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys as python
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.linux import cgroup, procfs, sys
from migrator.linux import x86_64 as arch
from migrator.linux.remote import Remote

pytestmark = pytest.mark.root

QUIET = "import time; n = 0\nwhile True: n += 1; print(n, flush=True); time.sleep(0.001)"
# a thread does something about the descriptor as soon as it sees it
ABOUT = r"""
import os, sys, threading, time
def watch():
    while True:
        for name in os.listdir("/proc/self/fd"):
            try:
                found = os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[userfaultfd]"
            except OSError:
                continue
            if found:
                act(int(name))
                return
def born(number):
    if os.fork() == 0:
        print("born", flush=True)
        while True: time.sleep(1)
def replaced(number):
    os.dup2(os.open("/etc/passwd", os.O_RDONLY), number)
    print("replaced", flush=True)
    while True:
        assert os.readlink(f"/proc/self/fd/{number}") == "/etc/passwd"
        print("tick", flush=True); time.sleep(0.001)
act = globals()[sys.argv[1]]
threading.Thread(target=watch).start()
print("ready", flush=True)
while True: time.sleep(1)
"""


def wait_until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextmanager
def running(log: Path, program: str, *arguments: str) -> Iterator[int]:
    with (
        log.open("w") as out,
        subprocess.Popen(
            [python.executable, "-c", program, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out
        ) as child,
    ):
        try:
            wait_until(lambda: log.stat().st_size > 0)
            yield child.pid
        finally:
            for pid in [*procfs.children(child.pid), child.pid]:
                os.kill(pid, signal.SIGKILL)


def userfaultfds(pid: int) -> list[str]:
    links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    return [link for link in links if "userfaultfd" in link]


@contextmanager
def source_of(pid: int) -> Iterator[UserSource]:
    options = SourceOptions(cgroup_name=f"userfaultfd-{os.getpid()}")
    with open(os.devnull, "wb") as sink, UserSource(pid, sink.fileno(), options) as source:
        source.survey()
        yield source
        source.thaw()


@pytest.mark.parametrize("moment", ["pidfd_getfd", "kcmp", "go_on", "go_on without process_vm_readv"])
def test_an_agent_killed_while_it_is_there_does_not_leave_it(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moment, _, without = moment.partition(" without ")
    if without:
        monkeypatch.setitem(arch.NR, without, 500)
    with running(tmp_path / "log", QUIET) as pid:
        agent = os.fork()
        if agent == 0:
            try:
                with source_of(pid) as source:
                    where = Remote if moment == "go_on" else sys
                    monkeypatch.setattr(where, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                    source.instrument("user")
            finally:
                os._exit(0)
        _, status = os.waitpid(agent, 0)
        assert os.WIFSIGNALED(status)
        before = (tmp_path / "log").stat().st_size
        wait_until(lambda: (tmp_path / "log").stat().st_size > before)
        assert userfaultfds(pid) == []
    for folder in cgroup.hierarchy().mountpoint.glob(f"{cgroup.PARENT}/userfaultfd-{agent}"):
        with cgroup.Cgroup.at(folder) as left:
            left.remove()


def look_once(monkeypatch: pytest.MonkeyPatch, met: Callable[[], bool]) -> None:
    """The first time that it is fetched, wait until something was done about it."""
    fetch = sys.pidfd_getfd

    def fetch_and_wait(pidfd: int, fd: int) -> int:
        got = fetch(pidfd, fd)
        monkeypatch.setattr(sys, "pidfd_getfd", fetch)
        wait_until(met)
        return got

    monkeypatch.setattr(sys, "pidfd_getfd", fetch_and_wait)


@pytest.mark.parametrize("rounds", [0, 1], ids=["born before the freeze", "born before a round"])
def test_a_child_born_while_it_is_there_does_not_keep_it(
    rounds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    with running(log, ABOUT, "born") as pid:
        with source_of(pid) as source:
            look_once(monkeypatch, lambda: "born" in log.read_text())
            source.instrument("user")
            (child,) = procfs.children(pid)
            assert userfaultfds(child)
            for _ in range(rounds):
                source.round()
            source.freeze()
            source.final()
        assert userfaultfds(child) == userfaultfds(pid) == []


def test_what_a_thread_has_put_in_its_place_is_not_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    with running(log, ABOUT, "replaced") as pid:
        with source_of(pid) as source:
            look_once(monkeypatch, lambda: "replaced" in log.read_text())
            source.instrument("user")
            source.freeze()
            source.final()
        before = log.read_text().count("tick")
        wait_until(lambda: log.read_text().count("tick") > before + 3 or "Error" in log.read_text())
        assert "Error" not in log.read_text()
