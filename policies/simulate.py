"""A day replayed under a rule: what would have come of it.

The world here is less kind than a plan: migrations take their time, in slots; they fail; they cost other than was
predicted; hosts vanish and come back. All chance comes from one seed, so a run is the same on every machine.
Imbalance is measured on what workloads want, not on what a rule is told, and the same for every rule.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from math import exp, sqrt
from random import Random
from typing import Protocol

import msgspec

from .cost import Cost
from .day import Day
from .model import Cluster, Host, HostState, Pressure, Resources
from .plan import Move, Pace


class Rule(Protocol):
    """Something that moves workloads: asked at each sample, with the cluster as it is seen."""

    @property
    def name(self) -> str: ...
    def plan(self, cluster: Cluster) -> Sequence[Move]: ...


class World(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong. `error`: how far bytes, seconds and downtime typically are from what was predicted (a share).

    `failing`: the share of migrations that fail half way. `vanishing`: the share of hosts that vanish in a day;
    each is back after `repair` seconds. `pace`: the slots for migrations, for any rule.
    """

    seed: int = 1
    error: float = 0.2
    failing: float = 0.01
    vanishing: float = 0.0
    repair: float = 3600.0
    pace: Pace = Pace()


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a day.

    `imbalance` has one entry for each sample. `starved`: core-seconds that were wanted and not had, in all.
    `downtime`: seconds, of all migrations. `returns`: moves to a host that the workload had left before.
    `predicted_bytes` and `predicted_downtime`: of the moves that came about. `refused`: moves that found no room, or
    whose host was gone. `most`, `most_of_host`: migrations at once.
    """

    rule: str
    imbalance: tuple[float, ...]
    starved: float
    moves: int
    failed: int
    refused: int
    returns: int
    bytes: float
    downtime: float
    longest: float
    predicted_bytes: float
    predicted_downtime: float
    most: int
    most_of_host: int

    @property
    def mean(self) -> float:
        """The imbalance, over the day."""
        return sum(self.imbalance) / max(len(self.imbalance), 1)


class _Migration(msgspec.Struct):
    end: float
    workload: int
    target: int
    cost: Cost
    predicted: Cost
    fails: bool


WORLD = World()


def simulate(day: Day, rule: Rule, world: World = WORLD) -> Run:
    """Replay a day. The rule is used up: a rule that remembers is for one run."""
    return _Replay(day, rule, world).run()


class _Replay:
    def __init__(self, day: Day, rule: Rule, world: World) -> None:
        self.day = day
        self.rule = rule
        self.world = world
        self.chance = Random(f"world {world.seed}")
        self.index = {host.name: number for number, host in enumerate(day.hosts)}
        self.number = {workload.name: number for number, workload in enumerate(day.workloads)}
        self.at = [self.index[workload.host] for workload in day.workloads]
        self.workloads = list(day.workloads)
        self.under_way: dict[int, _Migration] = {}
        self.back_at: dict[int, float] = {}
        self.slots = [[0.0] * world.pace.per_host for _ in day.hosts]
        self.left: set[tuple[int, int]] = set()
        self.imbalance: list[float] = []
        self.starved = self.bytes = self.downtime = self.longest = 0.0
        self.predicted_bytes = self.predicted_downtime = 0.0
        self.moves = self.failed = self.refused = self.returns = 0
        self.spans: list[tuple[float, int, int, int]] = []

    def run(self) -> Run:
        now = self.day.began_at
        for sample in self.day.samples():
            self._finish(now)
            self._vanish(now)
            cpu = [host.other.cpu for host in self.day.hosts]
            memory = [host.other.memory for host in self.day.hosts]
            for number, at in enumerate(self.at):
                cpu[at] += sample.cpu[number]
                memory[at] += sample.memory[number]
            self._measure(cpu, memory)
            cluster = self._seen(now, sample.cpu, sample.memory, cpu, memory)
            self._begin(now, cluster, self.rule.plan(cluster), memory)
            now += self.day.interval
        self._finish(float("inf"))
        most, most_of_host = self._busiest()
        return Run(
            rule=self.rule.name,
            imbalance=tuple(self.imbalance),
            starved=self.starved,
            moves=self.moves,
            failed=self.failed,
            refused=self.refused,
            returns=self.returns,
            bytes=self.bytes,
            downtime=self.downtime,
            longest=self.longest,
            predicted_bytes=self.predicted_bytes,
            predicted_downtime=self.predicted_downtime,
            most=most,
            most_of_host=most_of_host,
        )

    def _finish(self, now: float) -> None:
        for migration in sorted(self.under_way.values(), key=lambda one: (one.end, one.workload)):
            if migration.end > now:
                break
            self._end(migration, migration.fails)

    def _end(self, migration: _Migration, fails: bool) -> None:
        number, target = migration.workload, migration.target
        del self.under_way[number]
        source = self.at[number]
        # A failure half way has sent half.
        self.bytes += migration.cost.bytes * (0.5 if fails else 1.0)
        moving: dict[str, object] = {"moving_to": None}
        if fails:
            self.failed += 1
        else:
            self.moves += 1
            self.downtime += migration.cost.downtime
            self.predicted_bytes += migration.predicted.bytes
            self.predicted_downtime += migration.predicted.downtime
            self.longest = max(self.longest, migration.cost.downtime)
            self.returns += (number, target) in self.left
            self.left.add((number, source))
            self.at[number] = target
            moving["host"] = self.day.hosts[target].name
        self.workloads[number] = msgspec.structs.replace(self.workloads[number], last_moved=migration.end, **moving)

    def _vanish(self, now: float) -> None:
        for host, back in list(self.back_at.items()):
            if back <= now:
                del self.back_at[host]
        share = self.world.vanishing * self.day.interval / 86400
        if not share:
            return
        for host in range(len(self.day.hosts)):
            if host not in self.back_at and self.chance.random() < share:
                self.back_at[host] = now + self.world.repair
                for migration in list(self.under_way.values()):
                    if host in (self.at[migration.workload], migration.target):
                        self._end(migration, True)

    def _measure(self, cpu: list[float], memory: list[float]) -> None:
        """As `score.Score.imbalance` has it, of cpu and memory alike, over the hosts that are there."""
        there = [
            (cpu[number], memory[number], host.capacity)
            for number, host in enumerate(self.day.hosts)
            if number not in self.back_at
        ]
        all_cpu = sum(capacity.cpu for _, _, capacity in there) or 1.0
        all_memory = sum(capacity.memory for _, _, capacity in there) or 1.0
        mean = sum(used for used, _, _ in there) / all_cpu, sum(used for _, used, _ in there) / all_memory
        squares = 0.0
        for used, size, capacity in there:
            squares += capacity.cpu / all_cpu * (used / capacity.cpu - mean[0]) ** 2
            squares += capacity.memory / all_memory * (size / capacity.memory - mean[1]) ** 2
            self.starved += max(used - capacity.cpu, 0.0) * self.day.interval
        self.imbalance.append(sqrt(squares / 2))

    def _seen(
        self, now: float, want_cpu: Sequence[float], want_memory: Sequence[float], cpu: list[float], memory: list[float]
    ) -> Cluster:
        """What agents would report: nobody is seen to use more than there is; the rest shows as pressure."""
        had, hosts = [], []
        for number, host in enumerate(self.day.hosts):
            capacity = host.capacity
            share = min(1.0, capacity.cpu / cpu[number]) if cpu[number] else 1.0
            had.append((share, min(1.0, capacity.memory / memory[number]) if memory[number] else 1.0))
            hosts.append(
                Host(
                    name=host.name,
                    capacity=capacity,
                    load=Resources(cpu[number] * share, memory[number] * had[-1][1], host.load.network),
                    other=Resources(host.other.cpu * share, host.other.memory * had[-1][1], host.other.network),
                    pressure=Pressure(1 - share, 1 - had[-1][1], 0.0),
                    labels=host.labels,
                    cpu_features=host.cpu_features,
                    kernel=host.kernel,
                    engines=host.engines,
                    state=HostState.LOST if number in self.back_at else host.state,
                    observed_at=now,
                )
            )
        replace = msgspec.structs.replace
        workloads = tuple(
            replace(
                workload,
                used=Resources(
                    want_cpu[number] * had[self.at[number]][0],
                    want_memory[number] * had[self.at[number]][1],
                    workload.used.network,
                ),
            )
            for number, workload in enumerate(self.workloads)
        )
        return Cluster(time=now, hosts=tuple(hosts), workloads=workloads)

    def _begin(self, now: float, cluster: Cluster, moves: Sequence[Move], memory: list[float]) -> None:
        """Give each move a slot; what finds none before the next sample is dropped: the rule is asked again then."""
        world = self.world
        of_all = [migration.end for migration in self.under_way.values()]
        of_all = heapq.nlargest(world.pace.total, of_all + [now] * world.pace.total)
        heapq.heapify(of_all)
        for migration in self.under_way.values():
            memory[migration.target] += cluster.workloads[migration.workload].used.memory
        for move in moves:
            number, target = self.number[move.workload], self.index[move.target]
            source = self.at[number]
            if number in self.under_way or source == target or {source, target} & self.back_at.keys():
                self.refused += 1
                continue
            begin = max(now, of_all[0], min(self.slots[source]), min(self.slots[target]))
            if begin >= now + self.day.interval:
                continue
            size = cluster.workloads[number].used.memory
            if memory[target] + size > self.day.hosts[target].capacity.memory:
                self.refused += 1
                continue
            memory[target] += size
            cost = self._really(move.cost)
            fails = self.chance.random() < world.failing
            end = begin + cost.seconds * (0.5 if fails else 1.0)
            heapq.heapreplace(of_all, end)
            for host in (source, target):
                heapq.heapreplace(self.slots[host], end)
            self.spans.append((begin, 1, source, target))
            self.spans.append((end, -1, source, target))
            self.under_way[number] = _Migration(end, number, target, cost, move.cost, fails)
            self.workloads[number] = msgspec.structs.replace(self.workloads[number], moving_to=move.target)

    def _really(self, cost: Cost) -> Cost:
        """What it comes to: right on average, off by the world's error."""
        sigma = self.world.error
        size, downtime = (exp(self.chance.gauss(-sigma * sigma / 2, sigma)) if sigma else 1.0 for _ in range(2))
        return Cost(cost.bytes * size, cost.seconds * size, cost.downtime * downtime, cost.risk)

    def _busiest(self) -> tuple[int, int]:
        """The most migrations there were at once: in all, and of one host."""
        count, most, most_of_host = 0, 0, 0
        of_host = [0] * len(self.day.hosts)
        for _, change, source, target in sorted(self.spans):
            count += change
            most = max(most, count)
            for host in (source, target):
                of_host[host] += change
                most_of_host = max(most_of_host, of_host[host])
        return most, most_of_host
