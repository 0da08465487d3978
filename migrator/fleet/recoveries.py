"""Restarting what ran on a lost host, by the controller itself: only after a program has turned that host off.

A silent host is not a dead one. No lease that its agent keeps would do: an agent that was killed ends nothing, and a
machine that was paused goes on where it was. So whoever runs the fleet gives a program that turns a host off (by its
power supply, its hypervisor, its cloud) and says by exit status 0 that it is off. Without such a program nothing is
restarted by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from migrator.errors import MigratorError, UsageError
from migrator.fleet import records as r
from migrator.fleet import snapshots
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import Lock
from policies.model import Cluster, HostState

log = logging.getLogger("migrator.controller")

_AGAIN = 60.0  # seconds after a program that has failed
_SAID = 500  # characters of what it says that are logged


@dataclass(frozen=True)
class Fencing:
    """program: is run with the host's name and address, and turns it off; exit status 0: it is off
    after:   seconds for which a host must have been silent
    within:  seconds that the program may take
    """

    program: Path
    after: float = 60.0
    within: float = 120.0


@dataclass(frozen=True)
class Restarted:
    """What became of a workload of a lost host. `host`: where it runs now, as it was `age` seconds ago; else `why` it
    does not."""

    workload: str
    host: str = ""
    age: float = 0.0
    why: str = ""


async def restart_lost(state: FleetState, observer: Observer, name: str, lock: Lock) -> list[Restarted]:
    """Restart elsewhere what is to be restarted of a host that is off. It gets no workloads until somebody says so.

    Whoever calls has made sure that the host is off. Raises NotHeld, StoreUnavailable.
    """
    stored = await state.cordons.get(name)
    closed = r.Cordon(host=name, mode=r.HostMode.MAINTENANCE, since=time.time(), reason="it was lost, and recovered")
    await state.cordons.put(name, closed, expected=stored.revision if stored is not None else 0, guard=lock)
    moves = await state.moves.all()
    done = []
    for schedule in await wanted(state, name):
        try:
            if schedule.workload in moves:
                raise UsageError("a move of it is not over, so it may run elsewhere")
            found = await snapshots.images(observer, schedule.workload)
            if not found:
                raise UsageError("nothing of it is in the storage of a host that answers")
            host = snapshots.place(observer.build().cluster, found[0])
            await snapshots.revive(state, observer, found[0], host, lock, off=frozenset({name}))
        except MigratorError as error:
            done.append(Restarted(schedule.workload, why=error.message))
        else:
            done.append(Restarted(schedule.workload, host, max(time.time() - found[0].image.at, 0.0)))
    return done


async def wanted(state: FleetState, host: str) -> list[r.SnapshotSchedule]:
    """The schedules of what was last saved on that host and is to be restarted if it is lost."""
    schedules = [one.record for one in (await state.schedules.all()).values()]
    return [one for one in schedules if one.restart_when_lost and one.host == host]


class Recoveries:
    """Those of a fleet while one lock is held."""

    def __init__(self, state: FleetState, observer: Observer, lock: Lock, fencing: Fencing) -> None:
        self._state = state
        self._observer = observer
        self._lock = lock
        self._fencing = fencing
        self._began = time.monotonic()
        self._wait_until: dict[str, float] = {}
        self._under_way: dict[str, asyncio.Task[None]] = {}

    async def step(self, cluster: Cluster) -> float:
        """Begin what is due; seconds until something may be."""
        lost = [host.name for host in cluster.hosts if host.state is HostState.LOST]
        now = time.monotonic()
        least = float("inf")
        running = {one.name.partition("@")[0] for one in cluster.workloads if one.host not in lost}
        for name in lost:
            seen = self._observer.observations.get(name)
            silent = now - max(seen.heard if seen is not None else self._began, self._began)
            due = max(self._fencing.after - silent, self._wait_until.get(name, 0.0) - now)
            if name in self._under_way:
                continue
            if due > 0:
                least = min(least, due)
                continue
            left = [one.workload for one in await wanted(self._state, name) if one.workload not in running]
            if not left:
                continue
            if 2 * len(lost) >= len(cluster.hosts):
                log.warning("%s is not turned off: half of the fleet is silent, so it may be us", name)
                self._wait_until[name] = now + _AGAIN
                continue
            self._under_way[name] = asyncio.create_task(self._recover(name, silent), name=f"recovery of {name}")
        return least

    async def _recover(self, name: str, silent: float) -> None:
        try:
            log.warning("%s has been silent for %.0f s: %s turns it off", name, silent, self._fencing.program)
            await self._turn_off(name)
            log.warning("%s is off, as %s says", name, self._fencing.program)
            for one in await restart_lost(self._state, self._observer, name, self._lock):
                if one.host:
                    log.warning("%s runs on %s, as it was %.0f s ago", one.workload, one.host, one.age)
                else:
                    log.warning("%s was not restarted: %s", one.workload, one.why)
        except (MigratorError, OSError) as error:
            log.warning("%s is not recovered: %s", name, error)
        finally:
            self._wait_until[name] = time.monotonic() + _AGAIN
            del self._under_way[name]

    async def _turn_off(self, name: str) -> None:
        """Raises UsageError, OSError if it is not known to be off."""
        host = self._observer.known.hosts[name]
        process = await asyncio.create_subprocess_exec(
            self._fencing.program,
            name,
            host.address,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            async with asyncio.timeout(self._fencing.within):
                said, _ = await process.communicate()
        except TimeoutError:
            raise UsageError(f"{self._fencing.program} has not ended within {self._fencing.within:g} s") from None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if process.returncode:
            text = said.decode(errors="replace").strip()[-_SAID:]
            raise UsageError(f"{self._fencing.program} {name} exited with {process.returncode}: {text}")

    async def close(self) -> None:
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
