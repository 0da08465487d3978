"""Containers on this host: commands in surroundings that can be built again on another.

made = await containers.run(ContainerSpec(name="shop", argv=("redis-server",), addresses=("10.0.0.50/24",)))
for row in await containers.list(rate=0.5): ...
await containers.stop("shop")
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from migrator import container
from migrator.api.results import exit_status
from migrator.api.workloads import find_workload
from migrator.container import Container, ContainerSpec, Row, attention, list_containers, spec_for, state, switchover
from migrator.engine.select import select
from migrator.errors import MigratorError, UsageError
from migrator.linux import pidfd
from migrator.linux.cgroup import Cgroup
from migrator.recovery.journal import Journal, JournalError, boot_id, journal_directory
from migrator.runtime.thread import OwnThread

__all__ = [
    "Container",
    "ContainerSpec",
    "Output",
    "Row",
    "ends",
    "list",
    "names",
    "run",
    "spec_for",
    "stop",
    "thaw",
    "wait",
    "watch",
]  # fmt: skip

_TAIL = 1 << 16  # bytes


async def run(spec: ContainerSpec) -> Container:
    """Start the command of `spec` as process 1 of a container, and return once it has been executed.

    It is a child of this process, but lives on without it. Raises UsageError if the name is taken or the
    specification makes no sense, SandboxError, NetworkError or StartFailed; nothing is left behind then.
    """
    return await asyncio.to_thread(container.run, spec)


async def ends(made: Container, *, within: float) -> bool:
    """Whether a container that this process has started ends within so many seconds. `wait()` has its status."""
    fd = os.pidfd_open(made.init_pid)
    try:
        return await asyncio.to_thread(pidfd.ends, fd, within)
    finally:
        os.close(fd)


class Output:
    """What the command of a container writes from now on: `spec` is about to be run."""

    def __init__(self, spec: ContainerSpec) -> None:
        self.path = f"{spec.root}{spec.effective_log}"
        try:
            self._begin = os.stat(self.path, follow_symlinks=False).st_size
        except OSError:
            self._begin = 0

    def lines(self, most: int) -> builtins.list[str]:
        """The last lines of it; none where it cannot be read."""
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as log:
                log.seek(max(self._begin, os.fstat(fd).st_size - _TAIL))
                return log.read(_TAIL).decode(errors="replace").splitlines()[-most:]
        except OSError:
            return []


async def wait(made: Container) -> int:
    """Wait for the end of a container that this process has started, and remove it. Its exit status as a shell
    counts it. Cancelling only stops waiting. Raises ChildProcessError if it was started by another process."""
    status = await exit_status(made.init_pid)
    if container.find(made.name) is not None:  # else it went to another host, or was stopped
        await asyncio.to_thread(container.remove, made.name)
    return status


async def stop(name: str, *, timeout: float = 10.0) -> None:
    """End a container and remove what was set up for it: SIGTERM, and SIGKILL after `timeout` seconds.

    Raises UsageError if there is none of that name, or a migration of it is not over."""
    await asyncio.to_thread(_stop, name, timeout)


async def thaw(target: str | int) -> None:
    """Let frozen tasks run: of a container, or of the cgroup that the process `target` is in.

    Raises UsageError if there are none, or a migration of them is not over: then `settle()` decides."""
    await asyncio.to_thread(_thaw, str(target))


async def list(*, rate: float = 0.0) -> builtins.list[Row]:
    """The containers of this host by name, also those that have ended. With `rate`, how fast each running one
    writes to its memory is measured for so many seconds; it keeps running."""
    rows = await asyncio.to_thread(container.rows)
    if rate <= 0:
        return rows
    rates = await asyncio.gather(*(_dirty_rate(row, rate) for row in rows))
    return [replace(row, dirty_bytes_per_second=found) for row, found in zip(rows, rates, strict=True)]


def names() -> builtins.list[str]:
    """The names of the containers of this host, sorted. Takes no time: a file each is read."""
    return [found.name for found in list_containers()]


async def watch(*, every: float = 1.0, rate: float = 0.0) -> AsyncIterator[builtins.list[Row]]:
    """`list()` again and again, `every` so many seconds, for as long as it is iterated over."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        yield await list(rate=rate)
        await asyncio.sleep(max(every - (loop.time() - began), 0.0))


async def _dirty_rate(row: Row, seconds: float) -> float | None:
    """Bytes per second; None for a container that does not run, ends meanwhile, or is being saved or moved."""
    if row.state != "running":
        return None
    async with OwnThread(f"dirty rate {row.name}") as thread:
        try:
            return await thread.run(_measure, row.name, seconds)
        except (MigratorError, ProcessLookupError, FileNotFoundError):
            return None


def _measure(name: str, seconds: float) -> float | None:
    workload = find_workload(name)
    assert workload.container is not None
    with contextlib.ExitStack() as stack:
        if not stack.enter_context(attention.measuring(workload.container)):
            return None
        sink = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        stack.callback(os.close, sink)
        source = stack.enter_context(select().engine.source(workload.pid, sink, workload.source_options()))
        return source.dirty_rate(seconds)


def _stop(name: str, timeout: float) -> None:
    found = container.get(name)
    _refuse_if_moving(found.name, found.cgroup)
    container.stop(name, timeout=timeout)


def _thaw(target: str) -> None:
    found = container.find(target)
    if found is not None:
        group = Cgroup.at(found.cgroup)
    elif target.isdigit() and os.path.exists(f"/proc/{target}"):
        group = Cgroup.of(int(target))
        found = state.of_pid(int(target))
    else:
        raise UsageError(f"there is no container and no process {target!r} on this host")
    with group:
        _refuse_if_moving(found.name if found is not None else "", str(group.path))
        if found is not None:
            switchover.reopen(found)
            found.settled()
        group.thaw()


def _refuse_if_moving(name: str, path: str) -> None:
    """Where a migration is open, only its journal says who may run: a thaw by hand could make two copies."""
    folder = journal_directory()
    for file in sorted(folder.glob("*.journal")) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, JournalError), Journal.open(file) as journal:
            facts = journal.header
            mine = (name and facts.container == name) or Path(facts.cgroup or "-").name == Path(path).name
            if mine and not journal.settled and facts.boot_id in ("", boot_id()):
                raise UsageError(
                    f"{name or path} takes part in migration {facts.migration}, which is not over",
                    hint="`migrator settle` finishes it, or says what to decide",
                )
