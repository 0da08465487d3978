"""Pre-copy, as a source does it: files, then rounds of memory until the stop rule says freeze."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from migrator import model
from migrator.engine.base import Phase, Round, Work
from migrator.errors import MigrationAborted
from migrator.filesync.sync import FileSync
from migrator.model import OnEvent
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.session import convergence, prediction
from migrator.session.clock import PeerClock
from migrator.session.peer import Peer
from migrator.session.phases import PhaseLog
from migrator.session.proposal import Proposal
from migrator.session.report import round_done
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread


class Precopy:
    """`decision` is that of the last round, None before the first; `throughput` in bytes/s of stream, without a cap."""

    def __init__(
        self, settings: SourceSettings, proposal: Proposal, workload: WorkloadThread, peer: Peer, clock: PeerClock
    ) -> None:
        self.decision: convergence.Decision | None = None
        self.throughput = 0.0
        self._settings, self._proposal, self._workload = settings, proposal, workload
        self._peer, self._clock = peer, clock

    async def run(self, log: PhaseLog, tell: OnEvent, began: int, lost: Callable[[BaseException], None]) -> None:
        """Send until it is time to freeze. The workload runs before and after. `began` is the start of the migration
        in ns, `lost` is called if the stream fails. Raises MigrationAborted where max_downtime is out of reach."""
        settings, workload, files = self._settings, self._workload, self._proposal.files
        report = self._proposal.report
        assert report is not None
        if settings.bandwidth:
            self._peer.link.set_cap(settings.bandwidth)
        if files is not None:
            with log.phase("files"):
                await files.send()
        workload.start_pump(lost)
        with log.phase("instrument"):
            await workload.instrument(report.destination.engine)
        if settings.cold:
            await self._clock.ask()
            return
        step = convergence.NextStep.CONTINUE
        while step is convergence.NextStep.CONTINUE:
            await self._clock.ask()
            if files is not None:
                await files.step()
            made = await workload.round()
            log.phases.append(Phase(f"round {made.number}", made.start, made.end, made.bytes, made.pages))
            step = await self._decide(made, (time.monotonic_ns() - began) / 1e9, files, tell)

    async def _decide(self, made: Round, elapsed: float, files: FileSync | None, tell: OnEvent) -> convergence.NextStep:
        settings = self._settings
        weighed = self._conditions(self._workload.rounds, elapsed, files.seconds if files is not None else 0.0)
        decision = self.decision = convergence.decide(self._workload.rounds, weighed)
        told = m.Progress(
            facts.Round.of(made),
            min(decision.predicted_downtime, 1e9),
            weighed.throughput,
            decision.verdict.value,
            decision.reason,
        )
        tell(round_done(settings.migration, told))
        await self._peer.send(told)
        if decision.verdict is convergence.NextStep.GIVE_UP:
            raise MigrationAborted(
                decision.reason, hint="the workload runs on; give it a larger --max-downtime or --timeout"
            )
        return decision.verdict

    def _conditions(self, rounds: Sequence[Round], elapsed: float, files: float) -> convergence.Conditions:
        """What the stop rule needs to know, as it is now. Changed `files` take that many seconds in the freeze."""
        link, costs = self._peer.link, self._proposal.costs
        # What flowed while the link had time to spare is no more than a lower bound: the best of them.
        self.throughput = convergence.measured_throughput(rounds, costs.looking(self.work)) or max(
            link.stream_throughput, costs.throughput, convergence.least_throughput(rounds)
        )
        if self._settings.bandwidth:  # the cap is lifted for the last round, and what flows then was seen earlier
            self.throughput = costs.throughput or self.throughput
        return convergence.Conditions(
            throughput=self.throughput,
            rtt=link.rtt,
            standing=costs.seconds(self.work) + files,
            max_downtime=self._settings.max_downtime,
            elapsed=elapsed,
            timeout=self._settings.timeout,
        )

    @property
    def work(self) -> Work:
        """What there is to stop and to restore, as it was counted last."""
        rounds = self._workload.rounds
        return (rounds[-1].work if rounds else None) or prediction.work_of(self._proposal.survey)

    def learn(self, result: model.MigrationResult, stood: float) -> None:
        """Take the end of a migration into account for those to come; `stood`: seconds from the freeze until it was
        thawed, if that was because it took too long."""
        directory, peer = self._settings.journal, self._settings.peer
        if self.decision is None:
            return
        if self.decision.verdict is convergence.NextStep.GIVE_UP:
            prediction.doubt(directory, peer)
            return
        seconds = stood or (result.downtime if result.outcome is model.Outcome.MIGRATED else 0.0)
        if not seconds:
            return
        residual = convergence.residual_pages(result.rounds) * convergence.PAGE
        memory = residual / self.throughput if self.throughput else 0.0
        phases = result.timeline.phases if result.timeline is not None else []
        files = sum(phase.seconds for phase in phases if phase.name == "changed files")
        standing = max(seconds - memory - files - convergence.ROUND_TRIPS * result.rtt, 0.0)
        if stood and standing < self._proposal.costs.seconds(self.work):
            return  # it was not these costs
        seen = 0.0 if self._settings.bandwidth else convergence.measured_throughput(result.rounds)
        prediction.learn(directory, peer, self.work, standing, seen)

    def told_late(self, tell: OnEvent) -> None:
        """Tell of the round just before the freeze: there was no time for it then."""
        ahead = self._workload.ahead
        if ahead is not None and self.decision is not None:
            known = self.decision.predicted_downtime, self._peer.link.stream_throughput
            tell(model.RoundDone(self._settings.migration, ahead, *known, "continue", ""))
