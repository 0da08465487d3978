"""What moves that have ended teach about those to come: by how much more, or less, they sent and stopped for than was
predicted.

A workload's pages may be zero or easily compressed, its network may take long to be switched: no model of memory and
links knows, and its last moves do. A workload that was never moved is taken to be like the fleet's others.
"""

from __future__ import annotations

from math import exp, log

import msgspec

# Bounds of a factor: beyond these something else is wrong.
BYTES = (1e-3, 10.0)
DOWNTIME = (0.1, 20.0)
# How much of a better outcome is believed at once: of this workload's, of the fleet's. A worse one of its own is
# believed wholly, as what was planned with it was too bold.
OWN, SHARED = 0.5, 0.1


class Factors(msgspec.Struct, frozen=True):
    """What predictions of bytes and of downtime are to be multiplied by."""

    bytes: float = 1.0
    downtime: float = 1.0


NONE = Factors()


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A move that came about: predicted with the factors `used`, and achieved."""

    workload: str
    predicted_bytes: float
    predicted_downtime: float
    bytes: float
    downtime: float
    used: Factors = NONE


class Experience:
    """Learned from one move after the other, in the order in which they ended."""

    def __init__(self) -> None:
        self._own: dict[str, Factors] = {}
        self._shared = NONE

    def factors(self, workload: str) -> Factors:
        return self._own.get(workload, self._shared)

    def learn(self, ended: Ended) -> None:
        """What was not measured, or not predicted, teaches nothing."""
        known = self._own.get(ended.workload)
        seen = Factors(
            _seen(ended.bytes, ended.predicted_bytes, ended.used.bytes, BYTES),
            _seen(ended.downtime, ended.predicted_downtime, ended.used.downtime, DOWNTIME),
        )
        self._own[ended.workload] = Factors(
            _own(known.bytes if known is not None else 0.0, seen.bytes, self._shared.bytes),
            _own(known.downtime if known is not None else 0.0, seen.downtime, self._shared.downtime),
        )
        self._shared = Factors(
            _towards(self._shared.bytes, seen.bytes, SHARED), _towards(self._shared.downtime, seen.downtime, SHARED)
        )


def _seen(achieved: float, predicted: float, used: float, bounds: tuple[float, float]) -> float:
    """The factor with which the prediction would have been right; 0 if nobody can tell."""
    if not (achieved > 0 and predicted > 0 and used > 0):
        return 0.0
    return min(max(used * achieved / predicted, bounds[0]), bounds[1])


def _own(known: float, seen: float, shared: float) -> float:
    if not seen:
        return known or shared
    return seen if seen >= known else _towards(known, seen, OWN)


def _towards(known: float, seen: float, share: float) -> float:
    """Part of the way, as factors go."""
    return exp((1 - share) * log(known) + share * log(seen)) if seen else known
