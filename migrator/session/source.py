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
import dataclasses
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from migrator import model
from migrator.errors import (
    Fate,
    MigrationAborted,
    MigratorError,
    Refused,
    TransportError,
    Undecided,
)
from migrator.filesync.sync import FileSync
from migrator.model import OnEvent, Outcome, Phase, Where
from migrator.protocol import facts, trees
from migrator.protocol import messages as m
from migrator.protocol.states import Recorded, SourceAction, SourceEvent, SourceState, source_step
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id
from migrator.recovery.settle import undecided
from migrator.runtime.fault_points import fault
from migrator.session import convergence, downtime_model, preflight
from migrator.session.interfaces import Link, NetworkLock, SourceFactory
from migrator.session.peer import Peer, Reconnect
from migrator.session.report import MigrationSummary, SourceSettings, how_it_ended, round_done
from migrator.session.workload import WorkloadThread, conditions

log = logging.getLogger("migrator.session")

_CLOCK_SAMPLES = 5
_CLOCK_LIMIT = 0.5
_ROUND_GRACE = 5.0
_TELL_SECONDS = 2.0  # for what is only told and does not change the outcome
_RESUME_SECONDS = 5.0  # for a copy that has to get its locks first
_ANSWER_SECONDS = 5.0  # after COMMIT, until the destination is asked over a new link


class SourceSession:
    """One migration, seen from its source. `state` is the state of the tables."""

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
        self.state = SourceState.START
        self.report: preflight.PreflightReport | None = None
        self._host = host
        self._peer = Peer(link, reconnect, host.host, heard=self._heard, broken=self._broken)
        self._tell = on_event
        self._copying = WorkloadThread(factory, link, network)
        self._files: FileSync | None = None
        self._events: asyncio.Queue[tuple[SourceEvent, BaseException | None]] = asyncio.Queue()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._work: asyncio.Task[None] | None = None
        self._reconnecting: asyncio.Task[None] | None = None
        self._journal: Journal | None = None
        self._facts = JournalHeader(
            migration=settings.migration,
            role=Role.SOURCE,
            peer=settings.peer,
            container=settings.container,
            boot_id=boot_id(),
            started_at=time.time(),
        )
        self._error: BaseException | None = None
        self._undecided: Undecided | None = None
        self._survey_pids: list[int] = []
        self._tasks_there = 1
        self._compared = self._rss = 0  # files, bytes
        self._file_bytes = 0  # sent
        self._factor = 1.0
        self._decision: convergence.Decision | None = None
        self._clock = model.ClockOffset()
        self._phases: list[Phase] = []
        self._arrived = asyncio.Event()
        self._clock_answered = asyncio.Event()
        self._forwarding: asyncio.Task[None] | None = None
        self._running: m.Running | None = None
        self._resumed = asyncio.Event()
        self._destination_report: asyncio.Future[m.DestinationReport] | None = None
        self._began = 0
        self._lost_at = 0.0

    # For the caller

    async def run(self) -> model.MigrationResult:
        """Do it all. Returns once the workload runs on the destination and is gone here (or, with `dry_run`,
        once it is known whether it could).

        Raises Refused, MigrationAborted, or another MigratorError whose fate is SOURCE: then it runs here as
        if nothing had been asked. Raises Undecided: it is frozen here, and the message says what to decide.
        """
        whole = asyncio.create_task(self._main(), name=f"source {self.settings.migration}")
        cancelled = False
        while not whole.done():
            try:
                await asyncio.wait([whole])
            except asyncio.CancelledError:
                cancelled = True
                self.cancel()
        if cancelled and whole.exception() is not None and not isinstance(whole.exception(), Undecided):
            raise asyncio.CancelledError from whole.exception()
        return whole.result()

    def cancel(self, reason: str = "cancelled") -> None:
        """Abort, if COMMIT was not sent yet; else tell that the outcome is waited for."""
        if self.state in (SourceState.COMMITTED, SourceState.AWAY):
            self._tell(
                model.Waiting(
                    self.settings.migration,
                    "too late to abort: the destination was told to run it; waiting for its answer",
                )
            )
        self._post(SourceEvent.CANCEL, MigrationAborted(reason))

    # The loop

    def _post(self, event: SourceEvent, why: BaseException | None = None) -> None:
        self._events.put_nowait((event, why))

    async def _main(self) -> model.MigrationResult:
        self._began = time.monotonic_ns()
        self._destination_report = asyncio.get_running_loop().create_future()
        self._tell(model.Started(self.settings.migration, self.settings.peer, self._began))
        self._peer.listen()
        self._post(SourceEvent.BEGIN)
        try:
            while self.state not in (SourceState.HERE, SourceState.AWAY) and self._undecided is None:
                event, why = await self._events.get()
                await self._step(event, why)
            result = await self._result()
            self._tell(model.Ended(self.settings.migration, Where.SOURCE, result))
            if result.outcome in (Outcome.MIGRATED, Outcome.DRY_RUN):
                return result
            raise self._failure()
        finally:
            await self._close()

    async def _step(self, event: SourceEvent, why: BaseException | None) -> None:
        step = source_step(self.state, event)
        log.debug("%s: %s, %s -> %s", self.settings.migration, self.state.value, event.value, step.state.value)
        if why is not None and self._error is None and step.state is SourceState.HERE:
            self._error = why
        if step.state is SourceState.HERE:
            await self._stop_work()
        self.state = step.state
        for action in step.actions:
            try:
                await self._act(action)
            except Exception as error:
                if action in _TOLERATED:
                    # The outcome is decided without it; a restart would come to the same.
                    log.warning("%s: %s: %s", self.settings.migration, action.value, error)
                    continue
                if not isinstance(error, MigratorError | OSError):
                    log.exception("%s: %s", self.settings.migration, action.value)
                lost = isinstance(error, TransportError)
                self._post(SourceEvent.LINK_LOST if lost else SourceEvent.FAILED, error)
                return

    async def _stop_work(self) -> None:
        work, self._work = self._work, None
        if work is not None and not work.done():
            work.cancel()
            await self._copying.stop()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    def _start_work(self, work: Coroutine[Any, Any, None], done: SourceEvent) -> None:
        async def guarded() -> None:
            try:
                await work
            except (MigratorError, OSError) as error:
                lost = isinstance(error, TransportError)
                self._post(SourceEvent.LINK_LOST if lost else SourceEvent.FAILED, error)
            except Exception as error:
                log.exception("%s: unexpected", self.settings.migration)
                self._post(SourceEvent.FAILED, error)
            else:
                self._post(done)

        self._work = asyncio.create_task(guarded(), name=done.value)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # Actions

    async def _act(self, action: SourceAction) -> None:
        migration, a = self.settings.migration, SourceAction
        if action is a.SEND_HELLO:
            await self._peer.greet()
            await self._propose()
        elif action is a.JOURNAL_OPEN:
            # With the cgroup of a container: should we die once its network is shut, that tells whose.
            self._facts = await self._copying.thread.run(self._copying.facts, self._facts)
            self._journal = await self._copying.journal_thread.run(Journal.create, self.settings.journal, self._facts)
        elif action is a.SEND_BEGIN:
            await self._send(m.Begin(migration, self._files.single if self._files is not None else []))
            fault("source.begun")
        elif action is a.COPY:
            self._start_work(self._copy(), SourceEvent.CONVERGED)
        elif action is a.SAVE:
            self._start_work(self._save(), SourceEvent.SAVED)
            self._after(self.settings.freeze_limit, self._too_long_frozen)
        elif action is a.SEND_COMMIT:
            fault("source.ready")
            if self._copying.orphans:
                stay = [m.OrphanedConnection(c.local, c.local_port, c.peer, c.peer_port) for c in self._copying.orphans]
                await self._send(m.Orphans(migration, stay))
            await self._send(m.Commit(migration))
            fault("source.committed")
            self._forwarding = self._spawn(self._forward())
            self._after(_ANSWER_SECONDS, self._no_answer)
        elif action is a.SEND_ASK:
            await self._send(m.Ask(migration))
            self._after(_ANSWER_SECONDS, self._no_answer)
        elif action is a.SEND_DONE:
            await self._send(self._done())
            fault("source.done")
        elif action is a.SEND_ABORT:
            reason = m.text(self._error or "aborted")
            async with asyncio.timeout(_TELL_SECONDS):
                await self._send(m.Abort(migration, reason))
        elif action in (a.JOURNAL_HERE, a.JOURNAL_AWAY, a.JOURNAL_CLOSE):
            await self._record(action)
        elif action is a.THAW:
            await self._copying.thaw()
        elif action is a.RELEASE:
            await self._release()
        elif action is a.RECONNECT:
            if self._reconnecting is None or self._reconnecting.done():
                self._reconnecting = self._spawn(self._ask_again())
        elif action is a.TELL_OPERATOR:
            self._undecided = undecided(self._facts, self._error or "no answer")

    async def _send(self, message: m.AnyMessage) -> None:
        await self._peer.send(message)

    async def _record(self, action: SourceAction) -> None:
        if self._journal is None:
            return
        record = self._journal.record
        run = self._copying.journal_thread.run
        if action is SourceAction.JOURNAL_HERE:
            await run(record, Recorded.HERE, reason=m.text(self._error or "discarded by the destination"))
        elif action is SourceAction.JOURNAL_AWAY:
            fault("source.running")
            await run(record, Recorded.AWAY)
            fault("source.away")
        else:
            await run(record, Recorded.CLOSED)

    async def _propose(self) -> None:
        began = time.monotonic_ns()
        survey = await self._copying.survey()
        self._survey_pids = survey.pids
        self._tasks_there = survey.threads
        self._compared, self._rss = len(survey.files), survey.rss_bytes
        self._factor = downtime_model.load(self.settings.journal)
        # The root of the workload, which need not be ours.
        root = f"/proc/{survey.pids[0]}/root" if survey.pids else ""
        files = await asyncio.to_thread(preflight.with_digests, survey.files, root)
        if self.settings.copy_files:
            self._files = FileSync(
                files,
                self.settings.trees,
                root,
                send=self._peer.send_in_turn,
                tell=self._sent_files,
                pids=self._copying.pids,
            )
        proposal = m.Propose(
            self.settings.migration,
            self._host,
            facts.Survey.of(dataclasses.replace(survey, files=files)),
            self.settings.container,
            self.settings.container_spec,
            self.settings.copy_files,
            self.settings.dry_run,
            self._files.proposed() if self._files is not None else [],
            self.settings.fleet,
            self.settings.token,
        )
        self._phases.append(Phase("survey", began, time.monotonic_ns(), where=Where.SOURCE))
        await self._send(proposal)
        fault("source.proposed")
        self._after(self.settings.timeout, self._timed_out)

    async def _copy(self) -> None:
        settings, copying = self.settings, self._copying
        if settings.bandwidth:
            self._peer.link.set_cap(settings.bandwidth)
        if self._files is not None:
            with self._phase("files"):
                await self._files.send()
        copying.start_pump(lambda error: self._post(SourceEvent.LINK_LOST, error))
        with self._phase("instrument"):
            await copying.instrument()
        while not settings.cold:
            await self._ask_clock()
            if self._files is not None:
                await self._files.step()
            made = await copying.round()
            elapsed = (time.monotonic_ns() - self._began) / 1e9
            weighed = conditions(
                self._peer.link,
                copying.rounds,
                budget=settings.max_downtime,
                elapsed=elapsed,
                timeout=settings.timeout,
                tasks=self._tasks_there,
                factor=self._factor,
                files=self._files.seconds if self._files is not None else 0.0,
            )
            decision = convergence.decide(copying.rounds, weighed)
            self._decision = decision
            self._phases.append(Phase(f"round {made.number}", made.start, made.end, made.bytes, made.pages))
            told = m.Progress(
                facts.Round.of(made),
                min(decision.predicted_downtime, 1e9),
                weighed.throughput,
                decision.verdict.value,
                decision.reason,
            )
            self._tell(round_done(settings.migration, told))
            await self._send(told)
            if decision.verdict is convergence.NextStep.GIVE_UP:
                raise MigrationAborted(
                    decision.reason, hint="the workload runs on; give it a larger --max-downtime or --timeout"
                )
            if decision.verdict is convergence.NextStep.FREEZE:
                break
        if settings.cold:
            await self._ask_clock()
        # Slow things now, so that nothing is left for the time in which the workload stands still.
        self._facts = await copying.thread.run(copying.facts, self._facts)

    async def _save(self) -> None:
        assert self._journal is not None
        self._tell(model.PhaseStarted(self.settings.migration, "freeze", time.monotonic_ns()))
        late = self._files.step if self._files is not None and self._files.goes else None
        await self._copying.save(self._journal, self._facts, late)

    def _sent_files(self, count: int) -> None:
        self._file_bytes += count
        phase = "files" if self.state is SourceState.PRECOPY else "changed files"
        self._tell(model.Transferred(self.settings.migration, phase, self._file_bytes, 0))

    async def _forward(self) -> None:
        with contextlib.suppress(MigratorError, OSError):  # frames may be lost, as on any network
            await self._copying.forward(self._peer.link, self._arrived)

    async def _release(self) -> None:
        if not self._resumed.is_set():  # it may wait for locks that our copy still has
            await self._copying.release()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_RESUME_SECONDS):
                    await self._resumed.wait()
        self._arrived.set()
        self._copying.relax()
        if (ahead := self._copying.ahead) is not None and self._decision is not None:  # it was no time to tell
            known = self._decision.predicted_downtime, self._peer.link.stream_throughput
            self._tell(model.RoundDone(self.settings.migration, ahead, *known, "continue", ""))
        if self._forwarding is not None:
            await self._forwarding
        with self._phase("release"):
            await self._copying.release()
            await self._copying.release_network()
        fault("source.released")
        if self._copying.orphans:
            with self._phase("closed connections"), contextlib.suppress(MigratorError, OSError):
                await self._copying.serve_orphans(self._peer.link)
        # Both hosts are quiet now: the best time to compare their clocks.
        with contextlib.suppress(TimeoutError, MigratorError, OSError):
            async with asyncio.timeout(_CLOCK_LIMIT):
                for _ in range(_CLOCK_SAMPLES):
                    self._clock_answered.clear()
                    await self._ask_clock()
                    await self._clock_answered.wait()

    async def _ask_again(self) -> None:
        """Reach the destination again and post LINK_BACK, or UNREACHABLE."""
        self._lost_at = self._lost_at or time.monotonic()

        def waiting(error: BaseException) -> None:
            self._tell(model.Waiting(self.settings.migration, f"asking {self.settings.peer} again: {error}"))

        failed = await self._peer.reach(self._lost_at + self.settings.ask_for, waiting)
        if failed is None:
            self._post(SourceEvent.LINK_BACK)
        else:
            self._error = failed
            self._post(SourceEvent.UNREACHABLE, failed)

    # Time

    def _after(self, seconds: float, call: Callable[[], None]) -> None:
        async def later() -> None:
            await asyncio.sleep(seconds)
            call()

        self._spawn(later())

    def _timed_out(self) -> None:
        limit = self.settings.timeout
        if self.state is SourceState.PREFLIGHT:
            self._post(SourceEvent.CANCEL, MigrationAborted(f"no verdict within {limit:g} s, the timeout"))
        elif self.state is SourceState.PRECOPY:
            # At its end a round knows the timeout by itself, and whether to freeze or to give up.
            self._after(_ROUND_GRACE, self._round_too_long)

    def _round_too_long(self) -> None:
        if self.state is SourceState.PRECOPY:
            why = f"{self.settings.timeout:g} s, the timeout, have passed in the middle of a round"
            hint = "the link or the other host is slow for this workload: give it a longer --timeout"
            self._post(SourceEvent.CANCEL, MigrationAborted(why, hint=hint))

    def _too_long_frozen(self) -> None:
        if self.state in (SourceState.SAVING, SourceState.SAVING_READY, SourceState.SAVED):
            why = f"the destination was not ready within {self.settings.freeze_limit:g} s of the freeze"
            self._post(SourceEvent.CANCEL, MigrationAborted(why))

    def _no_answer(self) -> None:
        if self.state is SourceState.COMMITTED:
            why = TransportError(f"no answer from {self.settings.peer} within {_ANSWER_SECONDS:g} s")
            self._post(SourceEvent.LINK_LOST, why)

    async def _ask_clock(self) -> None:
        await self._send(m.Clock(time.monotonic_ns()))

    @contextlib.contextmanager
    def _phase(self, name: str) -> Any:
        start = time.monotonic_ns()
        self._tell(model.PhaseStarted(self.settings.migration, name, start))
        try:
            yield
        finally:
            phase = Phase(name, start, time.monotonic_ns(), where=Where.SOURCE)
            self._phases.append(phase)
            self._tell(model.PhaseEnded(self.settings.migration, phase))

    # Messages

    def _broken(self, error: BaseException) -> None:
        self._resumed.set()  # nothing more will be heard of it
        wrong = isinstance(error, m.MessageError)
        self._post(SourceEvent.PROTOCOL_ERROR if wrong else SourceEvent.LINK_LOST, error)

    def _heard(self, message: m.AnyMessage) -> None:
        about = getattr(message, "migration", self.settings.migration)
        if about != self.settings.migration:
            raise m.MessageError(f"a {type(message).__name__} about another migration, {about}")
        if isinstance(message, m.Ready):
            self._post(SourceEvent.READY)
        elif isinstance(message, m.Running):
            if self._running is None or self._running.waits:
                self._running = message
            if not message.waits:
                self._resumed.set()
            self._post(SourceEvent.RUNNING)
        elif isinstance(message, m.Discarded):
            self._post(SourceEvent.DISCARDED, MigrationAborted(f"{self._peer.link.peer}: {message.reason}"))
        elif isinstance(message, m.Verdict):
            self._judge(message)
        elif isinstance(message, m.Standing):
            self._copying.stands(message.round)
        elif isinstance(message, m.Clock):
            self._clock.sample(message.asked, message.answered, time.monotonic_ns())
            self._clock_answered.set()
        elif isinstance(message, m.DestinationReport):
            if self._destination_report is not None and not self._destination_report.done():
                self._destination_report.set_result(message)
        elif isinstance(message, m.FilesSync | trees.TreeAnswer) and self._files is not None:
            self._files.heard(message)
        elif isinstance(message, m.Failure):
            error = MigrationAborted(f"{self._peer.link.peer}: {message.reason}", hint=message.hint)
            self._post(SourceEvent.FAILED, error)
        elif isinstance(message, m.Hello):
            m.common_version(message.versions)
        else:
            raise m.MessageError(f"a {type(message).__name__} is not for a source")

    def _judge(self, verdict: m.Verdict) -> None:
        if self.state is not SourceState.PREFLIGHT or self.report is not None:
            raise m.MessageError("a verdict that was not asked for")
        if self._files is not None:
            self._files.check_wanted(verdict.wanted)
        elif verdict.wanted:
            raise m.MessageError("files are wanted that were not offered")
        weighed = conditions(
            self._peer.link, [], budget=None, elapsed=0, timeout=0, tasks=self._tasks_there, factor=self._factor
        )
        self.report = preflight.PreflightReport(
            self.settings.migration,
            self._host,
            verdict.destination,
            verdict.reasons,
            self._compared,
            self._rss,
            weighed.freeze + weighed.restore + convergence.ROUND_TRIPS * weighed.rtt,
        )
        if not self.report.ok:
            reasons = [str(reason) for reason in verdict.reasons if reason.blocking]
            self._post(SourceEvent.FAILED, Refused(reasons, fate=Fate.SOURCE))
        else:
            self._work = self._spawn(self._weigh(verdict))

    async def _weigh(self, verdict: m.Verdict) -> None:
        """Compare what is carried along, and go on."""
        try:
            if self._files is not None:
                assert self.report is not None
                notes = (await self._files.compare(verdict.wanted)).reasons(verdict.destination.host)
                self.report = msgspec.structs.replace(self.report, reasons=[*self.report.reasons, *notes])
                for note in notes if not self.settings.dry_run else []:  # a dry run ends with them
                    self._tell(model.Noted(self.settings.migration, str(note)))
        except (MigratorError, OSError) as error:
            lost = isinstance(error, TransportError) and not isinstance(error, m.MessageError)
            self._post(SourceEvent.LINK_LOST if lost else SourceEvent.FAILED, error)
        else:
            self._post(SourceEvent.CANCEL if self.settings.dry_run else SourceEvent.ACCEPTED)

    # The end

    def _summary(self, told: m.DestinationReport | None) -> MigrationSummary:
        return MigrationSummary(
            settings=self.settings,
            host=self._host,
            report=self.report,
            copying=self._copying,
            link=self._peer.link,
            began=self._began,
            phases=self._phases,
            clock=self._clock,
            running=self._running,
            told=told,
            decision=self._decision,
            pids=self._survey_pids,
        )

    def _done(self) -> m.Done:
        summary = self._summary(None)
        return m.Done(
            self.settings.migration,
            summary.timeline().downtime,
            summary.stream_bytes,
            summary.wire_bytes,
            summary.compression_ratio,
        )

    async def _result(self) -> model.MigrationResult:
        told: m.DestinationReport | None = None
        if self.state is SourceState.AWAY and self._destination_report is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_TELL_SECONDS):
                    told = await asyncio.shield(self._destination_report)
        why = str(self._undecided or self._error or "")
        result = self._summary(told).result(*self._ended(), why)
        downtime_model.learn(self.settings.journal, self._tasks_there, result)
        return result

    def _ended(self) -> tuple[Outcome, Fate]:
        away = self.state is SourceState.AWAY
        return how_it_ended(self._undecided or self._error, away=away, dry_run=self.settings.dry_run)

    def _failure(self) -> BaseException:
        error = self._undecided or self._error or MigrationAborted("discarded by the destination")
        if isinstance(error, MigratorError):
            _, error.fate = self._ended()
            return error
        return MigrationAborted(f"{type(error).__name__}: {error}")

    async def _close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(BaseException):
                await task
        if self._files is not None:
            await self._files.close()
        await self._copying.close()
        if self._journal is not None:
            self._journal.close()
        await self._peer.close()


_TOLERATED = frozenset(
    {
        SourceAction.JOURNAL_HERE,
        SourceAction.JOURNAL_AWAY,
        SourceAction.JOURNAL_CLOSE,
        SourceAction.SEND_ABORT,
        SourceAction.SEND_DONE,
    }
)
__all__ = ["SourceSession", "SourceSettings"]
