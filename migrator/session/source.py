"""The source of a migration: the tables of `migrator.protocol.states`, driven.

    session = SourceSession(settings, factory, link, host, reconnect=...)
    result = await session.run()

Events are taken one at a time from one queue: messages of the destination, the ends of long actions, what a
person wants. Cancelling the task that awaits `run()`, or `cancel()`, aborts before COMMIT; after it, it only
stops waiting for what is not needed to know the outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from migrator import model
from migrator.errors import Fate, MigrationAborted, MigratorError, Overrun, TransportError, Undecided
from migrator.linux import procfs
from migrator.model import OnEvent, Outcome, Where
from migrator.protocol import messages as m
from migrator.protocol import trees
from migrator.protocol.machine import Machine
from migrator.protocol.states import Recorded, SourceAction, SourceEvent, SourceState, source_step
from migrator.recovery.settle import undecided
from migrator.runtime.fault_points import fault
from migrator.session.clock import PeerClock
from migrator.session.deadlines import Deadlines
from migrator.session.departure import Departure
from migrator.session.driver import Driver, finish
from migrator.session.interfaces import Link, NetworkLock, SourceFactory
from migrator.session.journals import SourceJournal
from migrator.session.peer import Peer, Reconnect
from migrator.session.phases import PhaseLog
from migrator.session.precopy import Precopy
from migrator.session.preflight import PreflightReport
from migrator.session.proposal import Proposal
from migrator.session.report import MigrationSummary, failure
from migrator.session.settings import SourceSettings
from migrator.session.workload import WorkloadThread

log = logging.getLogger("migrator.session")

_TELL_SECONDS = 2.0  # for what is only told and does not change the outcome


class SourceSession:
    """One migration, seen from its source."""

    def __init__(
        self,
        settings: SourceSettings,
        factory: SourceFactory,
        link: Link,
        host: m.HostFacts,
        *,
        reconnect: Reconnect | None = None,
        network: NetworkLock | None = None,
        on_event: OnEvent = model.nobody,
    ) -> None:
        self.settings = settings
        self._tell = model.harmless(on_event)
        self._driver = Driver(
            Machine(source_step, SourceState.START),
            settings.migration,
            act=self._act,
            failed=self._failed,
            tolerated=_TOLERATED,
        )
        self._post = self._driver.post
        self._peer = Peer(link, reconnect, host.host, heard=self._heard, broken=self._broken)
        self._clock = PeerClock(self._peer.send)
        self._workload = WorkloadThread(factory, link, network, settings.root)
        self._deadlines = Deadlines(settings, self._driver, self._workload.stood)
        self._proposal = Proposal(settings, host, self._workload, self._peer)
        self._precopy = Precopy(settings, self._proposal, self._workload, self._peer, self._clock)
        self._log = PhaseLog(settings.migration, self._tell)
        self._departure = Departure(self._workload, self._log)
        self._journal = SourceJournal(settings, self._workload)
        self._reconnecting: asyncio.Task[None] | None = None
        self._error: BaseException | None = None
        self._undecided: Undecided | None = None
        self._file_bytes = 0  # sent
        self._running: m.Running | None = None
        self._told: m.DestinationReport | None = None
        self._was_told = asyncio.Event()
        self._began = 0
        self._acts = self._actions()
        self._handlers = self._messages()

    # For the caller

    async def run(self) -> model.MigrationResult:
        """Do it all. Returns once the workload runs on the destination and is gone here (or, with `dry_run`,
        once it is known whether it could).

        Raises Refused, MigrationAborted, or another MigratorError whose fate is SOURCE: then it runs here as
        if nothing had been asked. Raises Undecided: it is frozen here, and the message says what to decide.
        """
        whole, cancelled = await finish(self._main(), f"source {self.settings.migration}", self.cancel)
        if cancelled and whole.exception() is not None and not isinstance(whole.exception(), Undecided):
            raise asyncio.CancelledError from whole.exception()
        return whole.result()

    @property
    def state(self) -> SourceState:
        """The state of the tables."""
        return self._driver.machine.state

    @property
    def report(self) -> PreflightReport | None:
        """Of the preflight; None before the verdict."""
        return self._proposal.report

    def cancel(self, reason: str = "cancelled") -> None:
        """Abort, if COMMIT was not sent yet; else tell that the outcome is waited for."""
        if self.state in (SourceState.COMMITTED, SourceState.AWAY):
            why = "too late to abort: the destination was told to run it; waiting for its answer"
            self._tell(model.Waiting(self.settings.migration, why))
        self._proposal.stop()
        self._post(SourceEvent.CANCEL, MigrationAborted(reason))

    # The loop

    async def _main(self) -> model.MigrationResult:
        self._began = time.monotonic_ns()
        self._tell(model.Started(self.settings.migration, self.settings.peer, self._began))
        self._peer.listen()
        self._post(SourceEvent.BEGIN)
        try:
            while self.state not in (SourceState.HERE, SourceState.AWAY) and self._undecided is None:
                event, why = await self._driver.next()
                if self._deadlines.commits(event):
                    if ended := self._workload.ended():
                        event, why = SourceEvent.FAILED, ended
                    elif self._deadlines.overrun():
                        event, why = SourceEvent.CANCEL, self._deadlines.too_long()
                if self._driver.machine.look(event).state is SourceState.HERE:
                    ended = await asyncio.to_thread(self._workload.ended, procfs.ENDING_SECONDS)
                    self._error = ended or self._error or why
                    self._proposal.stop()
                    await self._driver.stop_work(self._workload.stop)
                await self._driver.take(event)
            result = await self._result()
            self._tell(model.Ended(self.settings.migration, Where.SOURCE, result))
            if result.outcome in (Outcome.MIGRATED, Outcome.DRY_RUN):
                return result
            raise failure(self._undecided or self._error, Fate(result.fate))
        finally:
            await self._close()

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, MigratorError | OSError):
            log.error("%s: unexpected", self.settings.migration, exc_info=error)
        lost = isinstance(error, TransportError) and not isinstance(error, m.MessageError)
        self._post(SourceEvent.LINK_LOST if lost else SourceEvent.FAILED, error)

    def _begin(self, work: Callable[[], Awaitable[None]], done: SourceEvent) -> None:
        """Begin a long action that ends with an event."""

        async def guarded() -> None:
            try:
                await work()
            except Exception as error:
                self._failed(error)
            else:
                self._post(done)

        self._driver.begin(guarded(), done.value)

    # Actions

    def _actions(self) -> dict[SourceAction, Callable[[], Awaitable[None]]]:
        a, migration = SourceAction, self.settings.migration
        return {
            a.SEND_HELLO: self._propose,
            a.JOURNAL_OPEN: self._journal.open,
            a.SEND_BEGIN: self._send_begin,
            a.COPY: self._begin_copy,
            a.SAVE: self._begin_save,
            a.SEND_COMMIT: self._send_commit,
            a.SEND_ASK: lambda: self._send_and_wait(m.Ask(migration)),
            a.SEND_DONE: self._send_done,
            a.SEND_ABORT: self._send_abort,
            a.JOURNAL_HERE: self._record_here,
            a.JOURNAL_AWAY: self._journal.record_away,
            a.JOURNAL_CLOSE: lambda: self._journal.record(Recorded.CLOSED),
            a.THAW: self._workload.thaw,
            a.RELEASE: self._release,
            a.RECONNECT: self._reconnect,
            a.TELL_OPERATOR: self._tell_operator,
        }

    async def _act(self, action: SourceAction) -> None:
        await self._acts[action]()

    async def _propose(self) -> None:
        await self._peer.greet()
        with self._log.phase("survey"):
            proposal = await self._proposal.make(self._sent_files)
        await self._peer.send(proposal)
        fault("source.proposed")
        self._deadlines.proposed()

    async def _send_begin(self) -> None:
        files = self._proposal.files
        await self._peer.send(m.Begin(self.settings.migration, files.single if files is not None else []))
        fault("source.begun")

    async def _begin_copy(self) -> None:
        self._begin(self._copy, SourceEvent.CONVERGED)

    async def _copy(self) -> None:
        def lost(error: BaseException) -> None:
            self._post(SourceEvent.LINK_LOST, error)

        await self._precopy.run(self._log, self._tell, self._began, lost)
        # Slow things now, so that nothing is left for the time in which the workload stands still.
        await self._journal.refresh()

    async def _begin_save(self) -> None:
        self._begin(self._save, SourceEvent.SAVED)
        self._deadlines.freezing()

    async def _save(self) -> None:
        assert self._journal.journal is not None
        self._tell(model.PhaseStarted(self.settings.migration, "freeze", time.monotonic_ns()))
        files = self._proposal.files
        late = files.step if files is not None and files.goes else None
        await self._workload.save(self._journal.journal, self._journal.header, late)

    async def _send_commit(self) -> None:
        fault("source.ready")
        migration, orphans = self.settings.migration, self._workload.orphans
        if orphans:
            stay = [m.OrphanedConnection(c.local, c.local_port, c.peer, c.peer_port) for c in orphans]
            await self._peer.send(m.Orphans(migration, stay))
        await self._peer.send(m.Commit(migration))
        fault("source.committed")
        self._departure.forwarding = self._driver.spawn(self._departure.forward(self._peer.link))
        self._deadlines.asked()

    async def _send_and_wait(self, message: m.AnyMessage) -> None:
        await self._peer.send(message)
        self._deadlines.asked()

    async def _send_done(self) -> None:
        await self._peer.send(self._summary().done())
        fault("source.done")

    async def _send_abort(self) -> None:
        async with asyncio.timeout(_TELL_SECONDS):
            await self._peer.send(m.Abort(self.settings.migration, m.text(self._error or "aborted")))

    async def _record_here(self) -> None:
        await self._journal.record(Recorded.HERE, m.text(self._error or "discarded by the destination"))

    async def _release(self) -> None:
        await self._departure.release(self._peer.link)
        self._precopy.told_late(self._tell)
        await self._clock.sample()  # both hosts are quiet now

    async def _reconnect(self) -> None:
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = self._driver.spawn(self._reach_again())

    async def _reach_again(self) -> None:
        """Post LINK_BACK once the destination is reached, or UNREACHABLE."""

        def waiting(error: BaseException) -> None:
            self._tell(model.Waiting(self.settings.migration, f"asking {self.settings.peer} again: {error}"))

        failed = await self._peer.reach(self.settings.ask_for, waiting)
        if failed is None:
            self._post(SourceEvent.LINK_BACK)
        else:
            self._error = failed
            self._post(SourceEvent.UNREACHABLE, failed)

    async def _tell_operator(self) -> None:
        self._undecided = undecided(self._journal.header, self._error or "no answer")

    def _sent_files(self, count: int) -> None:
        self._file_bytes += count
        phase = "files" if self.state is SourceState.PRECOPY else "changed files"
        self._tell(model.Transferred(self.settings.migration, phase, self._file_bytes, 0))

    # Messages

    def _broken(self, error: BaseException) -> None:
        self._departure.resumed.set()  # nothing more will be heard of it
        wrong = isinstance(error, m.MessageError)
        self._post(SourceEvent.PROTOCOL_ERROR if wrong else SourceEvent.LINK_LOST, error)

    def _heard(self, message: m.AnyMessage) -> None:
        about = getattr(message, "migration", self.settings.migration)
        if about != self.settings.migration:
            raise m.MessageError(f"a {type(message).__name__} about another migration, {about}")
        handler = self._handlers.get(type(message))
        if handler is None:
            raise m.MessageError(f"a {type(message).__name__} is not for a source")
        handler(message)

    def _messages(self) -> dict[type[m.AnyMessage], Callable[[Any], object]]:
        return {
            m.Hello: lambda message: m.common_version(message.versions),
            m.Verdict: self._heard_verdict,
            trees.TreeAnswer: self._heard_files,
            m.FilesSync: self._heard_files,
            m.Standing: lambda message: self._workload.standing(message.round),
            m.Ready: lambda message: self._post(SourceEvent.READY),
            m.Running: self._heard_running,
            m.Discarded: lambda message: self._post(SourceEvent.DISCARDED, self._said(message)),
            m.Clock: self._clock.heard,
            m.DestinationReport: self._heard_report,
            m.Failure: lambda message: self._post(SourceEvent.FAILED, self._said(message)),
        }

    def _said(self, message: m.Discarded | m.Failure) -> MigrationAborted:
        hint = message.hint if isinstance(message, m.Failure) else ""
        return MigrationAborted(f"{self._peer.link.peer}: {message.reason}", hint=hint)

    def _heard_verdict(self, verdict: m.Verdict) -> None:
        if self.state is not SourceState.PREFLIGHT:
            raise m.MessageError("a verdict that was not asked for")
        try:
            self._proposal.judge(verdict)
        except m.MessageError:
            raise
        except MigratorError as error:
            self._post(SourceEvent.FAILED, error)
        else:
            done = SourceEvent.CANCEL if self.settings.dry_run else SourceEvent.ACCEPTED
            self._begin(lambda: self._compare(verdict), done)

    async def _compare(self, verdict: m.Verdict) -> None:
        notes = await self._proposal.compare(verdict)
        for note in notes if not self.settings.dry_run else []:  # a dry run ends with them
            self._tell(model.Noted(self.settings.migration, note))

    def _heard_files(self, message: m.FilesSync | trees.TreeAnswer) -> None:
        if self._proposal.files is None:
            raise m.MessageError(f"a {type(message).__name__}, and no files were offered")
        self._proposal.files.heard(message)

    def _heard_running(self, message: m.Running) -> None:
        if self._running is None or self._running.waits:
            self._running = message
        if not message.waits:
            self._departure.resumed.set()
        self._post(SourceEvent.RUNNING)

    def _heard_report(self, message: m.DestinationReport) -> None:
        self._told = self._told or message
        self._was_told.set()

    # The end

    def _summary(self) -> MigrationSummary:
        return MigrationSummary(
            settings=self.settings,
            proposal=self._proposal,
            workload=self._workload,
            link=self._peer.link,
            began=self._began,
            phases=self._log.phases,
            clock=self._clock.offset,
            running=self._running,
            told=self._told,
            decision=self._precopy.decision,
        )

    async def _result(self) -> model.MigrationResult:
        away = self.state is SourceState.AWAY
        if away:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TELL_SECONDS):
                    await self._was_told.wait()
        result = self._summary().result(self._undecided or self._error, away=away)
        self._precopy.learn(result, self._workload.stood() if isinstance(self._error, Overrun) else 0.0)
        return result

    async def _close(self) -> None:
        await self._driver.close()
        await self._proposal.close()
        await self._workload.close()
        self._journal.close()
        await self._peer.close()


_a = SourceAction
_TOLERATED = frozenset({_a.JOURNAL_HERE, _a.JOURNAL_AWAY, _a.JOURNAL_CLOSE, _a.SEND_ABORT, _a.SEND_DONE})
