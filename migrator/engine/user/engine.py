"""The user engine as a whole: the two calls of the contract, and what it can do on this host."""

from __future__ import annotations

import os
import platform
import signal

from migrator.engine import processor, spawn
from migrator.engine.base import (
    Capability,
    DestinationOptions,
    LateLock,
    Move,
    SourceOptions,
)
from migrator.engine.calls import EngineCalls, check_pid
from migrator.engine.user.descriptors import finish_moves
from migrator.engine.user.dump.own_tree import OwnTreeSource, holds_us
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.restore import late_locks
from migrator.engine.user.restore.destination import UserDestination
from migrator.linux import cgroup, ptrace, sys
from migrator.linux import x86_64 as arch
from migrator.linux.cgroup import Cgroup
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote


class UserEngine(EngineCalls):
    """checkpoint() and restart() on a stock kernel, and the objects of a live migration."""

    name = "user"
    precopies = True
    carries_less = False

    def source(self, pid: int, fd: int, options: SourceOptions) -> UserSource:
        check_pid(pid)
        return (OwnTreeSource if holds_us(pid) else UserSource)(pid, fd, options)

    def destination(self, fd: int, options: DestinationOptions) -> UserDestination:
        return UserDestination(fd, options)

    def finish_moves(self, root: int, moves: list[Move]) -> None:
        finish_moves(root, moves)

    def take_locks(self, cgroup: str, locks: list[LateLock], seconds: float) -> list[LateLock]:
        with Cgroup.at(cgroup) if cgroup.startswith("/") else Cgroup.open(cgroup) as group:
            return late_locks.take(group, locks, seconds)

    def xstate_size(self) -> int:
        return processor.xstate_facts()[1]

    def probe(self) -> list[Capability]:
        """What works on this host, found out by trying it on a task of our own."""
        out = [Capability("x86-64", platform.machine() == "x86_64", platform.machine())]
        out.append(_attempt("freezer cgroup", lambda: f"version {cgroup.hierarchy().version}"))
        out += _probe_stub()
        return out


def _probe_stub() -> list[Capability]:
    out: list[Capability] = []
    try:
        pid, pidfd = spawn.spawn([])
    except Exception as error:
        return [Capability("clone3", False, str(error))]
    out.append(Capability("clone3", True, "a stub process was made"))
    try:
        ptrace.seize(pid, ptrace.O_EXITKILL | ptrace.O_TRACESYSGOOD)
        ptrace.interrupt(pid)
        ptrace.wait(pid)
        out.append(Capability("ptrace", True, "seized and stopped"))
        xstate = arch.get_xstate(pid)
        out.append(Capability("xsave", len(xstate) > 0, f"{len(xstate)} bytes, features {arch.xfeatures(xstate):#x}"))
        out.append(_attempt("kcmp", lambda: str(sys.same(pid, pid, sys.KCMP_VM))))
        out.append(_attempt("dirty tracking", lambda: _probe_tracking(pid, pidfd)))
    except OSError as error:
        out.append(Capability("ptrace", False, str(error)))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(pidfd)
    return out


def _probe_tracking(pid: int, pidfd: int) -> str:
    remote = Remote(pid)
    remote.survivable = False
    with remote.borrowed():
        fd = remote.call(arch.NR["userfaultfd"], os.O_CLOEXEC | os.O_NONBLOCK | 1)
        if fd < 0:
            raise OSError(-fd, "userfaultfd")
        protection = WriteProtection(sys.pidfd_getfd(pidfd, fd))
        remote.map_scratch(65536)
        protection.register(remote.scratch, remote.scratch + 65536)
        scanner = Scanner(pid)
        scanner.scan(remote.scratch, remote.scratch + 65536, mask=2, returned=2, flags=3)
        scanner.close()
        protection.close()
    return "userfaultfd write protection and PAGEMAP_SCAN"


def _attempt(name: str, act: object) -> Capability:
    try:
        return Capability(name, True, act())  # type: ignore[operator]
    except Exception as error:
        return Capability(name, False, str(error))
