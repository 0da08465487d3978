"""Moves, and plans of them: values that can be read, stored, approved and applied later.

A plan is made for one moment. Before each of its moves, `outdated` says whether the moment has passed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import Enum

import msgspec

from .consistency import TRUST, Trust, inspect
from .cost import Cost
from .ledger import LIMITS, Ledger, Limits
from .model import Cluster


class Cause(Enum):
    """Why a workload moves."""

    BALANCE = "balance"
    RULE = "rule"
    DRAIN = "drain"
    EVACUATE = "evacuate"
    RETURN = "return"


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One workload from one host to another.

    `gain`: by how much the sum of squared deviations falls (see `score`). `bundle`: moves with the same name belong
    together, and only all of them make sense. `wave`: those of one wave may run at the same time, each wave after the
    one before.
    """

    workload: str
    source: str
    target: str
    cause: Cause
    reason: str
    gain: float
    cost: Cost
    bundle: str = ""
    wave: int = 0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How many migrations may run at once: in all, and from or to one host; and how many waves a plan may have."""

    total: int = 8
    per_host: int = 2
    waves: int = 1


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What to do about a cluster as it was. `imbalance` as `score.Score.imbalance` has it, `predicted`: afterwards.

    `notes` has one sentence for each thing that explains the plan: what was set aside, what was not done and why.
    """

    id: str
    made_at: float
    fingerprint: str
    moves: tuple[Move, ...] = ()
    imbalance: float = 0.0
    predicted: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> float:
        return sum(move.cost.bytes for move in self.moves)

    @property
    def downtime(self) -> float:
        """Seconds, summed over the workloads."""
        return sum(move.cost.downtime for move in self.moves)

    def remaining(self, cluster: Cluster) -> tuple[Move, ...]:
        """The moves whose workload is not yet at its target."""
        at = {workload.name: workload.host for workload in cluster.workloads}
        return tuple(move for move in self.moves if at.get(move.workload) != move.target)


def make(
    cluster: Cluster,
    moves: Iterable[Move],
    *,
    imbalance: float = 0.0,
    predicted: float = 0.0,
    notes: Iterable[str] = (),
) -> Plan:
    """A plan for `cluster`; the same one has the same id."""
    moves = tuple(moves)
    mark = fingerprint(cluster)
    digest = hashlib.blake2b(msgspec.msgpack.encode((cluster.time, mark, moves)), digest_size=6)
    return Plan(
        id=digest.hexdigest(),
        made_at=cluster.time,
        fingerprint=mark,
        moves=moves,
        imbalance=imbalance,
        predicted=predicted,
        notes=tuple(notes),
    )


def fingerprint(cluster: Cluster) -> str:
    """A digest of who is where under which rules; loads and times are not part of it."""
    digest = hashlib.blake2b(digest_size=16)
    encode = msgspec.msgpack.Encoder(order="deterministic").encode
    digest.update(
        encode([(host.name, host.state, host.capacity, host.labels, host.cpu_features) for host in cluster.hosts])
    )
    digest.update(
        encode(
            [
                (workload.name, workload.host, workload.pinned, workload.affinity, workload.anti_affinity)
                for workload in cluster.workloads
            ]
        )
    )
    return digest.hexdigest()


def with_started(cluster: Cluster, targets: Mapping[str, str]) -> Cluster:
    """The cluster in which the named workloads are moving to these hosts: for whoever plans next on one observation.

    Workloads that already move, and hosts that are not known, are left as they are.
    """
    known = {host.name for host in cluster.hosts}
    return msgspec.structs.replace(
        cluster,
        workloads=tuple(
            msgspec.structs.replace(workload, moving_to=targets[workload.name])
            if workload.name in targets and workload.moving_to is None and targets[workload.name] in known
            else workload
            for workload in cluster.workloads
        ),
    )


class Waves:
    """Gives each move the first wave in which both its hosts, and the whole, still have a slot."""

    def __init__(self, pace: Pace, cluster: Cluster) -> None:
        self._pace = pace
        self._all = [0] * pace.waves
        self._of: dict[str, list[int]] = {}
        for workload in cluster.workloads:
            if workload.moving_to is not None and pace.waves:
                self._take(workload.host, workload.moving_to, 0)

    def free(self, source: str, target: str) -> int | None:
        """The wave; None if there is none left."""
        of_source, of_target = self._of.get(source), self._of.get(target)
        for wave, count in enumerate(self._all):
            if (
                count < self._pace.total
                and (of_source is None or of_source[wave] < self._pace.per_host)
                and (of_target is None or of_target[wave] < self._pace.per_host)
            ):
                return wave
        return None

    def full(self) -> bool:
        """Whether no move at all has a slot."""
        return min(self._all, default=self._pace.total) >= self._pace.total

    def open(self, host: str) -> bool:
        """Whether a host has a slot in any wave."""
        of_host = self._of.get(host)
        return of_host is None or min(of_host, default=self._pace.per_host) < self._pace.per_host

    def take(self, source: str, target: str) -> int | None:
        """Take the slot that `free` finds."""
        wave = self.free(source, target)
        if wave is not None:
            self._take(source, target, wave)
        return wave

    def take_all(self, pairs: list[tuple[str, str]]) -> list[int] | None:
        """A slot for each, or none for any."""
        if len(pairs) == 1:
            wave = self.take(*pairs[0])
            return None if wave is None else [wave]
        before = list(self._all), {host: list(waves) for host, waves in self._of.items()}
        taken: list[int] = []
        for source, target in pairs:
            wave = self.take(source, target)
            if wave is None:
                if taken:
                    self._all, kept = before
                    for host in {host for pair in pairs for host in pair}:
                        self._of[host] = kept.get(host, [0] * self._pace.waves)
                return None
            taken.append(wave)
        return taken

    def _take(self, source: str, target: str, wave: int) -> None:
        self._all[wave] += 1
        for host in {source, target}:
            self._of.setdefault(host, [0] * self._pace.waves)[wave] += 1


def outdated(
    plan: Plan, cluster: Cluster, *, trust: Trust = TRUST, limits: Limits = LIMITS, max_age: float = 600.0
) -> tuple[str, ...]:
    """Why the rest of a plan must not be applied to the cluster as it is now; empty if it may.

    `cluster` is valid. Moves already done are no reason; a workload that is elsewhere, a target that no longer fits or
    is no longer believed, and a plan older than `max_age` seconds are.
    """
    reasons = []
    age = cluster.time - plan.made_at
    if age > max_age:
        reasons.append(f"plan {plan.id} is {age:.0f} s old, more than {max_age:.0f} s")
    if age < -trust.max_skew:
        reasons.append(f"plan {plan.id} was made {-age:.0f} s in the future")
    ledger = Ledger(cluster, inspect(cluster, trust), limits)
    units = {workload.name: unit for unit in ledger.units for workload in unit.workloads}
    entered = set()
    for move in plan.remaining(cluster):
        unit = units.get(move.workload)
        if unit is None:
            reasons.append(f"workload {move.workload} is gone")
            continue
        workload = next(workload for workload in unit.workloads if workload.name == move.workload)
        if workload.moving_to == move.target:
            continue
        if workload.host != move.source:
            reasons.append(f"workload {move.workload} is on {workload.host}, not on {move.source}")
        elif unit.kept:
            reasons.append(unit.kept)
        elif move.target not in ledger.index:
            reasons.append(f"host {move.target} is not known")
        elif unit.name not in entered:
            target = ledger.index[move.target]
            if len(unit.workloads) > 1:
                unit = ledger.partial(unit, target)
            entered.add(unit.name)
            if reason := ledger.why_not(unit, target):
                reasons.append(f"workload {move.workload} cannot go to {move.target}: {reason}")
            else:
                ledger.move(unit, target)
    return tuple(reasons)
