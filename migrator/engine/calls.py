"""checkpoint() and restart() of the contract, for engines whose Source and Destination do the work."""

from __future__ import annotations

import abc
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from migrator.engine.base import (
    NO_CHECKPOINT_HOOKS,
    NO_RESTART_HOOKS,
    AfterCheckpoint,
    CheckpointFlags,
    CheckpointHooks,
    Destination,
    DestinationOptions,
    RestartFlags,
    RestartHooks,
    Source,
    SourceOptions,
)
from migrator.errors import CheckpointFailed, UsageError, WorkloadEnded
from migrator.linux import procfs

_NO_CHECKPOINT_FLAGS, _NO_RESTART_FLAGS = CheckpointFlags(0), RestartFlags(0)
_ids = itertools.count(1)


class EngineCalls(abc.ABC):
    """An engine of which only source() and destination() are told."""

    @abc.abstractmethod
    def source(self, pid: int, fd: int, options: SourceOptions) -> Source:
        """See `Engine.source()`."""

    @abc.abstractmethod
    def destination(self, fd: int, options: DestinationOptions) -> Destination:
        """See `Engine.destination()`."""

    def checkpoint(
        self,
        pid: int,
        fd: int,
        flags: CheckpointFlags = _NO_CHECKPOINT_FLAGS,
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
        with _unless_ended(pid), self.source(pid, fd, options) as source:
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
        self,
        fd: int,
        flags: RestartFlags = _NO_RESTART_FLAGS,
        *,
        options: DestinationOptions | None = None,
        hooks: RestartHooks = NO_RESTART_HOOKS,
    ) -> int:
        """See `Engine.restart()`."""
        with self.destination(fd, options or DestinationOptions()) as destination:
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


@contextmanager
def _unless_ended(pid: int) -> Iterator[None]:
    """What goes wrong because the root has ended by itself is told as that."""
    start = procfs.start_time(pid)
    try:
        yield
    except (CheckpointFailed, OSError) as error:
        if procfs.has_ended(pid, start, procfs.ENDING_SECONDS):
            raise WorkloadEnded(pid) from error
        raise


def is_container_init(pid: int) -> bool:
    """Whether `pid` is process 1 of a pid namespace that is not ours."""
    return procfs.ns_pid(procfs.status(pid)) == 1 and pid != 1


def check_pid(pid: int) -> None:
    """Raises UsageError if there is no such process."""
    if pid <= 0 or not os.path.exists(f"/proc/{pid}"):
        raise UsageError(f"there is no process {pid}", hint="`migrator ps` and ps(1) list what runs")
