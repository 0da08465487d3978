"""What an agent says about its host and the containers on it.

    survey = HostSurvey(facts)
    host, workloads = await survey.read()

What is there is of after the question. Loads are means of half a second or more until then; where the last question
is long ago, of a second from now.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import msgspec

from migrator.api import containers
from migrator.api.usage import Usage, usage
from migrator.errors import UsageError
from migrator.fleet.records import Load
from migrator.fleet.signals import HostSignals
from migrator.protocol.fleet import HostReport, WorkloadReport
from migrator.protocol.messages import HostFacts

_SHORTEST = 0.5  # seconds: a window below that says little
_WINDOW = 1.0  # seconds over which loads are measured where there is no better window
_LONGEST = 30.0  # seconds: a window beyond that says nothing about now


@dataclass(frozen=True, slots=True)
class Capacity:
    """What of the host is for workloads; then only what they use is its load. Cores, bytes."""

    cpus: float
    memory: int

    @classmethod
    def parse(cls, cpus: float, memory: float) -> Capacity:
        """Raises UsageError for what can hold nothing."""
        if not 1e-3 < cpus <= 1e6 or not 1 <= memory <= 1 << 58:
            raise UsageError(f"{cpus:g} processors and {memory:g} bytes are no capacity for workloads")
        return cls(cpus, int(memory))


class HostSurvey:
    """This host, from now on. Not for several event loops."""

    def __init__(self, facts: HostFacts, capacity: Capacity | None = None) -> None:
        """Raises SignalsError where /proc cannot be understood."""
        self._facts = facts
        self._capacity = capacity
        self._signals = HostSignals()
        self._lock = asyncio.Lock()
        self._load = Load()
        self._used: dict[str, Usage] = {}
        self._rates: dict[str, tuple[float, float]] = {}  # cores, bytes per second
        self._at = float("-inf")  # when the window of the next loads begins

    async def read(self, *, rate: float = 0.0) -> tuple[HostReport, list[WorkloadReport]]:
        """The host and its containers by name. `rate` as for `containers.list`."""
        async with self._lock:
            if time.monotonic() - self._at > _LONGEST:
                self._at, self._used = time.monotonic(), await asyncio.to_thread(usage)
                await asyncio.to_thread(self._signals.read)
                await asyncio.sleep(_WINDOW)
            if time.monotonic() - self._at >= _SHORTEST:
                await self._measure()
            return self._report(await containers.list(rate=rate))

    async def _measure(self) -> None:
        began, before = self._at, self._used
        self._load = await asyncio.to_thread(self._signals.read)
        self._at, self._used = time.monotonic(), await asyncio.to_thread(usage)
        seconds = self._at - began
        self._rates = {
            name: (
                max(now.cpu_seconds - before[name].cpu_seconds, 0.0) / seconds,
                max(now.network_bytes - before[name].network_bytes, 0) / seconds,
            )
            for name, now in self._used.items()
            if name in before
        }

    def _report(self, rows: list[containers.Row]) -> tuple[HostReport, list[WorkloadReport]]:
        load = self._load
        living = [row for row in rows if row.state != "exited"]
        workloads = [self._workload(row) for row in sorted(living, key=lambda row: row.name)]
        cpus, memory = float(self._signals.cpus), self._signals.memory().total
        if self._capacity is not None:
            cpus, memory = self._capacity.cpus, self._capacity.memory
            load = msgspec.structs.replace(
                load,
                cpu=sum(one.cpu for one in workloads),
                memory=sum(one.memory for one in workloads),
                network=sum(one.network for one in workloads),
            )
        report = HostReport(
            name=self._facts.host,
            boot_id=self._facts.boot_id,
            at=time.time(),
            kernel=self._facts.kernel,
            engine=self._facts.engine,
            cpu_features=self._facts.cpu_features,
            cpus=cpus,
            memory=memory,
            cpu_used=load.cpu,
            memory_used=load.memory,
            network_used=load.network,
            cpu_pressure=load.cpu_pressure,
            memory_pressure=load.memory_pressure,
            io_pressure=load.io_pressure,
        )
        return report, workloads

    def _workload(self, row: containers.Row) -> WorkloadReport:
        cpu, network = self._rates.get(row.name, (0.0, 0.0))
        return WorkloadReport(
            name=row.name,
            state=row.state,
            tasks=row.pids,
            cpu=cpu,
            memory=row.memory,
            network=network,
            age=row.age,
            dirty_rate=row.dirty_bytes_per_second,
            addresses=list(row.addresses[:64]),
        )
