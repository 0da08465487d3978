"""Saving and restarting on one host, blocking: each call from beginning to end on the thread that makes it.

`migrator.api.image` has them for asyncio.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from migrator import container
from migrator.api import image_buffer
from migrator.api.guard import CheckpointGuard
from migrator.api.image_file import open_image
from migrator.api.workloads import Workload
from migrator.container import attention
from migrator.container.sandbox import Sandbox, SandboxMaker
from migrator.engine.base import (
    AfterCheckpoint,
    CheckpointFlags,
    Destination,
    DestinationOptions,
    RestartFlags,
    RestartHooks,
)
from migrator.engine.select import select_for, select_like
from migrator.errors import CheckpointFailed, Refused
from migrator.linux import pipes, procfs


@dataclass(frozen=True)
class Saved:
    """What save() has made.

    id:      greater than 0
    pids:    of the processes saved, the root first
    engine:  which did it, and why that one
    """

    id: int
    pids: list[int]
    engine: str
    engine_reason: str
    container: str = ""


def save(
    workload: Workload,
    fd: int,
    where: str,
    *,
    after: AfterCheckpoint,
    engine: str = "",
    whole: Callable[[], None],
) -> Saved:
    """Save a workload to a descriptor; `where` is its name in errors.

    `whole` is called while the tasks still stand, when the image is complete. What it raises, as every error, lets
    them run on as if nothing had been asked. Raises UsageError, Refused, CheckpointFailed or JournalError."""
    if workload.container is not None and os.getpid() in procfs.descendants(workload.pid):
        raise Refused(
            [f"container {workload.name}: migrator itself runs in it"],
            hint="save it from outside, or name the pid of a program in it",
        )
    options = workload.source_options()
    choice = select_for(workload.pid, options, engine)
    try:
        with attention.saving(workload.container), CheckpointGuard(workload, after, whole=whole) as guard:
            made = choice.engine.checkpoint(
                workload.pid,
                fd,
                CheckpointFlags.SUBTREE,
                after=after,
                options=options,
                hooks=guard,
            )
    except BrokenPipeError:
        raise CheckpointFailed(f"{where}: whoever reads it has gone away") from None
    except OSError as error:
        raise CheckpointFailed(f"{error.filename or where}: {error.strerror}") from error
    name = workload.container.name if workload.container is not None else ""
    if name and after is AfterCheckpoint.KILL:
        container.remove(name)
    return Saved(made, guard.pids, choice.engine.name, choice.reason, name)


@dataclass(frozen=True)
class Restarted:
    """What restart() has made: the root's pid, the hold cgroup, and the name of the container, "" for a plain
    tree. The root is a child of this process. `engine` did it, and why that one."""

    pid: int
    cgroup: str
    engine: str
    engine_reason: str
    container: str = ""

    def take_down(self) -> None:
        """Remove what stood around a tree whose root has ended and was waited for."""
        if self.container:
            container.remove(self.container)
        else:
            with contextlib.suppress(OSError):  # processes that outlive the root stay in it
                os.rmdir(self.cgroup)


def restart(
    image: Path | int,
    *,
    frozen: bool = False,
    bridge: str = "",
    verify: bool = False,
    engine: str = "",
    built: Callable[[int], None] = lambda pid: None,
    waiting: Callable[[], None] = lambda: None,
    given_up: Callable[[], bool] = lambda: False,
) -> Restarted:
    """Restart what was saved in a file or comes from a descriptor.

    frozen:   leave the tasks frozen
    bridge:   for a container: the bridge of this host, if it is called otherwise than where it was saved
    verify:   look at the copy before it runs: see DestinationOptions
    built:    called with the root's pid while nothing runs yet; what it raises discards the copy
    waiting:  called when the original is still in the way, so that the image is read to its end first
    given_up: whether nobody waits for it any more

    Raises UsageError, ImageError or RestartFailed, with nothing left of the copy.
    """
    fd = image if isinstance(image, int) else open_image(image)
    opened = [] if isinstance(image, int) else [fd]
    try:
        if pipes.is_pipe(fd):
            in_the_way = image_buffer.beginning(fd)
            if in_the_way():
                waiting()
                fd = image_buffer.keep(fd, in_the_way, given_up)
                opened.append(fd)
        made = SandboxMaker(bridge)
        hooks = _Hooks(made, frozen, built)
        options = DestinationOptions(sandbox=made, verify=verify)
        # A second look at the copy is not for each of them.
        choice = select_like("" if verify else image_buffer.saved_by(fd), engine)
        root = choice.engine.restart(
            fd, RestartFlags.FROZEN if frozen else RestartFlags(0), options=options, hooks=hooks
        )
    finally:
        for one in opened:
            os.close(one)
    name = made.sandbox.container.name if made.sandbox is not None else ""
    return Restarted(root, hooks.cgroup, choice.engine.name, choice.reason, name)


class _Hooks(RestartHooks):
    def __init__(self, made: SandboxMaker, frozen: bool, built: Callable[[int], None]) -> None:
        self.cgroup = ""
        self._made = made
        self._frozen = frozen
        self._built = built

    def built(self, root: int) -> None:
        self._built(root)

    def held(self, destination: Destination) -> None:
        self.cgroup = destination.cgroup
        sandbox: Sandbox | None = self._made.sandbox
        if sandbox is None:
            return
        if self._frozen:
            sandbox.settled()  # its port stays shut until it is thawed
        else:
            sandbox.open_port()  # first: connections ask their peers for what they missed
