"""The two system calls, and what they say (kernel-patches/README.md, "The interface").

restart() is not called here: whoever calls it becomes the tree; see migrator.engine.kernel.caller.
"""

from __future__ import annotations

import contextlib
import errno
import os

from migrator.engine.base import Capability
from migrator.errors import CheckpointFailed, ImageError, MigratorError, RestartFailed
from migrator.linux import procfs, sys

NR_CHECKPOINT, NR_RESTART = 548, 549
SUBTREE, ROUND, LAST, MUTE, CONTINUE, CHECKSUMS = 0x1, 0x4, 0x8, 0x10, 0x20, 0x40  # of checkpoint()
FROZEN = 0x2  # of restart(): migrator.linux.x86_64 has it in code
_UNKNOWN = 1 << 30  # a flag that neither call has

# What a stream may answer: errors of whoever reads or keeps it, not of the call.
_STREAM = frozenset({errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.ECONNRESET})
_BROKEN_IMAGE = frozenset({errno.EBADMSG, errno.ENODATA, errno.EPROTONOSUPPORT, errno.EREMOTEIO})
_HINTS = {
    errno.EEXIST: "end that process, or run the workload in a container (`migrator run`), which has its own pids",
    errno.ENODATA: "it was cut short: nothing can be restarted from it",
    errno.EPROTONOSUPPORT: "a newer kernel may know it",
    errno.ENODEV: "restart on a host with the same processor features and kernel build",
    errno.EOPNOTSUPP: "the user engine may carry it: --engine user",
    errno.EREMOTEIO: "this is the first cause, from the source",
    errno.EAGAIN: "try again: a moment later the program will have taken it",
    errno.EPERM: "root is needed, and sysctl kernel.ckpt_unpriv_allowed for others",
}


class NotNow(CheckpointFailed):
    """Something is on its way that only running tasks can take: a moment later it can be saved."""


def checkpoint(pid: int, fd: int, flags: int) -> int:
    """Write the tree of `pid`, which is frozen, to `fd`: a number greater than 0. Without SUBTREE `pid` is the init of
    a pid namespace. The stream ends with its trailer, or with an error record if that can be written.

    ROUND writes what has changed of its memory since this thread's last call, while it runs, and returns how many pages
    that were; LAST, once it is frozen, goes on with that stream and ends it. Any other call of the thread drops it.
    CHECKSUMS puts in those of the contents of pages.

    Raises OSError of the stream, NotNow, CheckpointFailed with the first cause for all else."""
    try:
        return sys.call(NR_CHECKPOINT, pid, fd, flags, name="checkpoint", about=f"pid {pid}")
    except OSError as error:
        number = error.errno or 0
        if number in _STREAM:
            raise OSError(number, os.strerror(number)) from None
        raise _checkpoint_failed(error) from error


def mute(pid: int, flags: int) -> int:
    """Bring the connections of TCP of a frozen tree under repair, so that their end is not heard of; how many there
    were. `repair.revive()` undoes it. Raises CheckpointFailed."""
    try:
        return sys.call(NR_CHECKPOINT, pid, -1, flags | MUTE, name="checkpoint", about=f"pid {pid}")
    except OSError as error:
        raise _checkpoint_failed(error) from error


def forget_stop(pid: int, flags: int) -> None:
    """Before a frozen tree that was not saved is thawed: calls that answer a mere stop with EINTR are made again.

    Does nothing where it is not frozen."""
    with contextlib.suppress(OSError):
        sys.call(NR_CHECKPOINT, pid, -1, flags | CONTINUE)


def _checkpoint_failed(error: OSError) -> CheckpointFailed:
    number = error.errno or 0
    kind = NotNow if number == errno.EAGAIN else CheckpointFailed
    return kind(last_error("thread-self") or str(error), hint=_HINTS.get(number, ""))


def restart_failed(number: int, cause: str) -> MigratorError:
    """The error of a restart() that ended with errno `number`."""
    message = cause or f"restart: {os.strerror(number)}"
    hint = _HINTS.get(number, "")
    if number in _BROKEN_IMAGE:
        return ImageError(f"saving failed: {message}" if number == errno.EREMOTEIO else message, hint=hint)
    return RestartFailed(message, hint=hint)


def last_error(task: int | str) -> str:
    """The first cause of the last call of a task, "" if it did not fail or is gone."""
    try:
        return procfs.read_text(f"/proc/{task}/ckpt_error").strip()
    except OSError:
        return ""


def probe() -> list[Capability]:
    """Whether this kernel has the calls, found out by flags that they do not know."""
    found = [
        _answers("checkpoint()", NR_CHECKPOINT, _UNKNOWN, errno.EINVAL),
        _answers("restart()", NR_RESTART, _UNKNOWN, errno.EINVAL),
    ]
    if all(one.available for one in found):
        # no descriptor: the flag is looked at first
        found.append(_answers("restart() into a frozen cgroup", NR_RESTART, FROZEN, errno.EBADF))
        found.append(_answers("checkpoint() of memory ahead", NR_CHECKPOINT, ROUND, errno.EBADF))
        # no process has pid 0
        found.append(_answers("checkpoint() that mutes connections", NR_CHECKPOINT, MUTE, errno.ESRCH))
        found.append(_answers("checkpoint() that forgets a stop", NR_CHECKPOINT, CONTINUE, errno.ESRCH))
        found.append(_answers("checkpoint() with checksums", NR_CHECKPOINT, CHECKSUMS, errno.EBADF))
    return found


def _answers(name: str, number: int, flags: int, wanted: int) -> Capability:
    try:
        sys.call(number, 0, -1, flags)
    except OSError as error:
        if error.errno == wanted:
            return Capability(name, True, f"system call {number}")
        return Capability(name, False, f"system call {number}: {os.strerror(error.errno or 0)}")
    return Capability(name, False, f"system call {number} took flags {flags:#x}")
