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
import threading
from collections.abc import Mapping

from migrator.engine.spawn import STUB_ADDRESS, spawn
from migrator.errors import CheckpointFailed, RestartFailed
from migrator.linux import namespaces, pidfd, procfs, sys
from migrator.linux import x86_64 as arch

_CREATE_RULESET, _VERSION = 444, 1
_ENTERED = ("cgroup", "ipc", "uts", "net", "mnt")  # the pid namespace it is born in
RESTRICTED = "has restricted itself by Landlock (landlock_restrict_self(2)), which is not carried"


class _Bystander:
    """there: its pid, as the tree sees it.

    The first process of a pid namespace does not end before all others of it are waited for: so whatever ends this
    one, somebody waits for it all the time."""

    def __init__(self, pid: int, own: int) -> None:
        self._pidfd = own
        self.there = procfs.ns_pid(procfs.status(pid))
        threading.Thread(target=_await, args=(pid,), name="bystander", daemon=True).start()

    def has_ended(self) -> bool:
        return pidfd.ends(self._pidfd, 0)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        pidfd.ends(self._pidfd, None)
        os.close(self._pidfd)


class Bystanders:
    """Those of one tree, made as they are asked for. All calls come from one thread."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int], _Bystander] = {}  # by user and group

    def close(self) -> None:
        """They end."""
        for one in self._made.values():
            one.end()
        self._made.clear()

    def pid_for(self, state: Mapping[str, str]) -> int:
        """The pid, as the tree sees it, of the one for a task with this /proc/PID/status; 0: there is no Landlock here.

        Raises OSError if the task has ended."""
        if not landlock():
            return 0
        ids = int(state["Uid"].split()[0]), int(state["Gid"].split()[0])
        known = self._made.get(ids)
        if known is not None and known.has_ended():  # the task may well end it
            del self._made[ids]
            known.end()
            known = None
        if known is None:
            known = self._made[ids] = _make(int(state["Tgid"]), *ids)
        return known.there


def _await(pid: int) -> None:
    with contextlib.suppress(ChildProcessError):  # one that waits for all children, as an init does, was faster
        os.waitpid(pid, 0)


def _make(beside: int, uid: int, gid: int) -> _Bystander:
    flags = functools.reduce(int.__or__, (namespaces.KINDS[kind] for kind in _ENTERED))
    target = os.pidfd_open(beside)
    try:
        with namespaces.born_in(beside):
            pid, own = spawn([], code=arch.bystander_code(STUB_ADDRESS, target, flags, uid, gid), keep=(target, -1))
    except RestartFailed as error:
        raise CheckpointFailed(f"no process can be made beside pid {beside}: {error}") from error
    finally:
        os.close(target)
    _, status = os.waitpid(pid, os.WUNTRACED)
    if os.WIFSTOPPED(status):  # it is all that it is to be
        return _Bystander(pid, own)
    os.close(own)
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
