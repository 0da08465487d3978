"""An agent's answers to whoever observes or leads its fleet; see `migrator.protocol.fleet`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec

from migrator.errors import MigratorError
from migrator.fleet.departures import Departures, failed
from migrator.fleet.fencing import DEFAULT_DIRECTORY, Fence
from migrator.fleet.host_report import Capacity, HostSurvey
from migrator.fleet.storage import DEFAULT_STORAGE, Storage
from migrator.host import Login
from migrator.protocol import fleet as f
from migrator.protocol.messages import HostFacts


class FleetService:
    """One for all links of an agent."""

    def __init__(
        self,
        facts: HostFacts,
        login: Login,
        *,
        capacity: Capacity | None = None,
        fences: Path = DEFAULT_DIRECTORY,
        storage: Path = DEFAULT_STORAGE,
        bridge: str = "",
    ) -> None:
        """Raises SignalsError where the load of this host cannot be told."""
        self._survey = HostSurvey(facts, capacity)
        self._fences = fences
        self._storage = Storage(storage, bridge=bridge)
        self.departures = Departures(login, fences)

    async def answers(self, request: f.Request) -> AsyncIterator[f.Answer]:
        """What to answer, one or several messages. Raises MigratorError; nothing was done then."""
        match request:
            case f.Observe():
                yield await self._observe(request)
            case f.Depart():
                try:
                    departure = await self.departures.begin(request)
                except MigratorError as error:
                    yield failed(request.migration, error)
                    return
                async for now in departure.follow():
                    yield now
            case f.WatchDeparture():
                known = self.departures.find(request.migration)
                if known is None:
                    yield f.Departed(request.migration, "unknown")
                    return
                async for now in known.follow():
                    yield now
            case f.Save():
                await self._fenced(request.fleet, request.token)
                yield await self._storage.save(
                    request.workload, end=request.end, keep=request.keep, whole_every=request.whole_every
                )
            case f.Images():
                yield f.ImageList(await asyncio.to_thread(self._storage.images, request.workload))
            case f.Revive():
                await self._fenced(request.fleet, request.token)
                yield f.Revived(request.image, await self._storage.revive(request.image))

    async def _observe(self, request: f.Observe) -> f.Observed:
        seen = 0
        if request.fleet:
            if request.token:
                await self._fenced(request.fleet, request.token)
            seen = await asyncio.to_thread(Fence(request.fleet, self._fences).seen)
        # A measurement traces its tasks for a moment, and so does a migration.
        rate = request.rate if not self.departures.moving() else 0.0
        host, workloads = await self._survey.read(rate=rate)
        rest = [one for one in workloads if one.name > request.after]
        return f.Observed(msgspec.structs.replace(host, fenced=seen), rest[: f.LISTED], len(rest) > f.LISTED)

    async def _fenced(self, fleet: str, token: int) -> None:
        await asyncio.to_thread(Fence(fleet, self._fences).check, token)
