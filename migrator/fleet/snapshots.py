"""Time travel: checkpoints of containers on a schedule, and restarting one of them.

Each is in the storage of the host where the workload runs, which may be shared: a whole checkpoint, or an increment to
those before it (`migrator.fleet.increments`). The container stands still while it is taken, and runs while an increment
is made of it. What is restarted must run nowhere else: that is looked for on every host, and where a host
does not answer only a person can know (`recover`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass

import msgspec

from migrator.errors import MigratorError, TransportError, UsageError
from migrator.fleet import records as r
from migrator.fleet.mover import Mover
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState
from migrator.fleet.store import Conflict, Lock
from migrator.protocol.fleet import ImageList, ImageReport, Images, Revive, Revived, Save, Saved
from policies.model import Cluster, HostState

log = logging.getLogger("migrator.controller")

_AFTER_ERROR = 30.0  # seconds, or the schedule's own if that is longer


@dataclass(frozen=True)
class Found:
    """An image, and the hosts in whose storage it is."""

    image: ImageReport
    hosts: tuple[str, ...]


class Snapshots:
    """The schedules of a fleet while one lock is held."""

    def __init__(self, state: FleetState, observer: Observer, mover: Mover, lock: Lock) -> None:
        self._state = state
        self._observer = observer
        self._mover = mover
        self._lock = lock
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._wait_until: dict[str, float] = {}

    async def step(self, cluster: Cluster) -> float:
        """Begin what is due; seconds until the next is."""
        now, least = time.time(), float("inf")
        hosts = {one.name: one.host for one in cluster.workloads if one.moving_to is None}
        for name, stored in (await self._state.schedules.all()).items():
            schedule = stored.record
            due = max(schedule.last_at + schedule.every, self._wait_until.get(name, 0.0))
            if due > now:
                least = min(least, due - now)
            elif name in hosts and name not in self._mover.busy and name not in self._under_way:
                self._under_way[name] = asyncio.create_task(self._take(schedule, hosts[name], stored.revision))
        return least

    async def _take(self, schedule: r.SnapshotSchedule, host: str, revision: int) -> None:
        name, error = schedule.workload, ""
        try:
            answer = await self._observer.agents[host].ask(
                Save(
                    name,
                    self._state.fleet.id,
                    self._lock.token,
                    keep=schedule.keep,
                    whole_every=schedule.whole_every,
                )
            )
            if not isinstance(answer, Saved):
                raise TransportError(f"{host} gave another answer than to what it was asked")
            log.info("%s was saved on %s: %s, %d bytes", name, host, answer.image, answer.bytes)
        except (MigratorError, OSError) as failure:
            error = str(failure)[:4096]
            self._wait_until[name] = time.time() + _AFTER_ERROR
            log.warning("%s could not be saved on %s: %s", name, host, failure)
        done = msgspec.structs.replace(
            schedule, host=host, last_error=error, last_at=schedule.last_at if error else time.time()
        )
        try:
            await self._state.schedules.put(name, done, expected=revision, guard=self._lock)
        except Conflict as conflict:  # it was changed meanwhile, or another leads
            log.debug("%s: %s", name, conflict)
        except MigratorError as failure:
            log.warning("%s: %s", name, failure)
        finally:
            del self._under_way[name]

    async def close(self) -> None:
        for task in self._under_way.values():
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)


async def take(
    state: FleetState, observer: Observer, workload: str, lock: Lock, *, keep: int, whole_every: int
) -> tuple[str, Saved]:
    """Save a container now, where it runs; that host, and what was saved. Raises UsageError, TransportError."""
    seen = await observer.look(token=lock.token)
    place = next((one.host for one in seen.cluster.workloads if one.name == workload), None)
    if place is None:
        raise UsageError(f"there is no container {workload!r} in the fleet", hint="`migrator ps --all` lists them")
    answer = await observer.agents[place].ask(
        Save(workload, state.fleet.id, lock.token, keep=keep, whole_every=whole_every)
    )
    if not isinstance(answer, Saved):
        raise TransportError(f"{place} gave another answer than to what it was asked")
    return place, answer


async def images(observer: Observer, workload: str = "") -> list[Found]:
    """The images of all hosts that answer, the newest first. `observer` has looked already."""

    async def of(name: str) -> tuple[str, list[ImageReport]]:
        try:
            answer = await observer.agents[name].ask(Images(workload), within=30.0)
        except (MigratorError, OSError) as error:
            observer.errors.setdefault(name, str(error))
            return name, []
        return name, answer.images if isinstance(answer, ImageList) else []

    known: dict[str, tuple[ImageReport, list[str]]] = {}
    for host, listed in await asyncio.gather(*map(of, observer.agents)):
        for image in listed:
            known.setdefault(image.image, (image, []))[1].append(host)
    found = [Found(image, tuple(sorted(hosts))) for image, hosts in known.values()]
    return sorted(found, key=lambda one: (-one.image.at, one.image.image))


async def revive(
    state: FleetState, observer: Observer, found: Found, host: str, lock: Lock, *, off: frozenset[str] = frozenset()
) -> int:
    """Restart an image on a host; the pid there. `off`: hosts that somebody says to be off.

    Raises UsageError if the workload runs somewhere, or might on a host that does not answer.
    """
    seen = await observer.look(token=lock.token)
    name = found.image.workload
    places = [one.host for one in seen.cluster.workloads if one.name.partition("@")[0] == name and one.host not in off]
    if places:
        raise UsageError(
            f"{name} runs on {', '.join(sorted(set(places)))}", hint="two copies must not run: stop that one first"
        )
    silent = sorted(set(observer.errors) - off)
    if silent:
        raise UsageError(
            f"{', '.join(silent)} do not answer, and {name} may run there",
            hint="make sure that it is off, then: migrator recover HOST --is-off",
        )
    if host not in found.hosts:
        raise UsageError(f"{found.image.image} is not in the storage of {host}", hint=f"it is on {found.hosts}")
    answer = await observer.agents[host].ask(Revive(found.image.image, state.fleet.id, lock.token))
    if not isinstance(answer, Revived):
        raise TransportError(f"{host} gave another answer than to what it was asked")
    return answer.pid


def place(cluster: Cluster, found: Found) -> str:
    """Of the hosts that have the image, the active one with most memory left. Raises UsageError."""
    hosts = [host for host in cluster.hosts if host.name in found.hosts and host.state is HostState.ACTIVE]
    if not hosts:
        raise UsageError(
            f"no active host has {found.image.image} in its storage",
            hint="a shared directory as --storage of the agents is what makes it survive its host",
        )
    return max(hosts, key=lambda host: (host.capacity.memory - host.load.memory, host.name)).name
