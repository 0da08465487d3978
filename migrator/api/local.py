"""checkpoint and restart on one host, blocking: each call from beginning to end on the thread that makes it.

`migrator.api` has them for asyncio. `critical` makes a block that a signal handler which raises must not leave.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from migrator import container
from migrator.api import image_buffer
from migrator.api.guard import CheckpointGuard, Critical
from migrator.api.workloads import Workload, find_workload
from migrator.container.sandbox import Sandbox
from migrator.engine.base import (
    AfterCheckpoint,
    CheckpointFlags,
    Destination,
    DestinationOptions,
    RestartFlags,
    RestartHooks,
)
from migrator.engine.select import select
from migrator.errors import CheckpointFailed, Refused, UsageError
from migrator.host import SandboxMaker
from migrator.linux import pipes, procfs


def checkpoint(
    target: Workload | str | int,
    output: Path | int,
    *,
    after: AfterCheckpoint = AfterCheckpoint.RUN,
    engine: str = "",
    critical: Critical = contextlib.nullcontext,
) -> int:
    """Save a process tree (by the pid of its root) or a container (by its name) to a file or a descriptor.

    A file is written beside and renamed: one of that name is a whole image or not there. To anything else of that
    name, such as a FIFO, it is written. Returns a checkpoint id, greater than 0. Raises UsageError, Refused or
    CheckpointFailed, with the workload running as if nothing had been asked.
    """
    workload = target if isinstance(target, Workload) else find_workload(str(target))
    if isinstance(output, int):
        return _save(workload, output, after, engine, critical, f"descriptor {output}", lambda: None)
    path = Path(os.path.realpath(output))
    try:
        special = path.exists() and not stat.S_ISREG(path.stat().st_mode)
        beside = path if special else path.with_name(f".{path.name}.{os.getpid()}")
        fresh = 0 if special else os.O_CREAT | os.O_EXCL
        fd = os.open(beside, os.O_WRONLY | os.O_CLOEXEC | fresh, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error

    def whole() -> None:
        if not special:
            os.fsync(fd)
            os.rename(beside, path)

    try:
        return _save(workload, fd, after, engine, critical, str(path), whole)
    except BaseException:
        if not special:
            beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _save(
    workload: Workload,
    fd: int,
    after: AfterCheckpoint,
    engine: str,
    critical: Critical,
    where: str,
    whole: Callable[[], None],
) -> int:
    if workload.container is not None and os.getpid() in procfs.descendants(workload.pid):
        raise Refused(
            [f"container {workload.name}: migrator itself runs in it"],
            hint="save it from outside, or name the pid of a program in it",
        )
    chosen = select(engine).engine
    try:
        with CheckpointGuard(workload, after, whole=whole, critical=critical) as guard:
            made = chosen.checkpoint(
                workload.pid,
                fd,
                CheckpointFlags.SUBTREE,
                after=after,
                options=workload.source_options(),
                hooks=guard,
            )
    except BrokenPipeError:
        raise CheckpointFailed(f"{where}: whoever reads it has gone away") from None
    except OSError as error:
        raise CheckpointFailed(f"{error.filename or where}: {error.strerror}") from error
    if workload.container is not None and after is AfterCheckpoint.KILL:
        container.remove(workload.container.name)
    return made


@dataclass(frozen=True)
class Restarted:
    """What restart() has made: the root's pid, the hold cgroup, and the name of the container, "" for a plain
    tree. The root is a child of this process."""

    pid: int
    cgroup: str
    container: str = ""

    def wait(self) -> int:
        """Wait for the root to end, and take down what stood around it. Its status as a shell counts it."""
        _, status = os.waitpid(self.pid, 0)
        if self.container:
            container.remove(self.container)
        else:
            with contextlib.suppress(OSError):  # processes that outlive the root stay in it
                os.rmdir(self.cgroup)
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


def restart(
    image: Path | int,
    *,
    frozen: bool = False,
    bridge: str = "",
    engine: str = "",
    built: Callable[[int], None] = lambda pid: None,
    waiting: Callable[[], None] = lambda: None,
    critical: Critical = contextlib.nullcontext,
) -> Restarted:
    """Restart what was saved in a file or comes from a descriptor.

    frozen:   leave the tasks frozen
    bridge:   for a container: the bridge of this host, if it is called otherwise than where it was saved
    built:    called with the root's pid while nothing runs yet; what it raises discards the copy
    waiting:  called when the original is still in the way, so that the image is read to its end first

    Raises UsageError, ImageError or RestartFailed, with nothing left of the copy.
    """
    fd = image if isinstance(image, int) else _open(image)
    opened = [] if isinstance(image, int) else [fd]
    try:
        if pipes.is_pipe(fd):
            in_the_way = image_buffer.beginning(fd)
            if in_the_way():
                waiting()
                fd = image_buffer.keep(fd, in_the_way)
                opened.append(fd)
        made = SandboxMaker(bridge)
        hooks = _Hooks(made, frozen, built, critical)
        options = DestinationOptions(sandbox=made)
        root = select(engine).engine.restart(
            fd, RestartFlags.FROZEN if frozen else RestartFlags(0), options=options, hooks=hooks
        )
    finally:
        for one in opened:
            os.close(one)
    return Restarted(root, hooks.cgroup, made.sandbox.container.name if made.sandbox is not None else "")


def _open(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="an image made by `migrator checkpoint`") from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{path} is a directory", hint="an image made by `migrator checkpoint`")
    return fd


class _Hooks(RestartHooks):
    def __init__(self, made: SandboxMaker, frozen: bool, built: Callable[[int], None], critical: Critical) -> None:
        self.cgroup = ""
        self._made = made
        self._frozen = frozen
        self._built = built
        self._critical = critical

    def built(self, root: int) -> None:
        self._built(root)

    def deciding(self) -> contextlib.AbstractContextManager[object]:
        return self._critical()

    def held(self, destination: Destination) -> None:
        self.cgroup = destination.cgroup
        sandbox: Sandbox | None = self._made.sandbox
        if sandbox is None:
            return
        if self._frozen:
            sandbox.settled()  # its port stays shut until it is thawed
        else:
            sandbox.open_port()  # first: connections ask their peers for what they missed
