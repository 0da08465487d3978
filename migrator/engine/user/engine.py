"""The user engine as a whole: the two calls of the contract, and what it can do on this host."""

from __future__ import annotations

import os
import platform

from migrator.engine.base import (
    AfterCheckpoint,
    Capability,
    CheckpointFlags,
    DestinationOptions,
    RestartFlags,
    SourceOptions,
)
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.restore import spawn
from migrator.engine.user.restore.destination import UserDestination
from migrator.errors import UsageError
from migrator.linux import cgroup, ptrace, sys
from migrator.linux import x86_64 as arch
from migrator.linux.pagemap import Scanner, WriteProtection
from migrator.linux.remote import Remote

NO_CHECKPOINT_FLAGS = CheckpointFlags(0)
NO_RESTART_FLAGS = RestartFlags(0)


class UserEngine:
    """checkpoint() and restart() on a stock kernel, and the objects of a live migration."""

    name = "user"

    def source(self, pid: int, fd: int, options: SourceOptions) -> UserSource:
        """A source of the stream `fd` for the tree below `pid`. Raises UsageError if there is no such process."""
        _check_pid(pid)
        return UserSource(pid, fd, options)

    def destination(self, fd: int, options: DestinationOptions) -> UserDestination:
        return UserDestination(fd, options)

    def checkpoint(
        self,
        pid: int,
        fd: int,
        flags: CheckpointFlags = NO_CHECKPOINT_FLAGS,
        *,
        after: AfterCheckpoint = AfterCheckpoint.RUN,
        options: SourceOptions | None = None,
    ) -> int:
        """Save the tree whose root is `pid` to `fd`: the seed's checkpoint(2). Returns a checkpoint id > 0.

        Without SUBTREE `pid` must be a container's init task. The tasks are stopped meanwhile; what becomes
        of them then is `after`. On an error they run on, and the stream ends with an error record."""
        _check_pid(pid)
        options = options or SourceOptions()
        options.subtree = bool(flags & CheckpointFlags.SUBTREE)
        if not options.subtree and not is_container_init(pid):
            raise UsageError(
                f"pid {pid} is not the init task of a container",
                hint="pass --subtree to save it and its children, and see to what it shares with others",
            )
        with UserSource(pid, fd, options) as source:
            source.survey()
            source.arm()
            source.freeze()
            source.final()
            if after is AfterCheckpoint.KILL:
                source.hold()
                source.release()
            elif after is AfterCheckpoint.STOP:
                source.leave_stopped()
            else:
                source.thaw()
        return os.getpid()

    def restart(
        self, fd: int, flags: RestartFlags = NO_RESTART_FLAGS, *, options: DestinationOptions | None = None
    ) -> int:
        """Restart the tree saved in `fd`: the seed's restart(2). Returns the pid of its root."""
        with UserDestination(fd, options or DestinationOptions()) as destination:
            root = destination.build()
            destination.hold()
            if flags & RestartFlags.FROZEN:
                destination.leave_frozen()
            else:
                destination.resume()
                destination.tidy()
        return root

    def probe(self) -> list[Capability]:
        """What works on this host, found out by trying it on a task of our own."""
        out = [Capability("x86-64", platform.machine() == "x86_64", platform.machine())]
        out.append(_attempt("freezer cgroup", lambda: f"version {cgroup.hierarchy().version}"))
        out += _probe_stub()
        return out

    @property
    def available(self) -> bool:
        return all(c.available for c in self.probe())


def is_container_init(pid: int) -> bool:
    """Whether `pid` is process 1 of a pid namespace that is not ours."""
    from migrator.linux import procfs

    return procfs.ns_pid(procfs.status(pid)) == 1 and pid != 1


def _check_pid(pid: int) -> None:
    if pid <= 0 or not os.path.exists(f"/proc/{pid}"):
        raise UsageError(f"there is no process {pid}", hint="`migrator ps` and ps(1) list what runs")


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
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(pidfd)
    return out


def _probe_tracking(pid: int, pidfd: int) -> str:
    remote = Remote(pid)
    remote.survivable = False
    with remote.borrowed():
        fd = remote.call(arch.NR["userfaultfd"], 0o2000000 | 0o4000 | 1)
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
