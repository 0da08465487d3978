"""Placing several workloads at once, with a proof: the same as `placement`, by an integer program.

The sum of squares is convex, so each host's part of it is held from below by tangents: a linear program with 0/1
variables, solved by HiGHS (the optional extra `exact`). Where its answer lies above the tangents, tangents are added
there and it is solved again. What comes out is a placement and a bound that no placement can be below.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec

from migrator.errors import MigratorError

from .ledger import Unit
from .model import Cluster
from .placement import SETTINGS, Placement, Settings, open_places
from .placement import place as heuristic
from .score import Score

if TYPE_CHECKING:
    import highspy

# Tangents that each host's load begins with.
TANGENTS = 8
# Solved again until the answer is so near to the bound.
GAP = 1e-4
ROUNDS = 12
# A workload that is not placed costs more than any burden; one that is worth more, more.
UNPLACED = 100.0
# Shares of a host below this are nothing: the solver drops them anyway.
LEAST = 1e-8
# kSolutionStatusFeasible
FEASIBLE = 2


class ExactError(MigratorError):
    """There is no solver. Nothing was planned and nothing moved."""

    exit_code = 2


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """A placement, and what is proved of it.

    `bound`: no placement of as much has a smaller burden. `gap`: how far the burden may be above the least there is,
    as a share of it. `proved`: whether what is not placed could not be, and the gap is no larger than `GAP`.
    """

    placement: Placement
    bound: float
    gap: float
    proved: bool


def place(cluster: Cluster, names: Iterable[str], settings: Settings = SETTINGS, *, seconds: float = 60.0) -> Proof:
    """As `placement.place`, never worse, in at most about so many seconds. Raises `ExactError` without HiGHS."""
    try:
        import highspy
    except ImportError:
        raise ExactError("the exact solver is not installed", hint="pip install 'migrator[exact]'") from None
    names = set(names)
    quick = heuristic(cluster, names, settings)
    score, units, places = open_places(cluster, names, settings)
    open_units = [unit for unit in units if not unit.kept and unit.host >= 0]
    program = _Program(highspy.Highs(), score, open_units, quick.burden)
    chosen, dual, ended = program.solve(time.monotonic() + seconds)
    placement = min(places.enter(units, chosen), quick, key=lambda one: (program.missed(one), one.burden))
    # the solver answers within a tolerance: none that is above what was found is a bound
    bound = min(max(dual - program.missed(placement), 0.0), placement.burden)
    gap = max(placement.burden - bound, 0.0) / max(placement.burden, 1e-12)
    return Proof(placement=placement, bound=bound, gap=gap, proved=ended and gap <= GAP)


def _worth(unit: Unit) -> float:
    return UNPLACED * sum(1.0 + workload.value for workload in unit.workloads)


class _Program:
    def __init__(self, highs: highspy.Highs, score: Score, units: list[Unit], burden: float) -> None:
        """`burden`: about what the answer will have."""
        self.highs = highs
        self.score = score
        self.ledger = score.ledger
        self.units = units
        highs.silent()
        # What is not placed makes the whole large, so the gap is not taken as a share of it.
        highs.setOptionValue("mip_rel_gap", 0.0)
        highs.setOptionValue("mip_abs_gap", GAP / 10 * min(max(burden, LEAST), 1.0))
        highs.setOptionValue("threads", 1)
        self.chosen: dict[tuple[int, int], Any] = {}
        self.on: dict[int, list[int]] = {}
        self.squares: dict[tuple[int, int], Any] = {}
        self._variables()
        self._limits()
        self._tangents()

    def _variables(self) -> None:
        highs = self.highs
        for number, unit in enumerate(self.units):
            able = [host for host in self.score.members if host != unit.host and self.ledger.fits(unit, host)]
            for host in able:
                self.chosen[number, host] = highs.addBinary()
                self.on.setdefault(host, []).append(number)
            left = highs.addVariable(0.0, 1.0, _worth(unit))
            highs.addConstr(highs.qsum([left, *(self.chosen[number, host] for host in able)]) == 1.0)

    def _amount(self, number: int, part: int) -> float:
        unit = self.units[number]
        return (unit.cpu, unit.memory, unit.network)[part]

    def _added(self, host: int, part: int, times: float = 1.0) -> Any:
        """What comes to a host, as a share of its capacity, multiplied."""
        inverse = times * self.score.inverse[host][part]
        shares = ((number, inverse * self._amount(number, part)) for number in self.on[host])
        return self.highs.qsum([share * self.chosen[number, host] for number, share in shares if share > LEAST])

    def _limits(self) -> None:
        for host, numbers in self.on.items():
            for part in range(3):
                room = self.ledger.most[host][part] - self.ledger.reserved[host][part]
                inverse = self.score.inverse[host][part]
                wanted = sum(self._amount(number, part) for number in numbers)
                if inverse and wanted > room and inverse * wanted > LEAST * len(numbers):
                    self.highs.addConstr(self._added(host, part) <= room * inverse)
            groups: dict[str, list[int]] = {}
            for number in numbers:
                for group in self.units[number].groups:
                    groups.setdefault(group, []).append(number)
            for together in groups.values():
                if len(together) > 1:
                    self.highs.addConstr(self.highs.qsum([self.chosen[number, host] for number in together]) <= 1.0)

    def _tangents(self) -> None:
        """What the squares of a host's utilisation rise by, at least."""
        for host, numbers in self.on.items():
            for part in range(3):
                weight = self.score.scale[part] * self.ledger.capacity[host][part]
                most = self.score.inverse[host][part] * sum(self._amount(number, part) for number in numbers)
                if not weight or most <= LEAST * len(numbers):
                    continue
                self.squares[host, part] = self.highs.addVariable(0.0, float("inf"), weight)
                room = self.ledger.most[host][part] - self.ledger.reserved[host][part]
                most = min(most, room * self.score.inverse[host][part])
                for point in range(TANGENTS + 1):
                    self._tangent(host, part, most * point / TANGENTS)

    def _tangent(self, host: int, part: int, at: float) -> None:
        """(used + added)^2 - used^2 is at least its tangent at `added = at`."""
        used = self.score.utilisation[host][part]
        self.highs.addConstr(
            self.squares[host, part] - self._added(host, part, 2 * (used + at)) >= -at * at,
        )

    def solve(self, until: float) -> tuple[dict[str, int], float, bool]:
        """Hosts by unit, the bound of the whole, and whether the last program was solved to its end."""
        from highspy import HighsModelStatus

        best: dict[str, int] = {}
        bound, ended = 0.0, not self.chosen
        for _ in range(ROUNDS if self.chosen else 0):
            left = until - time.monotonic()
            if left <= 0:
                ended = False
                break
            # The limit counts all runs of this solver together.
            self.highs.setOptionValue("time_limit", self.highs.getRunTime() + left)
            self.highs.run()
            ended = self.highs.getModelStatus() == HighsModelStatus.kOptimal
            info = self.highs.getInfo()
            # More tangents only raise it.
            bound = max(bound, info.mip_dual_bound)
            if info.primal_solution_status != FEASIBLE:
                break
            values = self.highs.allVariableValues()
            taken = {key: values[variable.index] > 0.5 for key, variable in self.chosen.items()}
            best = {self.units[number].name: host for (number, host), yes in taken.items() if yes}
            if not ended or not self._tighten(taken, values):
                break
        return best, bound, ended

    def missed(self, placement: Placement) -> float:
        """The cost of what a placement does not place."""
        return sum(_worth(unit) for unit in self.units if unit.name in placement.unplaced)

    def _tighten(self, taken: dict[tuple[int, int], bool], values: Any) -> bool:
        """Add tangents at the answer; False if it lies on the squares already."""
        real = shown = 0.0
        wanted = []
        for (host, part), variable in self.squares.items():
            inverse = self.score.inverse[host][part]
            numbers = [number for number in self.on[host] if taken[number, host]]
            added = inverse * sum(self._amount(number, part) for number in numbers)
            weight = self.score.scale[part] * self.ledger.capacity[host][part]
            square = added * (2 * self.score.utilisation[host][part] + added)
            real += weight * square
            shown += weight * values[variable.index]
            if square > values[variable.index] + 1e-9:
                wanted.append((host, part, added))
        if real - shown <= GAP / 2 * max(real, 1e-12):
            return False
        for host, part, added in wanted:
            self._tangent(host, part, added)
        return True
