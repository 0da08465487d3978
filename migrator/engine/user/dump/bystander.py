"""Whether a task has restricted itself by Landlock (landlock(7)), of which the kernel tells nobody: by its effect.

A task that has may not look at any process that has not (security/landlock/task.c), be it one of its own user. So a
bystander is made, a process with the user and group of the task, without capabilities, in its namespaces, that does
nothing; and get_robust_list(2) of it, called by the task itself, answers EFAULT, for want of an address, or EPERM.
That call asks for no more than to read (Yama has no say in it), and changes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
from collections.abc import Mapping

from migrator.engine.spawn import STUB_ADDRESS, spawn
from migrator.errors import CheckpointFailed, RestartFailed
from migrator.linux import namespaces, procfs, sys
from migrator.linux import x86_64 as arch

_CREATE_RULESET, _VERSION = 444, 1
_ENTERED = ("cgroup", "ipc", "uts", "net", "mnt")  # the pid namespace it is born in
RESTRICTED = "has restricted itself by Landlock (landlock_restrict_self(2)), which is not carried"


class Bystanders:
    """Those of one tree, made as they are asked for. All calls come from one thread."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], tuple[int, int]] = {}  # (pid here, pid there) by user and group

    def close(self) -> None:
        """They end."""
        for pid, _ in self._made.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        self._made.clear()

    def pid_for(self, state: Mapping[str, str]) -> int:
        """The pid, as the tree sees it, of the one for a task with this /proc/PID/status; 0: there is no Landlock here.

        Raises OSError if the task has ended."""
        if not landlock():
            return 0
        ids = int(state["Uid"].split()[0]), int(state["Gid"].split()[0])
        if ids not in self._made or os.waitpid(self._made[ids][0], os.WNOHANG)[0]:  # the task may well end it
            self._made.pop(ids, None)
            self._made[ids] = _make(int(state["Tgid"]), *ids)
        return self._made[ids][1]


def _make(beside: int, uid: int, gid: int) -> tuple[int, int]:
    flags = functools.reduce(int.__or__, (namespaces.KINDS[kind] for kind in _ENTERED))
    pidfd = os.pidfd_open(beside)
    try:
        with namespaces.born_in(beside):
            pid, own = spawn([], code=arch.bystander_code(STUB_ADDRESS, pidfd, flags, uid, gid), keep=(pidfd, -1))
        os.close(own)
    except RestartFailed as error:
        raise CheckpointFailed(f"no process can be made beside pid {beside}: {error}") from error
    finally:
        os.close(pidfd)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):  # it is all that it is to be
        return pid, procfs.ns_pid(procfs.status(pid))
    if procfs.stat(beside)[3] in "ZX":
        raise ProcessLookupError(errno.ESRCH, "has ended", f"pid {beside}")
    raise CheckpointFailed(f"no process can be made beside pid {beside}: it ended ({status:#x})")


@functools.cache
def landlock() -> bool:
    """Whether this kernel has it, and it is not switched off."""
    try:
        return sys.call(_CREATE_RULESET, 0, 0, _VERSION, name="landlock_create_ruleset") > 0
    except OSError:
        return False


def otherwise_confined(tid: int) -> bool:
    """Whether SELinux, AppArmor or Smack, each of which could deny a task the look as well, sets it apart from us."""
    return _label(tid) != _label(os.getpid())


def _label(tid: int) -> str:
    with contextlib.suppress(OSError):
        return procfs.read_text(f"/proc/{tid}/attr/current")
    return ""
