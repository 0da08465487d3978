"""Finding places for several workloads at once: bin packing with constraints, by a fast heuristic.

The largest are placed first, each where it adds least to the sum of squared utilisations; then what was placed makes
way for what was not. If something is still left over, other ways are tried, and what misses least is taken: the
tightest fit, which keeps large holes, and the smallest first. Last, single moves and swaps are made as long as the sum
falls. `exact.place` has the same interface and proves its answer; `tools/bench_fleet.py` prints how far apart the two
are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from .consistency import Trust, inspect, validate
from .ledger import Ledger, Limits, Unit
from .model import Cluster
from .score import Score, Weights
from .targets import Targets

# Fitting hosts compared for a unit.
COMPARED = 16
# Rounds of improvement; each looks at every unit that was placed.
ROUNDS = 4
# Swaps are tried among at most so many units.
SWAPPED = 200
# Hosts that are asked why a unit does not fit.
EXPLAINED = 1000


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where each workload goes, and why some go nowhere.

    `burden`: the sum of squared utilisations that the placed ones add, each host weighted by its capacity in average
    hosts (see `score`); the lower, the more even.
    """

    targets: dict[str, str]
    unplaced: dict[str, str] = {}
    burden: float = 0.0


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    weights: Weights = Weights()
    limits: Limits = Limits()
    trust: Trust = Trust()


SETTINGS = Settings()


def place(cluster: Cluster, names: Iterable[str], settings: Settings = SETTINGS) -> Placement:
    """Places for the named workloads, away from the hosts they are on. Raises `ClusterError` as `validate` does.

    Workloads that share an affinity group with a named one and its host come along.
    """
    units, places = open_places(cluster, names, settings)[1:]
    return places.place(units)


def open_places(cluster: Cluster, names: Iterable[str], settings: Settings) -> tuple[Score, list[Unit], Places]:
    """What there is to place, and where it is entered: for this module and for `exact`."""
    validate(cluster)
    ledger = Ledger(cluster, inspect(cluster, settings.trust), settings.limits)
    wanted = set(names)
    units = [unit for unit in ledger.units if any(workload.name in wanted for workload in unit.workloads)]
    score = Score(ledger, settings.weights)
    return score, units, Places(ledger, score, Targets(ledger, score))


class Places:
    """Places units on the hosts of a ledger, and enters them there."""

    def __init__(
        self,
        ledger: Ledger,
        score: Score,
        targets: Targets,
        allowed: Callable[[Unit, int], bool] = lambda _unit, _host: True,
    ) -> None:
        self._ledger = ledger
        self._score = score
        self._targets = targets
        # Says no to what the ledger does not know of: a downtime budget on a slow link.
        self._allowed = allowed
        self._origin: dict[int, int] = {}

    def place(self, units: list[Unit]) -> Placement:
        """Place what can be placed. A split bundle is none of it."""
        free = self._begin(units)
        # By what a unit is worth for its size: where not all fit, the many small ones before the few large.
        dense = sorted(free, key=lambda unit: (-_worth([unit]) / max(self._size(unit), 1e-12), unit.name))
        best: dict[int, int] = {}
        missed = float("inf")
        for order, tight in ((free, False), (free, True), (dense, False), (dense, True)):
            self._clear(free)
            left = self._make_way(self._pass(order, tight=tight), order)
            if _worth(left) < missed:
                best, missed = {id(unit): unit.host for unit in free}, _worth(left)
            if not left:
                break
        if missed:
            self._clear(free)
            for unit in free:
                if best[id(unit)] != self._origin[id(unit)]:
                    self._put(unit, best[id(unit)])
        self._improve([unit for unit in free if unit.host != self._origin[id(unit)]])
        return self._placement(units, free)

    def enter(self, units: list[Unit], chosen: dict[str, int]) -> Placement:
        """Place units, by their names, on the hosts that somebody else has chosen."""
        free = self._begin(units)
        for unit in free:
            host = chosen.get(unit.name)
            if host is not None and self._ok(unit, host):
                self._put(unit, host)
        return self._placement(units, free)

    def _begin(self, units: list[Unit]) -> list[Unit]:
        """The units that may move, the largest first."""
        free = [unit for unit in units if not (unit.kept or unit.host < 0)]
        self._origin = {id(unit): unit.host for unit in free}
        free.sort(key=lambda unit: (-self._size(unit), unit.name))
        return free

    def _placement(self, units: list[Unit], free: list[Unit]) -> Placement:
        placed = [unit for unit in free if unit.host != self._origin[id(unit)]]
        left = [unit for unit in free if unit.host == self._origin[id(unit)]]
        unplaced = {unit: self._refusal(unit) for unit in units if id(unit) not in self._origin}
        unplaced.update((unit, self.why(unit)) for unit in left)
        hosts = self._ledger.hosts
        return Placement(
            targets={workload.name: hosts[unit.host].name for unit in placed for workload in unit.workloads},
            unplaced={workload.name: reason for unit, reason in unplaced.items() for workload in unit.workloads},
            burden=self._burden(placed),
        )

    def _refusal(self, unit: Unit) -> str:
        return unit.kept or f"{unit.name} is not on the host where its bundle is"

    def _size(self, unit: Unit) -> float:
        return max(self._score.weigh(unit))

    def _ok(self, unit: Unit, host: int) -> bool:
        return host != self._origin[id(unit)] and self._ledger.fits(unit, host) and self._allowed(unit, host)

    def _pass(self, units: list[Unit], *, tight: bool) -> list[Unit]:
        left = []
        for unit in units:
            host = self._tightest(unit) if tight else self._evenest(unit, COMPARED)
            if host is None:
                left.append(unit)
            else:
                self._put(unit, host)
        return left

    def _evenest(self, unit: Unit, enough: int) -> int | None:
        best, found = None, 0
        least = float("inf")
        cpu, memory = self._score.weigh(unit)
        for row in (0 if cpu > memory else 1, 2):
            found = 0
            for host in self._targets.ascending(row):
                if self._ok(unit, host):
                    burden = self._score.burden(unit, host)
                    if burden < least:
                        best, least = host, burden
                    found += 1
                    if found >= enough:
                        break
        return best

    def _tightest(self, unit: Unit) -> int | None:
        return next((host for host in self._targets.descending() if self._ok(unit, host)), None)

    def _put(self, unit: Unit, host: int) -> None:
        origin = unit.host
        self._ledger.move(unit, host)
        self._changed(origin, host)

    def _back(self, unit: Unit) -> int:
        host, origin = unit.host, self._origin[id(unit)]
        self._ledger.take_back(unit, origin)
        self._changed(origin, host)
        return host

    def _changed(self, *hosts: int) -> None:
        for host in hosts:
            self._score.update(host)
            self._targets.update(host)

    def _clear(self, units: list[Unit]) -> None:
        for unit in units:
            if unit.host != self._origin[id(unit)]:
                self._back(unit)

    def _make_way(self, left: list[Unit], units: list[Unit]) -> list[Unit]:
        """Let a unit that was placed go elsewhere where that makes room for one that was not."""
        still = []
        for unit in left:
            if not self._push_in(unit, units):
                still.append(unit)
        return still

    def _push_in(self, unit: Unit, units: list[Unit]) -> bool:
        host = self._evenest(unit, COMPARED)
        if host is not None:
            self._put(unit, host)
            return True
        for other in units[-SWAPPED:]:
            if other is unit or other.host == self._origin[id(other)]:
                continue
            host = self._back(other)
            if self._ok(unit, host):
                self._put(unit, host)
                elsewhere = self._evenest(other, COMPARED)
                if elsewhere is not None:
                    self._put(other, elsewhere)
                    return True
                self._back(unit)
            self._put(other, host)
        return False

    def _improve(self, placed: list[Unit]) -> None:
        for _ in range(ROUNDS):
            if not (self._shift(placed) or self._swap(placed[:SWAPPED])):
                break

    def _shift(self, placed: list[Unit]) -> bool:
        better = False
        for unit in placed:
            host = self._back(unit)
            burden = self._score.burden(unit, host)
            other = self._evenest(unit, COMPARED)
            if other is not None and self._score.burden(unit, other) < burden - 1e-12:
                host, better = other, True
            self._put(unit, host)
        return better

    def _swap(self, placed: list[Unit]) -> bool:
        better = False
        for number, one in enumerate(placed):
            for two in placed[:number]:
                if one.host != two.host and self._try_swap(one, two):
                    better = True
        return better

    def _try_swap(self, one: Unit, two: Unit) -> bool:
        score = self._score
        if score.exchange(one, two) <= 1e-12:
            return False
        here, there = self._back(one), self._back(two)
        if self._ok(one, there) and self._ok(two, here):
            self._put(one, there)
            # Both may fit alone and not in this order: groups that the two share.
            if self._ok(two, here):
                self._put(two, here)
                return True
            self._back(one)
        self._put(one, here)
        self._put(two, there)
        return False

    def _burden(self, placed: list[Unit]) -> float:
        """The sum of squares with all that was placed, less that without."""
        total = 0.0
        hosts = []
        for unit in placed:
            hosts.append(self._back(unit))
            total += self._score.burden(unit, hosts[-1])
        for unit, host in zip(placed, hosts, strict=True):
            self._put(unit, host)
        return total

    def why(self, unit: Unit) -> str:
        """The commonest reason against a host, with the number of hosts it holds for."""
        reasons: dict[str, int] = {}
        example: dict[str, str] = {}
        for host in range(min(len(self._ledger.hosts), EXPLAINED)):
            if host == unit.host:
                continue
            reason = self._ledger.why_not(unit, host)
            if not reason:
                reason = f"a move to {self._ledger.hosts[host].name} is not allowed"
            kind = reason.replace(self._ledger.hosts[host].name, "")
            for number in range(10):
                kind = kind.replace(str(number), "")
            reasons[kind] = reasons.get(kind, 0) + 1
            example.setdefault(kind, reason)
        if not reasons:
            return "there is no other host"
        kind = max(reasons, key=lambda kind: reasons[kind])
        many = f" (and {reasons[kind] - 1} more like it)" if reasons[kind] > 1 else ""
        return f"no host fits {unit.name}: {example[kind]}{many}"


def _worth(units: list[Unit]) -> float:
    """Each counts, and what is worth more counts more."""
    return sum(1.0 + workload.value for unit in units for workload in unit.workloads)
