"""Moving a workload to another host, and finding out whether that could be done."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time

import msgspec

from migrator import container, host, model
from migrator.api.results import CheckResult
from migrator.api.settings import MigrateSettings
from migrator.api.tasks import to_the_end
from migrator.api.workloads import Workload, find_workload, trees
from migrator.container import attention, connection_filter
from migrator.container.switchover import NetworkLock
from migrator.engine.base import TOLD_OF_ALL
from migrator.engine.select import select_for
from migrator.errors import CheckpointFailed, Fate, MigrationAborted, MigratorError, Overrun, Refused, WorkloadEnded
from migrator.model import MigrationResult, OnEvent, Outcome
from migrator.runtime.thread import OwnThread
from migrator.session.preflight import PreflightReport
from migrator.session.settings import SourceSettings
from migrator.session.source import SourceSession

_TRIES = 3  # where the stop gets too long


async def migrate(
    target: str | int,
    peer: str,
    *,
    settings: MigrateSettings | None = None,
    login: host.Login | None = None,
    on_event: OnEvent = model.nobody,
) -> MigrationResult:
    """Move a workload while it keeps working. Returns once it runs on `peer` and is gone here.

    target:    a container's name, or the pid of the root of a process tree
    peer:      [USER@]HOST[:PORT], any sshd or an agent
    on_event:  is told what happens, on the event loop: see `migrator.model.Event`

    What earlier migrations have left on this host is settled first. Cancelling the task aborts before COMMIT:
    the workload runs on here, and CancelledError is raised. After COMMIT the outcome is waited for.

    Raises UsageError, Refused, TransportError, MigrationAborted or another MigratorError, whose `fate` says
    where the workload is; SOURCE for all but Undecided, which leaves it frozen here.
    """
    asked, login = settings or MigrateSettings(), login or host.Login()
    until = time.monotonic() + asked.timeout
    tries, fallback = _TRIES, ""
    while True:
        try:
            result, _ = await _run(target, peer, asked, login, on_event, dry=False, fallback=fallback)
            return result
        except Overrun:
            tries -= 1
            if not tries or time.monotonic() >= until:
                raise
        except _Unfit as unfit:
            # It refused nothing, and failed all the same: the one that carries whatever can be carried does not.
            fallback = unfit.reason
            on_event(model.Waiting(unfit.migration, fallback))
            if time.monotonic() >= until:
                raise unfit.error from None
        asked = dataclasses.replace(asked, timeout=until - time.monotonic())


async def check(
    target: str | int,
    peer: str,
    *,
    settings: MigrateSettings | None = None,
    login: host.Login | None = None,
    on_event: OnEvent = model.nobody,
) -> CheckResult:
    """Find out whether `migrate` with the same arguments could be done. The workload is neither stopped nor
    changed. Raises Refused, with every reason, if it cannot; else as `migrate`."""
    result, report = await _run(target, peer, settings or MigrateSettings(), login or host.Login(), on_event, dry=True)
    return CheckResult(
        result=result,
        processes=len(result.pids),
        files=report.files if report is not None else 0,
        predicted_downtime=report.predicted_downtime if report is not None else 0.0,
        notes=[*result.warnings, TOLD_OF_ALL],
    )


class _Unfit(Exception):
    """An engine that carries less than others, and was not asked for, has failed; the workload runs on."""

    def __init__(self, migration: str, engine: str, error: MigratorError) -> None:
        super().__init__(error.message)
        self.migration, self.error = migration, error
        self.reason = f"engine {engine}: {error.message}"


async def _run(
    target: str | int,
    peer: str,
    asked: MigrateSettings,
    login: host.Login,
    on_event: OnEvent,
    *,
    dry: bool,
    fallback: str = "",
) -> tuple[MigrationResult, PreflightReport | None]:
    """`fallback`: why the engine is to be taken that carries whatever can be carried; "" for the best one."""
    workload = await asyncio.to_thread(find_workload, str(target))
    copy_files = asked.copy_files or bool(asked.copy_paths)
    carried = await asyncio.to_thread(trees, workload, copy_files, list(asked.copy_paths))
    for one in await host.settle(login):
        on_event(model.Settled(one.migration, one.detail, one.fate.value))
    try:
        options = await asyncio.to_thread(workload.source_options)
        await asyncio.to_thread(_check_network, workload)
        choice = await asyncio.to_thread(select_for, workload.pid, options, asked.engine, general=bool(fallback))
        if fallback:
            choice = dataclasses.replace(choice, reason=fallback)
        here = await asyncio.to_thread(host.facts, choice)
        link = await login.connect(peer)
    except MigratorError as error:
        error.fate = Fate.SOURCE
        raise

    def named(result: MigrationResult) -> MigrationResult:
        return msgspec.structs.replace(result, engine=choice.engine.name, engine_reason=choice.reason)

    def tell(event: model.Event) -> None:
        if isinstance(event, model.Ended):
            event = msgspec.structs.replace(event, result=named(event.result))
        on_event(event)

    found, migration = workload.container, asked.migration or host.new_migration()
    session = SourceSession(
        SourceSettings(
            migration=migration,
            peer=peer,
            container=options.container,
            container_spec=options.container_spec,
            root=workload.pid,
            max_downtime=asked.max_downtime,
            thaw_overrun=asked.on_overrun == "abort",
            timeout=asked.timeout,
            bandwidth=asked.bandwidth,
            dry_run=dry,
            cold=asked.cold or not choice.engine.precopies,
            copy_files=copy_files,
            trees=carried,
            log=found.spec.log if found is not None else "",
            fleet=asked.fleet,
            token=asked.token,
            verify=asked.verify,
        ),
        lambda fd: choice.engine.source(workload.pid, fd, options),
        link,
        here,
        reconnect=lambda: login.connect(peer),
        network=NetworkLock(found) if found is not None and found.ifindex else None,
        on_event=tell,
    )
    try:
        async with OwnThread("attention") as thread, contextlib.AsyncExitStack() as stack:
            held = attention.saving(found)
            await thread.run(held.__enter__)
            stack.callback(held.__exit__, None, None, None)
            try:
                result = await session.run()
            finally:
                await to_the_end(link.close())
    except (Overrun, WorkloadEnded):
        raise
    except (CheckpointFailed, MigrationAborted) as error:
        if dry or asked.engine or fallback or error.fate is not Fate.SOURCE or not choice.engine.carries_less:
            raise
        raise _Unfit(migration, choice.engine.name, error) from error
    if result.outcome is Outcome.MIGRATED and found is not None:
        await to_the_end(asyncio.to_thread(container.remove, found.name))
    return named(result), session.report


def _check_network(workload: Workload) -> None:
    """Raises Refused where the connections of a container could not be held together."""
    found = workload.container
    if found is not None and found.ifindex and (lacking := connection_filter.missing()):
        raise Refused([f"container {found.name}: its connections cannot be moved: {lacking}"])
