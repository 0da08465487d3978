"""What a move costs: bytes, seconds, downtime and risk, predicted before anything is sent.

A workload's agent may have predicted bytes and downtime itself (it has measured the dirty rate); then its word counts.
Otherwise pre-copy is followed round by round: each round sends what the one before left dirty. Both are multiplied by
what earlier moves teach (`experience`).
"""

from __future__ import annotations

import msgspec

from .experience import NONE, Factors
from .model import Host, Workload

# Bytes per second of a link nobody has described: 1 Gbit/s less its headers.
UNKNOWN_LINK = 117e6
# A busy link still gives a migration this share of itself.
LEAST_SHARE = 0.05
# Seconds of a migration that do not depend on its size: connect, survey, build, commit.
FIXED_SECONDS = 1.0
# Seconds from freeze to thaw that do not depend on what is left to send.
FIXED_DOWNTIME = 0.03
# Rounds of pre-copy before the rest is sent frozen, as go-phaul and p.haul have it.
MAX_ROUNDS = 8
# Pre-copy ends when this many seconds of the link would send the rest.
SMALL_REST = 0.02
# Nothing is free: rounding alone would else be a gain, and nothing would ever settle.
LEAST_PRICE = 1e-9


class Cost(msgspec.Struct, frozen=True):
    """Bytes sent, seconds from start to end, seconds of downtime, and risk (0 to 1) that it fails or disturbs.

    `factors`: how much of bytes and downtime is experience with earlier moves.
    """

    bytes: float
    seconds: float
    downtime: float
    risk: float
    factors: Factors = NONE


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What cost is worth in imbalance: how much the sum of squared deviations must fall to pay for it.

    The sum counts an average host as 1: bringing one host from 30 % above the mean to the mean is worth 0.09.
    """

    move: float = 0.008
    gib: float = 0.004
    downtime_second: float = 0.04
    risk: float = 0.04

    def of(self, cost: Cost) -> float:
        price = self.move + self.gib * cost.bytes / 2**30 + self.downtime_second * cost.downtime + self.risk * cost.risk
        return max(price, LEAST_PRICE)


def bandwidth(source: Host, target: Host, share: float = 1.0) -> float:
    """Bytes per second that one migration between them can count on; `share`: the part of the links it gets."""
    return share * min(_spare(source), _spare(target))


def _spare(host: Host) -> float:
    capacity = host.capacity.network
    return max(capacity - host.load.network, LEAST_SHARE * capacity) if capacity else UNKNOWN_LINK


def predict(workload: Workload, source: Host, target: Host, share: float = 1.0) -> Cost:
    """The cost of moving one workload."""
    rate = bandwidth(source, target, share)
    size, downtime = workload.predicted_bytes, workload.predicted_downtime
    if size is None or downtime is None:
        sent, rest = precopy(workload.used.memory, workload.dirty_rate, rate)
        size = sent if size is None else size
        downtime = FIXED_DOWNTIME + rest / rate if downtime is None else downtime
    factors = workload.factors
    size, downtime = size * factors.bytes, downtime * factors.downtime
    risk = _risk(workload, source, target, rate, downtime)
    return Cost(size, FIXED_SECONDS + size / rate, downtime, risk, factors)


def precopy(memory: float, dirty_rate: float, rate: float) -> tuple[float, float]:
    """Bytes sent in all, and bytes of them sent frozen. Never more dirty than there is memory."""
    sent, rest = 0.0, memory
    for _ in range(MAX_ROUNDS):
        if rest <= SMALL_REST * rate:
            break
        sent += rest
        left = min(dirty_rate * rest / rate, memory)
        if left >= rest:
            return sent + left, left
        rest = left
    return sent + rest, rest


def _risk(workload: Workload, source: Host, target: Host, rate: float, downtime: float) -> float:
    """Each cause alone would spoil the move with its chance; they are taken to be independent."""
    well = 1 - min(workload.dirty_rate / rate, 1.0) * 0.5
    if source.kernel != target.kernel:
        well *= 0.9
    if workload.downtime_budget is not None:
        well *= 1 - min(downtime / workload.downtime_budget, 1.0) * 0.3 if workload.downtime_budget else 0.5
    well *= 1 - 0.5 * max(target.pressure.memory, target.pressure.io)
    return 1 - well
