"""What was asked of a source, and what it has to say when it is over."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from migrator import model
from migrator.errors import Fate, Refused, Undecided
from migrator.model import Outcome, Phase, Where
from migrator.protocol import messages as m
from migrator.protocol.trees import SyncTree
from migrator.recovery.journal import journal_directory
from migrator.session import convergence, preflight
from migrator.session.interfaces import Link
from migrator.session.workload import WorkloadThread


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """What was asked for.

    migration:     its id, new
    peer:          how to reach the destination again, as given on the command line
    max_downtime:  seconds; None for the best that can be had
    timeout:       seconds until it must have been decided to freeze
    freeze_limit:  seconds that the workload may stay frozen before it is given up, until COMMIT
    ask_for:       seconds to try to reach the destination after COMMIT before an operator is told
    bandwidth:     bytes/s of pre-copy, 0.0 for no cap; lifted for the last round
    cold:          no pre-copy: freeze at once, as every tool without it must
    copy_files:    carry open and mapped files along that differ there
    trees:         what is carried along as a whole, with `copy_files`
    fleet, token:  of the controller that wants it, for the destination to check
    """

    migration: str
    peer: str
    container: str = ""
    container_spec: str = ""
    max_downtime: float | None = None
    timeout: float = 600.0
    freeze_limit: float = 30.0
    ask_for: float = 60.0
    bandwidth: float = 0.0
    dry_run: bool = False
    cold: bool = False
    copy_files: bool = False
    trees: tuple[SyncTree, ...] = ()
    fleet: str = ""
    token: int = 0
    journal: Path = field(default_factory=journal_directory)


@dataclass(frozen=True, kw_only=True)
class MigrationSummary:
    """Everything that a result is made of."""

    settings: SourceSettings
    host: m.HostFacts
    report: preflight.PreflightReport | None
    copying: WorkloadThread
    link: Link
    began: int  # ns of CLOCK_MONOTONIC
    phases: list[Phase]
    clock: model.ClockOffset
    running: m.Running | None
    told: m.DestinationReport | None
    decision: convergence.Decision | None
    pids: list[int]

    @property
    def stream_bytes(self) -> int:
        """Before compression; what the engine's rounds say where this link is a new one."""
        return self.link.counters.stream_sent or sum(r.bytes for r in self.copying.all_rounds)

    @property
    def wire_bytes(self) -> int:
        return self.link.counters.wire_sent

    @property
    def compression_ratio(self) -> float:
        return self.link.compression_ratio

    def timeline(self) -> model.Timeline:
        """Phases of both hosts on our clock."""
        phases = self.phases + model.phases_here(self.copying.phases, Where.SOURCE)
        if self.copying.source is not None:
            # Rounds are in it already, with the time it took to send them.
            phases += [
                phase
                for phase in model.phases_here(self.copying.source.phases, Where.SOURCE)
                if phase.name != "instrument" and not phase.name.startswith("round")
            ]
        if self.told is not None:
            phases += model.phases_here((p.value() for p in self.told.phases), Where.DESTINATION, self.clock)
        resumed_at = 0
        if self.running is not None and self.running.resumed_at:
            resumed_at = self.clock.to_here(self.running.resumed_at)
        phases.sort(key=lambda phase: phase.start)
        return model.Timeline(phases, self.copying.frozen_at, resumed_at, self.clock.error)

    def _warnings(self) -> list[str]:
        told = [str(r) for r in self.report.reasons if not r.blocking] if self.report else []
        if lost := self.copying.orphans_lost:
            told.append(f"{lost} connections that the program had closed did not end in time: their peers get a reset")
        return told

    def result(self, outcome: Outcome, fate: Fate, reason: str) -> model.MigrationResult:
        timeline = self.timeline()
        predicted = self.decision.predicted_downtime if self.decision is not None else 0.0
        return model.MigrationResult(
            migration=self.settings.migration,
            outcome=outcome,
            fate=fate.value,
            reason=reason,
            source=self.host.host,
            destination=self.report.destination.host if self.report is not None else self.settings.peer,
            container=self.settings.container,
            pids=self.pids,
            pid=self.told.pid if self.told is not None else 0,
            downtime=timeline.downtime,
            predicted_downtime=predicted if math.isfinite(predicted) else 0.0,
            total=(time.monotonic_ns() - self.began) / 1e9,
            stream_bytes=self.stream_bytes,
            wire_bytes=self.wire_bytes,
            compression_ratio=self.compression_ratio,
            throughput=convergence.measured_throughput(self.copying.rounds) or self.link.stream_throughput,
            rtt=self.link.rtt,
            decision=self.decision.reason if self.decision is not None else "",
            rounds=self.copying.all_rounds,
            timeline=timeline,
            connections_served=len(self.copying.orphans),
            warnings=self._warnings(),
        )


def how_it_ended(error: BaseException | None, *, away: bool, dry_run: bool) -> tuple[Outcome, Fate]:
    """The outcome, and where the workload is: `away`, if the destination has said that it runs there."""
    if isinstance(error, Undecided):
        return Outcome.UNDECIDED, Fate.FROZEN
    if away:
        return Outcome.MIGRATED, Fate.DESTINATION
    if error is None and dry_run:
        return Outcome.DRY_RUN, Fate.SOURCE
    return Outcome.REFUSED if isinstance(error, Refused) else Outcome.ABORTED, Fate.SOURCE


def round_done(migration: str, told: m.Progress) -> model.RoundDone:
    return model.RoundDone(
        migration, told.round.value(), told.predicted_downtime, told.throughput, told.verdict, told.reason
    )
