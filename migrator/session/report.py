"""What a source has to say when its migration is over."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from migrator import model
from migrator.errors import Fate, MigrationAborted, MigratorError, Refused, Undecided, WorkloadEnded
from migrator.model import Outcome, Phase, Where
from migrator.protocol import messages as m
from migrator.session import convergence
from migrator.session.interfaces import Link
from migrator.session.proposal import Proposal
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread
from migrator.text import duration


@dataclass(frozen=True, kw_only=True)
class MigrationSummary:
    """Everything that a result is made of."""

    settings: SourceSettings
    proposal: Proposal
    workload: WorkloadThread
    link: Link
    began: int  # ns of CLOCK_MONOTONIC
    phases: list[Phase]
    clock: model.ClockOffset
    running: m.Running | None
    told: m.DestinationReport | None
    decision: convergence.Decision | None

    @property
    def stream_bytes(self) -> int:
        """Before compression; by the engine's rounds where this link is a new one."""
        return self.link.counters.stream_sent or sum(r.bytes for r in self.workload.all_rounds)

    def timeline(self) -> model.Timeline:
        """Phases of both hosts on our clock."""
        phases = self.phases + model.phases_here(self.workload.log.phases, Where.SOURCE)
        if self.workload.source is not None:
            # Rounds are in it already, with the time it took to send them.
            phases += [
                phase
                for phase in model.phases_here(self.workload.source.phases, Where.SOURCE)
                if phase.name != "instrument" and not phase.name.startswith("round")
            ]
        if self.told is not None:
            phases += model.phases_here((p.value() for p in self.told.phases), Where.DESTINATION, self.clock)
        resumed_at = 0
        if self.running is not None and self.running.resumed_at:
            resumed_at = self.clock.to_here(self.running.resumed_at)
        phases.sort(key=lambda phase: phase.start)
        return model.Timeline(phases, self.workload.frozen_at, resumed_at, self.clock.error)

    @property
    def first_packet(self) -> float:
        """Seconds from the freeze until a program of the copy was heard on the container's network; 0.0 if none was."""
        if self.told is None or not self.told.first_packet or not self.workload.frozen_at:
            return 0.0
        return max(self.clock.to_here(self.told.first_packet) - self.workload.frozen_at, 0) / 1e9

    def done(self) -> m.Done:
        """What the destination is told at the end, for its own records."""
        return m.Done(
            self.settings.migration,
            self.timeline().downtime,
            self.stream_bytes,
            self.link.counters.wire_sent,
            self.link.compression_ratio,
        )

    def _warnings(self, downtime: float) -> list[str]:
        report = self.proposal.report
        told = [str(reason) for reason in report.reasons if not reason.blocking] if report else []
        limit = self.settings.max_downtime
        if limit is not None and downtime > limit:
            told.append(f"the downtime of {duration(downtime)} is over the max downtime of {duration(limit)}")
        if lost := self.workload.orphans_lost:
            told.append(f"{lost} connections that the program had closed did not end in time: their peers get a reset")
        return told

    def result(self, error: BaseException | None, *, away: bool) -> model.MigrationResult:
        """`away`: the destination has said that it runs there."""
        outcome, fate = how_it_ended(error, away=away, dry_run=self.settings.dry_run)
        timeline, report, survey = self.timeline(), self.proposal.report, self.proposal.survey
        predicted = self.decision.predicted_downtime if self.decision is not None else 0.0
        predicted = predicted if math.isfinite(predicted) else 0.0
        return model.MigrationResult(
            migration=self.settings.migration,
            outcome=outcome,
            fate=fate.value,
            reason=str(error or ""),
            source=self.proposal.host.host,
            destination=report.destination.host if report is not None else self.settings.peer,
            container=self.settings.container,
            pids=survey.pids if survey is not None else [],
            pid=self.told.pid if self.told is not None else 0,
            downtime=timeline.downtime,
            predicted_downtime=predicted,
            first_packet=self.first_packet,
            prediction_error=timeline.downtime - predicted if predicted and timeline.downtime else 0.0,
            total=(time.monotonic_ns() - self.began) / 1e9,
            stream_bytes=self.stream_bytes,
            wire_bytes=self.link.counters.wire_sent,
            compression_ratio=self.link.compression_ratio,
            throughput=convergence.measured_throughput(self.workload.rounds) or self.link.stream_throughput,
            rtt=self.link.rtt,
            decision=self.decision.reason if self.decision is not None else "",
            rounds=self.workload.all_rounds,
            timeline=timeline,
            connections_served=len(self.workload.orphans),
            warnings=self._warnings(timeline.downtime),
        )


def arrived(
    proposal: m.Propose, here: str, done: m.Done, *, running: bool, why: str, pid: int
) -> model.MigrationResult:
    """What a destination says at the end; `done` is what the source has told it."""
    ended = Outcome.DRY_RUN if proposal.dry_run else Outcome.ABORTED
    return model.MigrationResult(
        migration=proposal.migration,
        outcome=Outcome.MIGRATED if running else ended,
        fate=(Fate.DESTINATION if running else Fate.SOURCE).value,
        reason="" if running else why,
        source=proposal.source.host,
        destination=here,
        container=proposal.container,
        pid=pid,
        downtime=done.downtime,
        stream_bytes=done.stream_bytes,
        wire_bytes=done.wire_bytes,
        compression_ratio=done.compression_ratio,
    )


def how_it_ended(error: BaseException | None, *, away: bool, dry_run: bool) -> tuple[Outcome, Fate]:
    """The outcome, and where the workload is: `away`, if the destination has said that it runs there."""
    if isinstance(error, Undecided):
        return Outcome.UNDECIDED, Fate.FROZEN
    if away:
        return Outcome.MIGRATED, Fate.DESTINATION
    if isinstance(error, WorkloadEnded):
        return Outcome.ABORTED, Fate.ENDED
    if error is None and dry_run:
        return Outcome.DRY_RUN, Fate.SOURCE
    return Outcome.REFUSED if isinstance(error, Refused) else Outcome.ABORTED, Fate.SOURCE


def failure(error: BaseException | None, fate: Fate) -> MigratorError:
    """What a migration that did not succeed raises."""
    error = error or MigrationAborted("discarded by the destination")
    if isinstance(error, MigratorError):
        error.fate = fate
        return error
    return MigrationAborted(f"{type(error).__name__}: {error}")


def round_done(migration: str, told: m.Progress) -> model.RoundDone:
    return model.RoundDone(
        migration, told.round.value(), told.predicted_downtime, told.throughput, told.verdict, told.reason
    )
