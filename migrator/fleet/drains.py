"""One step of each drain: what the policy says about the cluster as it is now is stored, then done."""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec

from migrator.errors import MigratorError
from migrator.fleet import records as r
from migrator.fleet.mover import Mover
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import Conflict, Lock
from migrator.protocol.fleet import Save
from policies import drain
from policies.model import Cluster

log = logging.getLogger("migrator.controller")


class Drains:
    """The drains of a fleet while one lock is held."""

    def __init__(self, state: FleetState, observer: Observer, mover: Mover, lock: Lock) -> None:
        self._state = state
        self._observer = observer
        self._mover = mover
        self._lock = lock
        self._failed: dict[str, list[tuple[str, str, float]]] = {}  # by host: workload, reason, time
        self._saving: dict[str, asyncio.Task[None]] = {}

    def finished(self, finished: r.FinishedMove) -> None:
        """Of a move that was part of a drain."""
        if finished.move.drain_of and finished.outcome is not r.Outcome.MIGRATED:
            self._failed.setdefault(finished.move.drain_of, []).append(
                (finished.move.workload, finished.why or finished.outcome.value, finished.ended_at)
            )

    async def step(self, cluster: Cluster) -> bool:
        """Take every drain a step further; whether one is under way. Raises NotHeld, StoreUnavailable."""
        busy = False
        for name, stored in (await self._state.cordons.all()).items():
            cordon = stored.record
            if cordon.drain is None or cordon.drain.record.state is not drain.State.RUNNING:
                continue
            busy = True
            record = cordon.drain.record
            for workload, reason, at in self._failed.pop(name, []):
                record = drain.failed(record, workload, reason, at)
            try:
                made = drain.step(cluster, record)
            except MigratorError as error:
                log.warning("the drain of %s waits: %s", name, error)
                continue
            mode = cordon.mode
            for action in made.actions:
                mode = _mode(action, mode)
            new = msgspec.structs.replace(
                cordon,
                mode=mode,
                drain=msgspec.structs.replace(
                    cordon.drain,
                    record=made.record,
                    progress=made.progress,
                    stays={workload: reason[:4096] for workload, reason in made.stays.items()},
                    updated_at=time.time(),
                ),
            )
            try:
                await self._state.cordons.put(name, new, expected=stored.revision, guard=self._lock)
            except Conflict as error:
                if type(error) is not Conflict:
                    raise
                continue  # somebody has just cancelled or changed it
            if made.record.state is not record.state:
                log.info("the drain of %s: %s", name, made.record.state.value)
            for action in made.actions:
                await self._act(name, action)
        return busy

    async def _act(self, host: str, action: drain.Action) -> None:
        if isinstance(action, drain.Start):
            await self._mover.begin(action.move, drain_of=host, force=action.force)
        elif isinstance(action, drain.Save) and action.workload not in self._saving:
            self._saving[action.workload] = asyncio.create_task(self._save(host, action.workload))

    async def _save(self, host: str, workload: str) -> None:
        try:
            await self._observer.agents[host].ask(Save(workload, self._state.fleet.id, self._lock.token, end=True))
        except (MigratorError, OSError) as error:
            self._failed.setdefault(host, []).append((workload, f"cannot be saved: {error}", time.time()))
        else:
            log.info("%s was saved in the storage of %s, and ended", workload, host)
        finally:
            del self._saving[workload]

    async def close(self) -> None:
        for task in self._saving.values():
            task.cancel()
        await asyncio.gather(*self._saving.values(), return_exceptions=True)


def _mode(action: drain.Action, mode: r.HostMode) -> r.HostMode:
    if isinstance(action, drain.Cordon):
        return r.HostMode.DRAINING
    return r.HostMode.MAINTENANCE if isinstance(action, drain.Release) else mode
