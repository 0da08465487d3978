"""Which hosts to try first: the emptier ones, found without looking at all of them.

Hosts lie in bins by utilisation: one row of bins by cpu, one by memory, one by both. Reading from the low end gives
the candidates for a unit; a move puts two hosts into other bins. Both cost the same in a fleet of any size.
"""

from __future__ import annotations

from collections.abc import Iterator

from .ledger import Ledger, Unit
from .score import Score

# Bins from utilisation 0 to 2; one is wider than what planning cares about and narrower than what hosts differ by.
BINS = 256
FULL = 2.0


class Targets:
    """Open hosts by utilisation; call `update` after `Score.update`."""

    def __init__(self, ledger: Ledger, score: Score) -> None:
        self._ledger = ledger
        self._score = score
        self._rows: tuple[list[dict[int, None]], ...] = tuple([{} for _ in range(BINS)] for _ in range(3))
        self._where: dict[int, tuple[int, int, int]] = {}
        for host in score.members:
            self._put(host)

    def _put(self, host: int) -> None:
        cpu, memory, _ = self._score.utilisation[host]
        where = (_bin(cpu), _bin(memory), _bin((cpu + memory) / 2))
        for row, number in zip(self._rows, where, strict=True):
            row[number][host] = None
        self._where[host] = where

    def update(self, host: int) -> None:
        where = self._where.get(host)
        if where is None:
            return
        for row, number in zip(self._rows, where, strict=True):
            del row[number][host]
        self._put(host)

    def lowest(self, row: int) -> float:
        """No open host is less utilised than this."""
        return next((number * FULL / BINS for number, bin_ in enumerate(self._rows[row]) if bin_), 0.0)

    def ascending(self, row: int = 2) -> Iterator[int]:
        """All open hosts, the emptiest first; row 0 by cpu, 1 by memory, 2 by both."""
        for bin_ in self._rows[row]:
            yield from bin_

    def descending(self, row: int = 2) -> Iterator[int]:
        """All open hosts, the fullest first."""
        for bin_ in reversed(self._rows[row]):
            yield from bin_

    def candidates(self, unit: Unit, enough: int, most: int) -> Iterator[int]:
        """Up to `enough` hosts that a unit fits on, emptiest first, from each of two rows, having looked at `most`."""
        cpu, memory = self._score.weigh(unit)
        seen: set[int] = set()
        for row in (2, 0 if cpu > memory else 1):
            found = 0
            for looked, host in enumerate(self.ascending(row)):
                if looked >= most or found >= enough:
                    break
                if host != unit.host and self._ledger.fits(unit, host):
                    found += 1
                    if host not in seen:
                        seen.add(host)
                        yield host


def _bin(utilisation: float) -> int:
    return min(max(int(utilisation * (BINS / FULL)), 0), BINS - 1)
