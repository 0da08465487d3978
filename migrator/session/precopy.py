"""Pre-copy, as a source does it: files, then rounds of memory until the stop rule says freeze."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from migrator import model
from migrator.engine.base import Phase, Round
from migrator.errors import MigrationAborted
from migrator.filesync.sync import FileSync
from migrator.model import OnEvent
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.session import convergence, downtime_model
from migrator.session.clock import PeerClock
from migrator.session.peer import Peer
from migrator.session.phases import PhaseLog
from migrator.session.proposal import Proposal
from migrator.session.report import round_done
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread


class Precopy:
    """`decision` is that of the last round, None before the first."""

    def __init__(
        self, settings: SourceSettings, proposal: Proposal, workload: WorkloadThread, peer: Peer, clock: PeerClock
    ) -> None:
        self.decision: convergence.Decision | None = None
        self._settings, self._proposal, self._workload = settings, proposal, workload
        self._peer, self._clock = peer, clock

    async def run(self, log: PhaseLog, tell: OnEvent, began: int, lost: Callable[[BaseException], None]) -> None:
        """Send until it is time to freeze. The workload runs before and after. `began` is the start of the migration
        in ns, `lost` is called if the stream fails. Raises MigrationAborted where max_downtime is out of reach."""
        settings, workload, files = self._settings, self._workload, self._proposal.files
        if settings.bandwidth:
            self._peer.link.set_cap(settings.bandwidth)
        if files is not None:
            with log.phase("files"):
                await files.send()
        workload.start_pump(lost)
        with log.phase("instrument"):
            await workload.instrument()
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
        survey, link, factor = self._proposal.survey, self._peer.link, self._proposal.factor
        assert survey is not None
        freeze, restore = downtime_model.modelled(survey.threads)
        return convergence.Conditions(
            throughput=convergence.measured_throughput(rounds) or link.stream_throughput,
            rtt=link.rtt,
            freeze=freeze * factor + files,
            restore=restore * factor,
            max_downtime=self._settings.max_downtime,
            elapsed=elapsed,
            timeout=self._settings.timeout,
        )

    def told_late(self, tell: OnEvent) -> None:
        """Tell of the round just before the freeze: there was no time for it then."""
        ahead = self._workload.ahead
        if ahead is not None and self.decision is not None:
            known = self.decision.predicted_downtime, self._peer.link.stream_throughput
            tell(model.RoundDone(self._settings.migration, ahead, *known, "continue", ""))
