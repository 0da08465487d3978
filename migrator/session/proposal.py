"""What a source proposes to a host, and what it makes of the verdict: its preflight."""

from __future__ import annotations

import dataclasses
import stat
import threading
from collections.abc import Callable

import msgspec

from migrator.engine.base import Survey
from migrator.errors import Fate, Refused
from migrator.filesync.sync import FileSync
from migrator.protocol import facts
from migrator.protocol import messages as m
from migrator.runtime.thread import OwnThread
from migrator.session import convergence, prediction
from migrator.session.file_facts import still_there, with_digests
from migrator.session.peer import Peer
from migrator.session.preflight import PreflightReport
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread


class Proposal:
    """One proposal.

    report:  of the preflight; None before the verdict
    files:   those that go along; None if none may
    survey:  what the engine saw
    costs:   of a stop between these two hosts
    """

    def __init__(self, settings: SourceSettings, host: m.HostFacts, workload: WorkloadThread, peer: Peer) -> None:
        self.settings, self.host = settings, host
        self.report: PreflightReport | None = None
        self.files: FileSync | None = None
        self.survey: Survey | None = None
        self.costs = prediction.Costs()
        self._workload, self._peer = workload, peer
        self._thread = OwnThread("preflight")
        self._stopped = threading.Event()

    async def make(self, sent_files: Callable[[int], None]) -> m.Propose:
        """Survey the workload. Raises Refused; the workload runs on. See `FileSync` for `sent_files`."""
        settings = self.settings
        survey = self.survey = await self._workload.survey()
        self.costs = prediction.load(settings.journal, settings.peer)
        # The root of the workload, which need not be ours.
        root = f"/proc/{survey.pids[0]}/root" if survey.pids else ""
        files = await self._thread.run(with_digests, survey.files, root, stopped=self._stopped.is_set)
        files = await self._thread.run(still_there, files, root)
        if settings.copy_files or settings.log:
            self.files = FileSync(
                [f for f in files if stat.S_ISREG(f.mode) and (settings.copy_files or f.path == settings.log)],
                settings.trees,
                root,
                send=self._peer.send_within_cap,
                tell=sent_files,
                pids=self._workload.pids,
            )
        return m.Propose(
            settings.migration,
            self.host,
            facts.Survey.of(dataclasses.replace(survey, files=files)),
            settings.container,
            settings.container_spec,
            settings.copy_files,
            settings.dry_run,
            self.files.proposed() if self.files is not None else [],
            settings.fleet,
            settings.token,
            settings.verify,
        )

    def judge(self, verdict: m.Verdict) -> None:
        """Take the verdict. Raises MessageError for one that no destination would give, Refused with all reasons."""
        if self.survey is None or self.report is not None:
            raise m.MessageError("a verdict that was not asked for")
        if self.files is not None:
            self.files.check_wanted(verdict.wanted)
        elif verdict.wanted:
            raise m.MessageError("files are wanted that were not offered")
        self.report = PreflightReport(
            self.settings.migration,
            self.host,
            verdict.destination,
            verdict.reasons,
            len(self.survey.files),
            self.survey.rss_bytes,
            self.costs.seconds(prediction.work_of(self.survey)) + convergence.ROUND_TRIPS * self._peer.link.rtt,
        )
        if not self.report.ok:
            raise Refused([str(reason) for reason in verdict.reasons if reason.blocking], fate=Fate.SOURCE)

    async def compare(self, verdict: m.Verdict) -> list[str]:
        """Compare the trees that go along with what is there; what a person may want to know. Raises FileError,
        TransportError."""
        if self.files is None:
            return []
        assert self.report is not None
        notes = (await self.files.compare(verdict.wanted)).reasons(verdict.destination.host)
        self.report = msgspec.structs.replace(self.report, reasons=[*self.report.reasons, *notes])
        return [str(note) for note in notes]

    def stop(self) -> None:
        """End the reading of files that is under way."""
        self._stopped.set()

    async def close(self) -> None:
        self.stop()
        await self._thread.close()
        if self.files is not None:
            await self.files.close()
