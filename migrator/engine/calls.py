"""checkpoint() and restart() of the contract, for engines whose Source and Destination do the work."""

from __future__ import annotations

import itertools
import os

from migrator.engine.base import (
    NO_CHECKPOINT_HOOKS,
    NO_RESTART_HOOKS,
    AfterCheckpoint,
    CheckpointFlags,
    CheckpointHooks,
    Destination,
    DestinationOptions,
    Engine,
    RestartFlags,
    RestartHooks,
    SourceOptions,
)
from migrator.errors import UsageError
from migrator.linux import procfs

_ids = itertools.count(1)


def checkpoint(
    engine: Engine,
    pid: int,
    fd: int,
    flags: CheckpointFlags,
    *,
    after: AfterCheckpoint = AfterCheckpoint.RUN,
    options: SourceOptions | None = None,
    hooks: CheckpointHooks = NO_CHECKPOINT_HOOKS,
) -> int:
    """See `Engine.checkpoint()`."""
    options = options or SourceOptions()
    options.subtree = bool(flags & CheckpointFlags.SUBTREE)
    options.checksums = True
    check_pid(pid)
    if not options.subtree and not is_container_init(pid):
        raise UsageError(
            f"pid {pid} is not the init task of a container",
            hint="pass --subtree to save it and its children, and see to what it shares with others",
        )
    with engine.source(pid, fd, options) as source:
        source.survey()
        hooks.surveyed(source)
        source.instrument()
        source.freeze()
        source.final(hooks.silence)
        hooks.saved()
        if after is AfterCheckpoint.RUN:
            source.thaw()
        else:
            source.hold()
            if after is AfterCheckpoint.KILL:
                hooks.ending()
                source.release()
            else:
                source.leave_stopped()
    return next(_ids)


def restart(
    engine: Engine,
    fd: int,
    flags: RestartFlags,
    *,
    options: DestinationOptions | None = None,
    hooks: RestartHooks = NO_RESTART_HOOKS,
) -> int:
    """See `Engine.restart()`."""
    destination: Destination
    with engine.destination(fd, options or DestinationOptions()) as destination:
        root = destination.build()
        hooks.built(root)
        destination.hold()
        hooks.held(destination)
        if flags & RestartFlags.FROZEN:
            destination.leave_frozen()
        else:
            destination.resume()
            destination.tidy()
    return root


def is_container_init(pid: int) -> bool:
    """Whether `pid` is process 1 of a pid namespace that is not ours."""
    return procfs.ns_pid(procfs.status(pid)) == 1 and pid != 1


def check_pid(pid: int) -> None:
    """Raises UsageError if there is no such process."""
    if pid <= 0 or not os.path.exists(f"/proc/{pid}"):
        raise UsageError(f"there is no process {pid}", hint="`migrator ps` and ps(1) list what runs")
