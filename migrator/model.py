"""What a migration tells while it runs and when it is over; all of it goes to JSON by msgspec.

Progress displays, logs and metrics are observers: they get `Event`s through `on_event` and nothing else.
Times are ns of the source's CLOCK_MONOTONIC wherever nothing else is said, also those of things that
happened on the destination: `ClockOffset` puts both hosts on one clock.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from enum import Enum

import msgspec

from migrator.engine.base import Phase as Phase
from migrator.engine.base import Round as Round
from migrator.engine.base import Where as Where

log = logging.getLogger("migrator.session")


class ClockOffset:
    """How far the destination's clock is ahead of ours, from questions and answers, as NTP does (RFC 5905):
    the answer was given some time between question and reply, so the quickest exchange tells most."""

    def __init__(self) -> None:
        self.offset = 0  # ns to subtract from a time of the destination
        self.error = 0  # ns by which it may be wrong: half the round trip; 0 before the first sample

    def sample(self, asked: int, answered: int, heard: int) -> None:
        """`answered` is of the destination's clock."""
        error = max(heard - asked, 1) // 2 + 1
        if not self.error or error < self.error:
            self.error = error
            self.offset = answered - (asked + heard) // 2

    def to_here(self, there: int) -> int:
        return there - self.offset


class Timeline(msgspec.Struct, frozen=True):
    """Phases of both hosts on one clock, and the downtime: from the freeze to the copy's first instruction.

    uncertainty:  ns by which phases of the destination may be shifted
    """

    phases: list[Phase]
    frozen_at: int = 0
    resumed_at: int = 0
    uncertainty: int = 0

    @property
    def downtime(self) -> float:
        """Seconds; 0.0 if the workload was never stopped."""
        return max(self.resumed_at - self.frozen_at, 0) / 1e9

    def downtime_parts(self) -> list[Phase]:
        """The downtime cut into what happened in it: parts that follow each other without gap or overlap.

        Where phases overlap, the one that began last is named: it is the most precise. Where there is none,
        the time went by between the hosts.
        """
        if self.resumed_at <= self.frozen_at:
            return []
        start, end = self.frozen_at, self.resumed_at
        inside = [phase for phase in self.phases if phase.start < end and phase.end > start]
        edges = {start, end, *(t for phase in inside for t in (phase.start, phase.end) if start < t < end)}
        parts: list[Phase] = []
        for left, right in itertools.pairwise(sorted(edges)):
            active = [phase for phase in inside if phase.start <= left and phase.end >= right]
            name, where = "wait", Where.BETWEEN
            if active:
                best = max(active, key=lambda phase: (phase.start, -phase.end))
                name, where = best.name, best.where
            if parts and (parts[-1].name, parts[-1].where) == (name, where):
                left = parts.pop().start
            parts.append(Phase(name, left, right, where=where))
        return parts


def phases_here(phases: Iterable[Phase], where: Where, offset: ClockOffset | None = None) -> list[Phase]:
    """Phases of one host, on the source's clock."""
    shift = offset.offset if offset is not None else 0
    return [replace(p, start=p.start - shift, end=p.end - shift, where=where) for p in phases]


class Outcome(Enum):
    MIGRATED = "migrated"
    DRY_RUN = "dry-run"
    REFUSED = "refused"
    ABORTED = "aborted"
    UNDECIDED = "undecided"


class MigrationResult(msgspec.Struct, frozen=True, kw_only=True):
    """One migration, as `--json` prints it. Times in seconds, sizes in bytes."""

    migration: str
    outcome: Outcome
    fate: str  # of errors.Fate: where the workload is now
    reason: str = ""
    source: str = ""
    destination: str = ""
    container: str = ""
    pids: list[int] = []  # on the source
    pid: int = 0  # of the root task on the destination
    downtime: float = 0.0
    predicted_downtime: float = 0.0
    prediction_error: float = 0.0  # downtime less predicted_downtime, where both are known
    first_packet: float = 0.0  # from the freeze to the first packet of its programs; 0.0 if none was seen
    total: float = 0.0
    stream_bytes: int = 0  # before compression
    wire_bytes: int = 0
    compression_ratio: float = 1.0
    throughput: float = 0.0  # bytes/s of stream
    rtt: float = 0.0
    decision: str = ""  # why it was frozen when it was
    engine: str = ""  # which did it here
    engine_reason: str = ""  # why that one
    rounds: list[Round] = []
    timeline: Timeline | None = None
    connections_served: int = 0  # closed before the move, and served from the source to their end
    warnings: list[str] = []


class Started(msgspec.Struct, frozen=True, tag=True):
    migration: str
    peer: str
    at: int


class PhaseStarted(msgspec.Struct, frozen=True, tag=True):
    migration: str
    name: str
    at: int


class PhaseEnded(msgspec.Struct, frozen=True, tag=True):
    migration: str
    phase: Phase


class RoundDone(msgspec.Struct, frozen=True, tag=True):
    """A pre-copy round, what is predicted after it (seconds), and what will be done next."""

    migration: str
    round: Round
    predicted_downtime: float
    throughput: float
    verdict: str
    reason: str


class Transferred(msgspec.Struct, frozen=True, tag=True):
    """How much of the phase under way is done so far; as often as the engine says so."""

    migration: str
    phase: str
    bytes: int
    pages: int


class Noted(msgspec.Struct, frozen=True, tag=True):
    """Something that preflight found and that a person may want to know before it is done."""

    migration: str
    text: str


class Waiting(msgspec.Struct, frozen=True, tag=True):
    """Something takes longer than it should, and a person may want to know why."""

    migration: str
    reason: str


class Settled(msgspec.Struct, frozen=True, tag=True):
    """What became of an earlier migration that was left unfinished; settled before this one begins."""

    migration: str
    detail: str
    fate: str  # of errors.Fate


class Ended(msgspec.Struct, frozen=True, tag=True):
    migration: str
    where: Where  # whose result this is
    result: MigrationResult


Event = Started | PhaseStarted | PhaseEnded | RoundDone | Transferred | Noted | Waiting | Settled | Ended
OnEvent = Callable[[Event], None]


def nobody(event: Event) -> None:
    """The observer that does not listen."""


def harmless(on_event: OnEvent) -> OnEvent:
    """An observer that tells `on_event` and survives it: what that raises is logged and changes nothing."""

    def tell(event: Event) -> None:
        try:
            on_event(event)
        except Exception:
            log.exception("an observer failed at %s", type(event).__name__)

    return on_event if on_event is nobody else tell


def to_json(value: MigrationResult | Event) -> bytes:
    return msgspec.json.encode(value)
