"""The destination of a migration: the tables of `migrator.protocol.states`, driven.

    result = await DestinationSession(settings, link).run(proposal)

`migrator.session.serve` makes one where a source proposes a migration. A session ends when the copy runs and
the source has said that it knows, when the copy is discarded, or when the link is gone; what it leaves
undone, its journal tells the next agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import msgspec

from migrator import model
from migrator.engine.base import Destination, Phase, Round
from migrator.errors import Fate, MigrationAborted, MigratorError, TransportError
from migrator.filesync.receiver import FileReceiver
from migrator.model import OnEvent, Outcome, Where
from migrator.protocol import facts, trees
from migrator.protocol import messages as m
from migrator.protocol.states import DestinationAction, DestinationEvent, DestinationState, Recorded, destination_step
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id
from migrator.recovery.settle import kill, thaw, waiting_locks
from migrator.runtime.fault_points import fault
from migrator.runtime.latency import LatencyGuard, prepare, yield_processor
from migrator.runtime.pump import Pump
from migrator.runtime.thread import OwnThread
from migrator.session import preflight
from migrator.session.arrival import Arrival
from migrator.session.interfaces import Link
from migrator.session.report import round_done
from migrator.session.settings import DestinationSettings, Prepared

log = logging.getLogger("migrator.session")

_BEGIN_SECONDS = 600.0
_MOST_ROUNDS = 10_000
_TELL_SECONDS = 0.02
_LOCK_SECONDS = 0.2  # of one attempt
_PATIENCE = 2_000_000_000  # ns after which it is said what the copy waits for


class DestinationSession:
    """One migration, seen from its destination. `state` is the state of the tables."""

    def __init__(self, settings: DestinationSettings, link: Link, *, on_event: OnEvent = model.nobody) -> None:
        self.settings = settings
        self.state = DestinationState.START
        self._link = link
        self._tell = on_event
        self._events: asyncio.Queue[tuple[DestinationEvent, BaseException | None]] = asyncio.Queue()
        self._thread = OwnThread("engine")
        self._arriving = Arrival(link)
        self._proposal: m.Propose | None = None
        self._prepared: Prepared | None = None
        self._files = FileReceiver([], "", "")
        self._journal: Journal | None = None
        self._engine: Destination | None = None
        self._held = asyncio.Event()  # the copy is held, or never will be
        self._awaiting_hold = False
        self._build_error: BaseException | None = None
        self._tidied = False
        self._pump: Pump | None = None
        self._work: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._error: BaseException | None = None
        self._rounds: list[Round] = []
        self._done: m.Done | None = None
        self._phases: list[Phase] = []
        self._calm = LatencyGuard()
        self._pid = 0
        self._resumed_at = 0
        self._began = time.monotonic_ns()
        self._finished = False

    # For the caller

    async def run(self, proposal: m.Propose) -> model.MigrationResult:
        """Take this workload in, if it fits. Returns when there is nothing left to do here.

        Raises nothing for what the peer does: see `outcome` and `reason` of the result.
        """
        self._proposal = proposal
        whole = asyncio.create_task(self._main(), name=f"destination {proposal.migration}")
        cancelled = False
        while not whole.done():
            try:
                await asyncio.wait([whole])
            except asyncio.CancelledError:
                cancelled = True
                self.cancel("this agent is being stopped")
        if cancelled:
            raise asyncio.CancelledError
        return whole.result()

    def cancel(self, reason: str = "cancelled") -> None:
        """Discard the copy, unless it was decided that it runs."""
        self._post(DestinationEvent.CANCEL, MigrationAborted(reason))

    # The loop

    def _post(self, event: DestinationEvent, why: BaseException | None = None) -> None:
        self._events.put_nowait((event, why))

    async def _main(self) -> model.MigrationResult:
        listener = asyncio.create_task(self._listen(), name="messages")
        self._tell(model.Started(self._migration, self._link.peer, self._began))
        self._post(DestinationEvent.HELLO)
        try:
            while not self._finished:
                event, why = await self._events.get()
                await self._step(event, why)
            await self._arriving.announced()
            result = self._result()
            self._tell(model.Ended(self._migration, Where.DESTINATION, result))
            return result
        finally:
            for task in [listener, *self._tasks]:
                task.cancel()
                with contextlib.suppress(BaseException):
                    await task
            await self._close()

    async def _step(self, event: DestinationEvent, why: BaseException | None) -> None:
        step = destination_step(self.state, event)
        log.debug("%s: %s, %s -> %s", self._migration, self.state.value, event.value, step.state.value)
        if why is not None and self._error is None and self.state is not DestinationState.RUNNING:
            self._error = why
        if DestinationAction.DECIDE_DISCARDED in step.actions:
            await self._stop_work()
        self.state = step.state
        todo = list(step.actions)
        while todo:
            action = todo.pop(0)
            try:
                outcome = await self._act(action)
            except Exception as error:
                if action in _TOLERATED:
                    log.warning("%s: %s: %s", self._migration, action.value, error)
                    continue
                if not isinstance(error, MigratorError | OSError):
                    log.exception("%s: %s", self._migration, action.value)
                self._failed(error)
                break
            if outcome is not None:
                # The decision: its consequences follow at once, before any other event.
                step = destination_step(self.state, outcome)
                self.state, todo = step.state, list(step.actions)
        self._note_end(event)

    def _failed(self, error: BaseException) -> None:
        if self.state is DestinationState.DECIDING:
            # Nothing is recorded, so nothing may be said. The copy stays frozen; the next agent decides.
            log.critical("%s: the decision cannot be recorded: %s", self._migration, error)
            self._error, self._finished = error, True
            return
        self._post(DestinationEvent.FAILED, error)

    def _note_end(self, event: DestinationEvent) -> None:
        s, e = DestinationState, DestinationEvent
        if self.state in (s.DISCARDED, s.ENDED):
            self._finished = True
        elif self.state is s.LOCKING:
            # The source asks over another link; whoever answers takes the locks then.
            self._finished = event in (e.LINK_LOST, e.CANCEL, e.FAILED)
        elif self.state is s.RUNNING:
            self._finished = self._finished or event in (e.DONE, e.LINK_LOST, e.CANCEL, e.FAILED)

    async def _stop_work(self) -> None:
        work, self._work = self._work, None
        if work is not None and not work.done():
            work.cancel()
            await self._stop_pump()
            await self._thread.idle()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _stop_pump(self) -> None:
        if self._pump is not None:
            await self._pump.stop()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Actions

    async def _act(self, action: DestinationAction) -> DestinationEvent | None:
        migration, a = self._migration, DestinationAction
        if action is a.SEND_VERDICT:
            await self._judge()
        elif action is a.JOURNAL_OPEN:
            await self._open_journal()
        elif action is a.BUILD:
            fault("destination.begun")
            self._work = asyncio.create_task(self._build(), name="build")
        elif action is a.SEND_READY:
            await self._send(m.Ready(migration, time.monotonic_ns()))
            fault("destination.ready")
        elif action is a.DECIDE_RUNNING:
            fault("destination.commit")
            wish, reason = await self._when_held()
            # On the event loop on purpose: the workload stands still, and a thread costs more than the disk.
            return self._decide(wish, reason)
        elif action is a.DECIDE_DISCARDED:
            return self._decide(Recorded.DISCARDED, m.text(self._error or "aborted by the source"))
        elif action is a.TAKE_LOCKS:
            self._spawn(self._take_locks())
        elif action is a.RESUME:
            await self._resume()
        elif action is a.DISCARD:
            await self._discard()
        elif action is a.SEND_RUNNING:
            await self._tell_running()
        elif action is a.SEND_DISCARDED:
            assert self._journal is not None
            await self._send(m.Discarded(migration, self._journal.reason))
        elif action is a.JOURNAL_RESUMED:
            await self._tidy()
            self._record(Recorded.RESUMED)
        elif action is a.JOURNAL_CLOSE:
            self._record(Recorded.CLOSED)
        elif action is a.TELL_OPERATOR:
            log.critical("%s: %s; the journal is kept, restart the agent", migration, self._error)
        return None

    async def _send(self, message: m.AnyMessage) -> None:
        await self._link.send(m.encode(message))

    async def _tell_running(self) -> None:
        """First the source is told, for it waits; only then is time for ourselves. But the copy, which waits for
        us to close what is its, does not wait for a link that takes no message."""
        if self.state is DestinationState.LOCKING:
            await self._send(m.Running(self._migration, waits=True))
            return
        telling = asyncio.ensure_future(self._send(m.Running(self._migration, self._resumed_at)))
        await asyncio.wait([telling], timeout=_TELL_SECONDS)
        if not telling.done():
            await self._tidy()
        await telling
        fault("destination.told")
        self._calm.leave()
        await self._tidy()
        await self._report()

    async def _tidy(self) -> None:
        if self._engine is not None and not self._tidied:
            self._tidied = True
            try:
                await self._thread.run(self._engine.tidy)
            except Exception as error:
                log.warning("%s: %s", self._migration, error)

    async def _judge(self) -> None:
        proposal = self._propose
        reasons: list[m.Reason] = []
        wanted: list[str] = []
        try:
            root = self.settings.root_of(proposal)
            self._files = FileReceiver(proposal.trees, root, proposal.migration)
            files = await asyncio.to_thread(preflight.collect_files, proposal.survey.value().files, root)
            taken = preflight.taken(proposal.survey.wanted_pids)
            reasons, wanted = preflight.compare(proposal, self.settings.host, files, taken)
            self._files.want(wanted)
            for tree in self._files.shared():
                remedy = "it needs no copy: leave --copy-files and --copy-path away"
                reasons.append(m.Reason(tree.path, "is the same directory on both hosts", remedy))
            if not any(r.blocking for r in reasons) and not proposal.dry_run:
                self._files.accepted = True
                self._prepared = await self._thread.run(self.settings.prepare, proposal)
        except MigratorError as error:
            texts = getattr(error, "reasons", None) or [error.message]
            reasons += [m.Reason(self.settings.host.host, m.text(text), m.text(error.hint)) for text in texts]
        prepare()
        await self._send(m.Verdict(self.settings.host, reasons, wanted))
        fault("destination.proposed")
        self._after(_BEGIN_SECONDS, DestinationState.PREFLIGHT)

    async def _open_journal(self) -> None:
        if self._prepared is None:
            raise MigrationAborted("this host has refused the workload")
        facts = JournalHeader(
            migration=self._migration,
            role=Role.DESTINATION,
            peer=self._link.peer,
            cgroup=self._prepared.cgroup,
            container=self._propose.container,
            boot_id=boot_id(),
            started_at=time.time(),
        )
        try:
            self._journal = Journal.create(self.settings.journal, facts)
        except FileExistsError:
            raise MigrationAborted(f"migration {self._migration} is already known here") from None
        for state in (DestinationState.BUILDING, DestinationState.READY):
            self._after(self.settings.limit, state)

    async def _build(self) -> None:
        assert self._prepared is not None
        read_fd, write_fd = os.pipe()
        self._pump = Pump(self._link.pump_out, write_fd)
        loop = asyncio.get_running_loop()
        try:
            await self._thread.run(self._build_and_hold, self._prepared, read_fd, loop)
        except Exception as error:
            # A stream that was cut off is the symptom; why it was cut off is the cause.
            cause: BaseException = error
            if self._pump.error is not None:
                cause = self._pump.error
            elif not isinstance(error, MigratorError | OSError):
                log.exception("%s: building failed", self._migration)
            self._build_error = cause
            if not self._awaiting_hold:  # else it is decided upon now
                self._post(DestinationEvent.FAILED, cause)
        finally:
            self._held.set()

    async def _when_held(self) -> tuple[Recorded, str]:
        """What is to be decided, once the copy is held by its cgroup, or could not be."""
        self._awaiting_hold = True
        if self._work is not None:
            await self._held.wait()
        if self._build_error is not None:
            return Recorded.DISCARDED, m.text(self._build_error)
        return Recorded.RUNNING, ""

    def _build_and_hold(self, prepared: Prepared, read_fd: int, loop: asyncio.AbstractEventLoop) -> None:
        try:
            self._engine = prepared.factory(read_fd)
            self._engine.on_round = lambda number: self._call_soon(loop, self._stand, number)
            self._pid = self._engine.build()
            fault("destination.built")
            # Told from here: what follows has the time of a round trip.
            loop.call_soon_threadsafe(self._post, DestinationEvent.BUILT)
            yield_processor()
            self._engine.hold()
            fault("destination.held")
        finally:
            os.close(read_fd)
        loop.call_soon_threadsafe(self._held.set)
        self._arriving.prepare(prepared.arrival)

    @staticmethod
    def _call_soon(loop: asyncio.AbstractEventLoop, call: Callable[[int], None], number: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody to tell
            loop.call_soon_threadsafe(call, number)

    def _stand(self, number: int) -> None:
        async def tell() -> None:
            with contextlib.suppress(MigratorError, OSError):
                await self._send(m.Standing(self._migration, number))

        self._spawn(tell())

    def _decide(self, wish: Recorded, reason: str) -> DestinationEvent:
        if self._journal is None:
            # Asked about a migration that was never begun here.
            facts = JournalHeader(
                migration=self._migration, role=Role.DESTINATION, boot_id=boot_id(), started_at=time.time()
            )
            self._journal = Journal.create(self.settings.journal, facts)
            wish = Recorded.DISCARDED
        with self._phase("journal"):
            known = self._facts_of_copy() if wish is Recorded.RUNNING else None
            decided = self._journal.decide(wish, reason=reason, facts=known)
        fault("destination.decided")
        if decided is not Recorded.RUNNING:
            return DestinationEvent.DECIDED_DISCARDED
        locking = self._journal.facts.locks
        return DestinationEvent.DECIDED_LOCKING if locking else DestinationEvent.DECIDED_RUNNING

    def _facts_of_copy(self) -> JournalHeader | None:
        """What became known while it was built and an agent needs that has to resume it for us."""
        moves = self._engine.moves if self._engine is not None else []
        locks = [tuple(lock) for lock in self._engine.late_locks] if self._engine is not None else []
        assert self._journal is not None
        return msgspec.structs.replace(self._journal.facts, moves=moves, locks=locks) if moves or locks else None

    async def _take_locks(self) -> None:
        """Post LOCKED once the source copy is gone and the copy has the locks that it had."""
        assert self._journal is not None
        facts = self._journal.facts
        start, said = time.monotonic_ns(), False
        try:
            while waits := await self._thread.run(waiting_locks, facts, self.settings.tools, _LOCK_SECONDS):
                if not said and time.monotonic_ns() - start > _PATIENCE:
                    log.warning("%s: the copy stays frozen until it has %s", self._migration, waits)
                    said = True
        except (MigratorError, OSError) as error:
            self._post(DestinationEvent.FAILED, error)
            return
        self._phases.append(Phase("locks", start, time.monotonic_ns()))
        self._post(DestinationEvent.LOCKED)

    async def _resume(self) -> None:
        fault("destination.locked")
        loop = asyncio.get_running_loop()
        if self._arriving.prepared:  # what is left to do takes less time than a thread costs
            self._resume_now(loop)
        else:
            await self._thread.run(self._resume_now, loop)

    def _resume_now(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._engine is not None and self._journal is not None and self._prepared is not None
        self._arriving.prepare(self._prepared.arrival)
        self._arriving.open(loop)
        self._calm.leave()  # else the copy, once it runs, would wait for us
        try:
            self._engine.resume()
        except Exception:
            # Decided is decided: what the engine cannot do, its cgroup can.
            if not thaw(self._journal.facts, self.settings.tools):
                raise
        finally:
            self._arriving.runs()
        self._resumed_at = _end_of(self._engine.phases, "resume") or time.monotonic_ns()
        fault("destination.resumed")

    async def _discard(self) -> None:
        await self._stop_pump()
        await self._thread.idle()
        try:
            if self._engine is not None:
                await self._thread.run(self._engine.discard)
        except Exception as error:
            log.warning("%s: the engine could not discard it (%s), its cgroup will", self._migration, error)
            if self._journal is not None:
                await self._thread.run(kill, self._journal.facts, self.settings.tools)
        if self._prepared is not None:
            await self._thread.run(self._prepared.cleanup)

    def _record(self, state: Recorded) -> None:
        if self._journal is not None:
            self._journal.record(state)

    async def _report(self) -> None:
        phases = [*self._phases, *self._arriving.phases, *(self._engine.phases if self._engine is not None else [])]
        await self._send(
            m.DestinationReport(self._migration, [facts.Phase.of(phase) for phase in phases[-200:]], self._pid)
        )

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        start = time.monotonic_ns()
        yield
        self._phases.append(Phase(name, start, time.monotonic_ns()))

    def _after(self, seconds: float, state: DestinationState) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            if self.state is state:
                self.cancel(f"nothing came from the source for {seconds:g} s")

        self._spawn(later())

    # Messages

    async def _listen(self) -> None:
        try:
            while True:
                await self._heard(m.decode(await self._link.receive()))
        except (m.MessageError, MigratorError, OSError) as error:
            event = DestinationEvent.LINK_LOST
            if isinstance(error, m.MessageError):
                event = DestinationEvent.PROTOCOL_ERROR
            elif not isinstance(error, TransportError):
                event = DestinationEvent.FAILED
            self._post(event, error)

    async def _heard(self, message: m.AnyMessage) -> None:
        if isinstance(message, m.Clock):
            await self._send(m.Clock(message.asked, time.monotonic_ns()))
        elif isinstance(message, trees.TreeOps):
            if self.state not in (DestinationState.PREFLIGHT, DestinationState.BUILDING):
                raise m.MessageError("files at the wrong time")
            await asyncio.to_thread(self._files.apply, message)
        elif isinstance(message, trees.TreeList):
            if self.state is not DestinationState.PREFLIGHT:
                raise m.MessageError("a list of files at the wrong time")
            for answer in await asyncio.to_thread(self._files.compare, message):
                await self._send(answer)
        elif isinstance(message, m.Orphans):
            if message.migration != self._migration or self.state is not DestinationState.READY:
                raise m.MessageError("connections that stay behind, at the wrong time")
            self._arriving.orphans = message.connections
        elif isinstance(message, m.FilesSync):
            await self._send(message)
        elif isinstance(message, m.Progress):
            if len(self._rounds) >= _MOST_ROUNDS:
                raise m.MessageError(f"more than {_MOST_ROUNDS} rounds")
            self._rounds.append(message.round.value())
            self._tell(round_done(self._migration, message))
            if message.round.number == 1:
                if self._prepared is not None:
                    self._spawn(self._arriving.prepare_early(self._prepared.arrival))
            elif message.verdict == "freeze":
                self._calm.enter()
        elif isinstance(message, m.Begin | m.Commit | m.Abort | m.Ask | m.Done):
            if message.migration != self._migration:
                raise m.MessageError(f"about another migration, {message.migration}")
            if isinstance(message, m.Done):
                self._done = message
            if isinstance(message, m.Begin):
                self._files.add(message.trees)
            why = MigrationAborted(f"the source: {message.reason}") if isinstance(message, m.Abort) else None
            self._post(_EVENTS[type(message)], why)
        elif isinstance(message, m.Failure):
            self._post(DestinationEvent.FAILED, MigrationAborted(f"the source: {message.reason}"))
        else:
            raise m.MessageError(f"a {type(message).__name__} was not expected")

    # The end

    @property
    def _propose(self) -> m.Propose:
        assert self._proposal is not None
        return self._proposal

    @property
    def _migration(self) -> str:
        return self._propose.migration

    def _result(self) -> model.MigrationResult:
        running = self.state in _DECIDED
        done = self._done or m.Done(self._migration)
        outcome = Outcome.MIGRATED if running else Outcome.ABORTED
        if self.state is DestinationState.ENDED and self._propose.dry_run:
            outcome = Outcome.DRY_RUN
        return model.MigrationResult(
            migration=self._migration,
            outcome=outcome,
            fate=(Fate.DESTINATION if running else Fate.SOURCE).value,
            reason="" if running else str(self._error or ""),
            source=self._propose.source.host,
            destination=self.settings.host.host,
            container=self._propose.container,
            pid=self._pid,
            downtime=done.downtime,
            total=(time.monotonic_ns() - self._began) / 1e9,
            stream_bytes=done.stream_bytes,
            wire_bytes=done.wire_bytes,
            compression_ratio=done.compression_ratio,
            rounds=self._rounds,
            rtt=self._link.rtt,
        )

    async def _close(self) -> None:
        self._calm.leave()
        await self._stop_pump()
        kept = self.state in _DECIDED
        if self.state is DestinationState.LOCKING:
            await self._tidy()  # a file that we have open as well would stay locked for as long
        for left in await asyncio.to_thread(self._files.close, kept):
            log.warning("%s: files that were only here have been set aside in %s", self._migration, left)
        if self.state is DestinationState.ENDED and self._prepared is not None:
            await self._thread.run(self._prepared.cleanup)
        await self._thread.close()
        await self._arriving.close()
        if self._journal is not None:
            self._journal.close()


def _end_of(phases: Iterable[Phase], name: str) -> int:
    """When the last phase of that name ended; 0 if there was none."""
    return max((phase.end for phase in phases if phase.name == name), default=0)


_EVENTS: dict[type[m.AnyMessage], DestinationEvent] = {
    m.Begin: DestinationEvent.BEGIN,
    m.Commit: DestinationEvent.COMMIT,
    m.Abort: DestinationEvent.ABORT,
    m.Ask: DestinationEvent.ASK,
    m.Done: DestinationEvent.DONE,
}
_DECIDED = (DestinationState.LOCKING, DestinationState.RUNNING)
_TOLERATED = frozenset(
    {
        DestinationAction.SEND_RUNNING,
        DestinationAction.SEND_DISCARDED,
        DestinationAction.JOURNAL_RESUMED,
        DestinationAction.JOURNAL_CLOSE,
    }
)
