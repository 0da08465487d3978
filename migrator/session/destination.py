"""The destination of a migration: the tables of `migrator.protocol.states`, driven.

    result = await DestinationSession(settings, link).run(proposal)

`migrator.session.serve` makes one where a source proposes a migration. A session ends when the copy runs and
the source has said that it knows, when the copy is discarded, or when the link is gone; what it leaves
undone, its journal tells the next agent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from migrator import model
from migrator.engine.base import Round
from migrator.errors import MigrationAborted, MigratorError, TransportError
from migrator.model import OnEvent, Where
from migrator.protocol import messages as m
from migrator.protocol import trees
from migrator.protocol.machine import Machine
from migrator.protocol.states import DestinationAction, DestinationEvent, DestinationState, Recorded, destination_step
from migrator.runtime.fault_points import fault
from migrator.session.admission import Admission, reasons_of
from migrator.session.copy_thread import CopyThread
from migrator.session.driver import Driver, finish
from migrator.session.interfaces import Link
from migrator.session.journals import DestinationJournal
from migrator.session.phases import PhaseLog
from migrator.session.report import arrived, round_done
from migrator.session.settings import DestinationSettings

log = logging.getLogger("migrator.session")

_BEGIN_SECONDS = 600.0
_MOST_ROUNDS = 10_000
_TELL_SECONDS = 0.02


class DestinationSession:
    """One migration, seen from its destination."""

    def __init__(self, settings: DestinationSettings, link: Link, *, on_event: OnEvent = model.nobody) -> None:
        self.settings = settings
        self._link = link
        self._tell = model.harmless(on_event)
        self._copy = CopyThread(link, settings.tools)
        self._log = PhaseLog()
        self._driver: Driver[DestinationState, DestinationEvent, DestinationAction]
        self._admission: Admission
        self._proposal: m.Propose
        self._migration = ""
        self._journal: DestinationJournal
        self._error: BaseException | None = None
        self._rounds: list[Round] = []
        self._done: m.Done | None = None
        self._began = time.monotonic_ns()
        self._finished = False
        self._reporting: asyncio.Task[None] | None = None
        self._acts = self._actions()
        self._handlers = self._messages()

    # For the caller

    async def run(self, proposal: m.Propose) -> model.MigrationResult:
        """Take this workload in, if it fits. Returns when there is nothing left to do here.

        Raises nothing for what the peer does: see `outcome` and `reason` of the result.
        """
        self._proposal, self._migration = proposal, proposal.migration
        self.settings = await asyncio.to_thread(self.settings.fitted, proposal)
        self._admission = Admission(proposal, self.settings)
        self._journal = DestinationJournal(self.settings.journal, proposal.migration, self._link)
        self._driver = Driver(
            Machine(destination_step, DestinationState.START),
            proposal.migration,
            act=self._act,
            failed=self._failed,
            tolerated=_TOLERATED,
        )
        whole, cancelled = await finish(
            self._main(), f"destination {proposal.migration}", lambda: self.cancel("this agent is being stopped")
        )
        if cancelled:
            raise asyncio.CancelledError
        return whole.result()

    @property
    def state(self) -> DestinationState:
        """The state of the tables."""
        return self._driver.machine.state

    def cancel(self, reason: str = "cancelled") -> None:
        """Discard the copy, unless it was decided that it runs."""
        self._driver.post(DestinationEvent.CANCEL, MigrationAborted(reason))

    # The loop

    async def _main(self) -> model.MigrationResult:
        listener = self._driver.spawn(self._listen())
        self._tell(model.Started(self._migration, self._link.peer, self._began))
        self._driver.post(DestinationEvent.HELLO)
        try:
            while not self._finished:
                event, why = await self._driver.next()
                if why is not None and self._error is None and self.state is not DestinationState.RUNNING:
                    self._error = why
                if DestinationAction.DECIDE_DISCARDED in self._driver.machine.look(event).actions:
                    self._admission.stop()
                    await self._driver.stop_work(self._copy.stop)
                await self._driver.take(event)
                self._note_end(event)
            if self._reporting is not None:
                await asyncio.wait([self._reporting], timeout=1.0)
            result = self._result()
            self._tell(model.Ended(self._migration, Where.DESTINATION, result))
            return result
        finally:
            listener.cancel()
            self._admission.stop()
            await self._driver.close()
            await self._close()

    def _failed(self, error: BaseException) -> None:
        if not isinstance(error, MigratorError | OSError):
            log.error("%s: unexpected", self._migration, exc_info=error)
        if self.state is DestinationState.DECIDING:
            # Nothing is recorded, so nothing may be said. The copy stays frozen; the next agent decides.
            log.critical("%s: the decision cannot be recorded: %s", self._migration, error)
            self._error, self._finished = error, True
            return
        self._driver.post(DestinationEvent.FAILED, error)

    def _note_end(self, event: DestinationEvent) -> None:
        s, e = DestinationState, DestinationEvent
        ended = (e.LINK_LOST, e.PROTOCOL_ERROR, e.CANCEL, e.FAILED)  # nobody listens any more
        if self.state in (s.DISCARDED, s.ENDED):
            self._finished = True
        elif self.state is s.LOCKING:
            # The source asks over another link; whoever answers takes the locks then.
            self._finished = event in ended
        elif self.state is s.RUNNING:
            self._finished = self._finished or event in (e.DONE, *ended)

    # Actions

    def _actions(self) -> dict[DestinationAction, Callable[[], Awaitable[DestinationEvent | None]]]:
        a = DestinationAction
        return {
            a.SEND_VERDICT: self._begin_preflight,
            a.JOURNAL_OPEN: self._open_journal,
            a.BUILD: self._begin_building,
            a.SEND_READY: self._send_ready,
            a.DECIDE_RUNNING: self._decide_running,
            a.DECIDE_DISCARDED: self._decide_discarded,
            a.TAKE_LOCKS: self._begin_locking,
            a.RESUME: self._resume,
            a.DISCARD: self._discard,
            a.SEND_RUNNING: self._send_running,
            a.SEND_DISCARDED: self._send_discarded,
            a.JOURNAL_RESUMED: self._record_resumed,
            a.JOURNAL_CLOSE: self._record_closed,
            a.TELL_OPERATOR: self._tell_operator,
        }

    async def _act(self, action: DestinationAction) -> DestinationEvent | None:
        return await self._acts[action]()

    async def _send(self, message: m.AnyMessage) -> None:
        await self._link.send(m.encode(message))

    async def _begin_preflight(self) -> None:
        self._driver.spawn(self._driver.guarded(self._judge))

    async def _judge(self) -> None:
        proposal, host = self._proposal, self.settings.host
        reasons, wanted = await self._admission.judge()
        if not any(reason.blocking for reason in reasons) and not proposal.dry_run:
            try:
                self._copy.guard.prepare()
                await self._copy.prepare(self.settings.prepare, proposal)
                self._admission.accept()
            except MigratorError as error:
                reasons += reasons_of(error, host.host)
        await self._send(m.Verdict(host, reasons, wanted))
        fault("destination.proposed")
        self._after(_BEGIN_SECONDS, DestinationState.PREFLIGHT)

    async def _open_journal(self) -> None:
        prepared = self._copy.prepared
        if prepared is None:
            raise MigrationAborted("this host has refused the workload")
        self._journal.open(prepared.cgroup, self._proposal.container)
        for state in (DestinationState.BUILDING, DestinationState.READY):
            self._after(self.settings.limit, state)

    async def _begin_building(self) -> None:
        fault("destination.begun")
        self._driver.begin(self._driver.guarded(self._build), "build")

    async def _build(self) -> None:
        await self._copy.build(self._standing, lambda: self._driver.post(DestinationEvent.BUILT))

    def _standing(self, number: int) -> None:
        async def tell() -> None:
            await self._send(m.Standing(self._migration, number))

        self._driver.spawn(self._quietly(tell))

    async def _quietly(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (MigratorError, OSError) as error:
            log.debug("%s: %s", self._migration, error)  # the listener knows what it means

    async def _send_ready(self) -> None:
        await self._send(m.Ready(self._migration, time.monotonic_ns()))
        fault("destination.ready")

    async def _decide_running(self) -> DestinationEvent:
        fault("destination.commit")
        if (error := await self._copy.held()) is not None:
            return self._decide(Recorded.DISCARDED, m.text(error))
        return self._decide(Recorded.RUNNING, "")

    async def _decide_discarded(self) -> DestinationEvent:
        return self._decide(Recorded.DISCARDED, m.text(self._error or "aborted by the source"))

    def _decide(self, wish: Recorded, reason: str) -> DestinationEvent:
        with self._log.phase("journal"):
            decided = self._journal.decide(wish, reason, self._copy.moves, self._copy.late_locks)
        fault("destination.decided")
        return decided

    async def _begin_locking(self) -> None:
        self._driver.spawn(self._driver.guarded(self._take_locks))

    async def _take_locks(self) -> None:
        await self._copy.take_locks(self._journal.header)
        self._driver.post(DestinationEvent.LOCKED)

    async def _resume(self) -> None:
        await self._copy.resume(self._journal.header)

    async def _discard(self) -> None:
        await self._copy.discard(self._journal.header)

    async def _send_running(self) -> None:
        """Send RUNNING first; close descriptors afterwards. But the copy waits for the closing, so that does not
        wait for a link that takes no message."""
        if self.state is DestinationState.LOCKING:
            await self._send(m.Running(self._migration, waits=True))
            return
        telling = asyncio.ensure_future(self._send(m.Running(self._migration, self._copy.resumed_at)))
        await asyncio.wait([telling], timeout=_TELL_SECONDS)
        if not telling.done():
            await self._copy.tidy()
        await telling
        fault("destination.told")
        self._copy.guard.leave()
        await self._copy.tidy()

        async def report() -> None:
            await self._send(await self._copy.report(self._migration, self._log.phases))

        self._reporting = asyncio.create_task(self._quietly(report))

    async def _send_discarded(self) -> None:
        await self._send(m.Discarded(self._migration, self._journal.reason))

    async def _record_resumed(self) -> None:
        await self._copy.tidy()
        self._journal.record(Recorded.RESUMED)

    async def _record_closed(self) -> None:
        self._journal.record(Recorded.CLOSED)

    async def _tell_operator(self) -> None:
        log.critical("%s: %s; the journal is kept, restart the agent", self._migration, self._error)

    def _after(self, seconds: float, state: DestinationState) -> None:
        def too_late() -> None:
            if self.state is state:
                self.cancel(f"nothing came from the source for {seconds:g} s")

        self._driver.after(seconds, too_late)

    # Messages

    async def _listen(self) -> None:
        try:
            while True:
                message = m.decode(await self._link.receive())
                handler = self._handlers.get(type(message))
                if handler is None:
                    raise m.MessageError(f"a {type(message).__name__} was not expected")
                about = getattr(message, "migration", self._migration)
                if about != self._migration:
                    raise m.MessageError(f"a {type(message).__name__} about another migration, {about}")
                await handler(message)
        except (m.MessageError, MigratorError, OSError) as error:
            event = DestinationEvent.LINK_LOST
            if isinstance(error, m.MessageError):
                event = DestinationEvent.PROTOCOL_ERROR
            elif not isinstance(error, TransportError):
                event = DestinationEvent.FAILED
            self._driver.post(event, error)

    def _messages(self) -> dict[type[m.AnyMessage], Callable[[Any], Awaitable[None]]]:
        return {
            m.Clock: self._heard_clock,
            m.Begin: self._heard_begin,
            trees.TreeList: self._heard_list,
            trees.TreeOps: self._heard_operations,
            m.FilesSync: self._send,
            m.Progress: self._heard_progress,
            m.Orphans: self._heard_orphans,
            m.Commit: lambda message: self._heard(DestinationEvent.COMMIT),
            m.Ask: lambda message: self._heard(DestinationEvent.ASK),
            m.Abort: lambda message: self._heard(DestinationEvent.ABORT, f"the source: {message.reason}"),
            m.Failure: lambda message: self._heard(DestinationEvent.FAILED, f"the source: {message.reason}"),
            m.Done: self._heard_done,
        }

    async def _heard(self, event: DestinationEvent, why: str = "") -> None:
        self._driver.post(event, MigrationAborted(why) if why else None)

    def _expect(self, what: str, *states: DestinationState) -> None:
        if self.state not in states:
            raise m.MessageError(f"{what} at the wrong time")

    async def _heard_clock(self, message: m.Clock) -> None:
        await self._send(m.Clock(message.asked, time.monotonic_ns()))

    async def _heard_begin(self, message: m.Begin) -> None:
        self._admission.add(message.trees)
        self._driver.post(DestinationEvent.BEGIN)

    async def _heard_list(self, message: trees.TreeList) -> None:
        self._expect("a list of files", DestinationState.PREFLIGHT)
        for answer in await self._admission.compare(message):
            await self._send(answer)

    async def _heard_operations(self, message: trees.TreeOps) -> None:
        self._expect("files", DestinationState.PREFLIGHT, DestinationState.BUILDING)
        await self._admission.apply(message)

    async def _heard_progress(self, message: m.Progress) -> None:
        if len(self._rounds) >= _MOST_ROUNDS:
            raise m.MessageError(f"more than {_MOST_ROUNDS} rounds")
        self._rounds.append(message.round.value())
        self._tell(round_done(self._migration, message))
        if message.round.number == 1:
            if self._copy.prepared is not None:
                self._driver.spawn(self._copy.network.prepare_early(self._copy.prepared.network))
        elif message.verdict == "freeze":
            self._copy.guard.enter()

    async def _heard_orphans(self, message: m.Orphans) -> None:
        self._expect("orphaned connections", DestinationState.READY)
        self._copy.network.orphans = message.connections

    async def _heard_done(self, message: m.Done) -> None:
        self._done = message
        self._driver.post(DestinationEvent.DONE)

    # The end

    def _result(self) -> model.MigrationResult:
        done, why = self._done or m.Done(self._migration), str(self._error or "")
        there, pid = self.settings.host.host, self._copy.pid
        result = arrived(self._proposal, there, done, running=self.state in _DECIDED, why=why, pid=pid)
        took = (time.monotonic_ns() - self._began) / 1e9
        return msgspec.structs.replace(result, total=took, rounds=self._rounds, rtt=self._link.rtt)

    async def _close(self) -> None:
        kept = self.state in _DECIDED
        self._copy.guard.leave()
        await self._copy.stop()
        if self.state is DestinationState.LOCKING:
            await self._copy.tidy()  # whoever has got the locks lets the copy run: nothing of it is ours then
        for left in await self._admission.close(kept):
            log.warning("%s: files that were only here have been set aside in %s", self._migration, left)
        await self._copy.network.announced()
        await self._copy.close()
        if kept and self._copy.prepared is not None:
            self._copy.prepared.runs(self._copy.root_pid)
        self._journal.close()


_DECIDED = (DestinationState.LOCKING, DestinationState.RUNNING)
_a = DestinationAction
_TOLERATED = frozenset({_a.SEND_RUNNING, _a.SEND_DISCARDED, _a.JOURNAL_RESUMED, _a.JOURNAL_CLOSE})
