"""Looking at a whole fleet at once, and keeping what was seen.

observer = Observer(state, login)
seen = await observer.look()        # policies.model.Cluster, with notes
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

import msgspec

from migrator.errors import MigratorError
from migrator.fleet import records as r
from migrator.fleet.agents import Agent, Observation
from migrator.fleet.cluster import LOST_AFTER, Known, Seen, build
from migrator.fleet.signals import SignalsError
from migrator.fleet.state import FleetState, R, Stored
from migrator.host import Login
from policies.experience import Ended, Experience

_AT_ONCE = 64  # hosts


class Observer:
    """`agents` by host, `observations` the last of each, `errors` of those that did not answer the last time.

    prometheus: the URL of one that scrapes the hosts' node exporters; their load is what it says then, and what the
                agents say only where it says nothing, which is noted
    """

    def __init__(
        self, state: FleetState, login: Login, *, lost_after: float = LOST_AFTER, prometheus: str = ""
    ) -> None:
        self._state = state
        self._login = login
        self._lost_after = lost_after
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._prometheus = prometheus
        self._notes: list[str] = []
        self._rates: dict[str, float] = {}
        self._last_moved: dict[str, float] | None = None
        self._experience = Experience()
        self.agents: dict[str, Agent] = {}
        self.observations: dict[str, Observation] = {}
        self.errors: dict[str, str] = {}
        self.known = Known({})
        self.seen = Seen(build(0.0, self.known, {}).cluster, ())

    async def look(self, *, token: int = 0, rate: float = 0.0) -> Seen:
        """Read the store and ask every agent. One that does not answer is no error: its last word is kept, until it
        counts as lost. Raises StoreUnavailable or StoreCorrupt."""
        await self._read()
        await asyncio.gather(*(self._ask(agent, token, rate) for agent in self.agents.values()))
        if self._prometheus:
            await self._ask_prometheus()
        return self.build()

    def build(self) -> Seen:
        """The cluster as it was seen last, at this moment."""
        seen = build(time.time(), self.known, self.observations, lost_after=self._lost_after)
        self.seen = replace(seen, notes=(*seen.notes, *self._notes))
        return self.seen

    def with_cordons(self, cordons: Mapping[str, r.Cordon]) -> Seen:
        """As it was seen last, if hosts were closed otherwise."""
        known = replace(self.known, cordons=cordons)
        return build(time.time(), known, self.observations, lost_after=self._lost_after)

    async def _read(self) -> None:
        state = self._state
        hosts = records(await state.hosts.all())
        if self._last_moved is None:
            self._last_moved = {}
            for stored in (await state.history.all()).values():
                self.moved(stored.record)
        self.known = Known(
            hosts,
            records(await state.cordons.all()),
            records(await state.moves.all()),
            records(await state.rules.all()),
            self._last_moved,
            self._experience,
        )
        for name in [name for name, agent in self.agents.items() if hosts.get(name) != agent.host]:
            await self.agents.pop(name).close()
            self.observations.pop(name, None)
            self.errors.pop(name, None)
        for name, host in hosts.items():
            if name not in self.agents:
                self.agents[name] = Agent(host, self._login)

    def read_history_again(self) -> None:
        """At the next look: others may have moved workloads since."""
        self._last_moved, self._experience = None, Experience()

    def moved(self, finished: r.FinishedMove) -> None:
        """Remember when a workload was moved, and what that teaches."""
        if self._last_moved is not None and finished.outcome is r.Outcome.MIGRATED:
            move = finished.move
            self._last_moved[move.workload] = finished.ended_at
            self._experience.learn(
                Ended(
                    workload=move.workload,
                    predicted_bytes=move.predicted_bytes,
                    predicted_downtime=move.predicted_downtime,
                    bytes=finished.bytes,
                    downtime=finished.downtime,
                    used=move.factors,
                )
            )

    async def _ask(self, agent: Agent, token: int, rate: float) -> None:
        name = agent.host.name
        async with self._slots:
            try:
                seen = await agent.observe(fleet=self._state.fleet.id, token=token, rate=rate)
            except (MigratorError, OSError) as error:
                self.errors[name] = str(error)
                return
        if seen.host.name != name:
            self.errors[name] = f"the host at {agent.peer} calls itself {seen.host.name}, not {name}"
            return
        self.errors.pop(name, None)
        self.observations[name] = self._with_rates(seen)

    async def _ask_prometheus(self) -> None:
        from migrator.fleet.prometheus import PrometheusSignals

        names = {host.address: name for name, host in self.known.hosts.items()} | {name: name for name in self.agents}
        signals = PrometheusSignals(self._prometheus, names)
        try:
            found = await signals.read()
        except SignalsError as error:
            self._notes = [f"loads are what the agents say: {error.message}"]
            return
        finally:
            await signals.close()
        self._notes = [
            f"the load of {name} is what its agent says: {why}"
            for name, why in found.missing.items()
            if name in self.observations
        ]
        for name, load in found.loads.items():
            if name in self.observations:
                self.observations[name] = with_load(self.observations[name], load)

    def _with_rates(self, seen: Observation) -> Observation:
        """Dirty rates are measured seldom; the last one holds until the next."""
        workloads = []
        for one in seen.workloads:
            if one.dirty_rate is not None:
                self._rates[one.name] = one.dirty_rate
            elif one.name in self._rates:
                one = msgspec.structs.replace(one, dirty_rate=self._rates[one.name])
            workloads.append(one)
        return Observation(seen.host, tuple(workloads), seen.heard_at, seen.heard)

    async def close(self) -> None:
        await asyncio.gather(*(agent.close() for agent in self.agents.values()), return_exceptions=True)


def with_load(seen: Observation, load: r.Load) -> Observation:
    """An observation with a host's load as somebody else has measured it."""
    host = msgspec.structs.replace(
        seen.host,
        cpu_used=load.cpu,
        memory_used=load.memory,
        network_used=load.network,
        cpu_pressure=load.cpu_pressure,
        memory_pressure=load.memory_pressure,
        io_pressure=load.io_pressure,
    )
    return Observation(host, seen.workloads, seen.heard_at, seen.heard)


def records(stored: Mapping[str, Stored[R]]) -> dict[str, R]:
    return {name: one.record for name, one in stored.items()}
