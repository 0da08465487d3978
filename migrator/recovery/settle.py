"""What an agent does with a migration that another one left unfinished, and what it answers about it.

Before anything new is begun, every agent settles what it finds: `settle_all()`. A source whose journal says
COMMITTING cannot decide alone; it asks the destination, and while that does not answer the copy stays frozen
and `Undecided` says what an operator can do. All of it can be done again if it is interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from migrator.errors import Fate, MigratorError, Undecided, UsageError
from migrator.linux import procfs
from migrator.linux.cgroup import remove_empty
from migrator.protocol.machine import Machine
from migrator.protocol.messages import AnyMessage, Discarded, Running
from migrator.protocol.states import (
    DESTINATION_RECOVERY,
    SOURCE_RECOVERY,
    DestinationAction,
    DestinationEvent,
    DestinationState,
    Recorded,
    SourceAction,
    SourceEvent,
    SourceState,
    destination_step,
    source_step,
)
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id, unattended
from migrator.recovery.retention import check_asker, forget_old, make_room

log = logging.getLogger("migrator.recovery")

_LOCK_SECONDS = 0.05

# Asks the destination of a migration for its decision; raises TransportError where it cannot be reached.
AskPeer = Callable[[JournalHeader], Awaitable[Recorded]]


@dataclass(frozen=True)
class Settlement:
    """What became of one unfinished migration."""

    migration: str
    role: Role
    fate: Fate
    detail: str


def thaw(header: JournalHeader, tools: Tools) -> bool:
    """Let the tasks of a journal run, where they came from; False if there are none any more."""
    if not same_boot(header):
        return False
    if not header.cgroup:
        # It was not frozen by a cgroup yet, but its network may have been shut already.
        tools.hooks.reopen(header)
        return False
    group = tools.groups(header.cgroup)
    if group is None or not _ours(header, group.pids()):
        # The agent may have died before it moved the first of them: then they run, where they were.
        there = bool(header.origins) and _ours(header, [pid for pid, _ in header.pids])
        if there and group is not None and not group.pids():
            group.remove()
        return there
    tools.hooks.reopen(header)
    group.thaw()
    if header.origins:
        group.move_back(dict(header.origins))
    return True


def kill(header: JournalHeader, tools: Tools) -> None:
    """Kill the tasks of a journal, frozen or not, and take down what stood around them."""
    group = tools.groups(header.cgroup) if same_boot(header) else None
    if group is not None and _ours(header, group.pids()):
        group.kill()
    tools.hooks.remove(header)
    # What stood around them may have taken the cgroup along.
    with contextlib.suppress(FileNotFoundError):
        if group is not None and not group.pids():
            group.remove()
            remove_empty({origin for _, origin in header.origins})


def same_boot(header: JournalHeader) -> bool:
    """Whether the tasks of a journal can still exist."""
    return not header.boot_id or header.boot_id == boot_id()


def _ours(header: JournalHeader, pids: list[int]) -> bool:
    """Whether a cgroup holds the tasks that the journal is about, and not others that came later."""
    if not header.pids:
        return True
    for pid, started in header.pids:
        try:
            if pid in pids and (not started or procfs.start_time(pid) == started):
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def settle_destination(journal: Journal, tools: Tools, *, reason: str = "") -> Recorded:
    """Finish a destination's journal that we hold the lock of; returns its decision, RUNNING or DISCARDED."""
    machine = Machine(destination_step, DestinationState.START)
    if (step := DESTINATION_RECOVERY.get(journal.state)) is not None:
        machine.follow(step)
    for action in machine:
        if action is DestinationAction.TAKE_LOCKS:
            if waits := waiting_locks(journal.header, tools):
                log.debug("migration %s: the copy stays frozen until it has %s", journal.header.migration, waits)
                break  # it is decided all the same, and whoever settles next goes on
            if machine.state is DestinationState.LOCKING:
                machine.take(DestinationEvent.LOCKED)
        elif (decided := _act_for_destination(action, journal, tools, reason)) is not None:
            machine.take(decided)
    assert journal.decision is not None
    return journal.decision


def _act_for_destination(
    action: DestinationAction, journal: Journal, tools: Tools, reason: str
) -> DestinationEvent | None:
    a = DestinationAction
    if action is a.DECIDE_DISCARDED:
        why = reason or "the agent that built the copy ended before it was to run"
        if journal.decide(Recorded.DISCARDED, reason=why) is Recorded.DISCARDED:
            return DestinationEvent.DECIDED_DISCARDED
        return DestinationEvent.DECIDED_LOCKING if journal.header.locks else DestinationEvent.DECIDED_RUNNING
    if action is a.RESUME:
        if not thaw(journal.header, tools):
            log.warning("migration %s: the copy that was to run is gone", journal.header.migration)
    elif action is a.DISCARD:
        kill(journal.header, tools)
    elif action is a.JOURNAL_RESUMED:
        journal.record(Recorded.RESUMED)
    elif action is a.JOURNAL_CLOSE:
        journal.record(Recorded.CLOSED)
    # There is no link to send on: a source that needs the answer asks for it.
    return None


def waiting_locks(header: JournalHeader, tools: Tools, seconds: float = _LOCK_SECONDS) -> str:
    """Take the locks of a copy that is to run; "" once it has them all, else what it waits for."""
    if not same_boot(header):
        return ""
    return ", ".join(tools.hooks.take_locks(header, seconds))


async def settle_source(journal: Journal, tools: Tools, ask: AskPeer) -> Fate:
    """Finish a source's journal that we hold the lock of; returns where the workload is.

    Raises Undecided, with the workload frozen as it was, if the destination cannot be asked.
    """
    step = SOURCE_RECOVERY.get(journal.state)
    if step is None:
        return Fate.DESTINATION if _went_away(journal) else Fate.SOURCE
    header = journal.header
    machine = Machine(source_step, SourceState.START)
    machine.follow(step)
    for action in machine:
        if action is SourceAction.RECONNECT:
            machine.take(await _ask(ask, header))
        else:
            # Not on the event loop: taking down a network may want one of its own.
            await asyncio.to_thread(_act_for_source, action, journal, header, tools)
    return Fate.DESTINATION if machine.state is SourceState.AWAY else Fate.SOURCE


async def _ask(ask: AskPeer, header: JournalHeader) -> SourceEvent:
    try:
        answer = await ask(header)
    except (MigratorError, OSError) as error:
        raise undecided(header, error) from error
    return SourceEvent.RUNNING if answer is Recorded.RUNNING else SourceEvent.DISCARDED


def _act_for_source(action: SourceAction, journal: Journal, header: JournalHeader, tools: Tools) -> None:
    a = SourceAction
    if action is a.JOURNAL_HERE:
        journal.record(Recorded.HERE, reason="settled after the agent ended")
    elif action is a.JOURNAL_AWAY:
        journal.record(Recorded.AWAY)
    elif action is a.JOURNAL_CLOSE:
        journal.record(Recorded.CLOSED)
    elif action is a.THAW:
        if not thaw(header, tools) and header.cgroup:
            why = "" if same_boot(header) else ": this host has been rebooted"
            log.warning("migration %s: the workload is gone%s", header.migration, why)
    elif action is a.RELEASE:
        kill(header, tools)


def _went_away(journal: Journal) -> bool:
    return any(record.state is Recorded.AWAY for record in journal.records)


def undecided(header: JournalHeader, why: object) -> Undecided:
    """The message for an operator who has to decide if nobody else can."""
    decide = f"`migrator settle {header.migration}"
    return Undecided(
        f"migration {header.migration}: {header.peer or 'the destination'} was told to run the workload and "
        f"cannot be asked whether it does ({why}). The copy here ({_tasks(header)}) stays frozen until it can",
        hint="restore the connection and run `migrator settle`. Only if that host is gone for good, or its "
        f"copy certainly does not run: {decide} --here`. If it runs there: {decide} --away`",
    )


def _tasks(header: JournalHeader) -> str:
    if header.container:
        return f"container {header.container}"
    return f"pid {header.pids[0][0]} and its tree" if header.pids else f"cgroup {header.cgroup}"


async def settle_all(directory: Path, tools: Tools, ask: AskPeer) -> list[Settlement]:
    """Settle every journal that no living agent attends to. Never raises for one of them: see the fates."""
    made = []
    forget_old(directory, now=time.time())
    for journal in unattended(directory):
        with journal:
            header = journal.header
            try:
                if header.role is Role.DESTINATION:
                    decided = await asyncio.to_thread(settle_destination, journal, tools)
                    running = decided is Recorded.RUNNING
                    fate = Fate.DESTINATION if running else Fate.SOURCE
                    detail = "the copy runs here" if running else "the copy here was discarded"
                    if running and not journal.settled:
                        fate = Fate.FROZEN
                        detail = "the copy is to run here; files that it has locked are still locked by the source"
                else:
                    fate = await settle_source(journal, tools, ask)
                    # without a peer it was no migration: saved by `checkpoint --kill`
                    detail = fate.value if header.peer or fate is Fate.SOURCE else journal.reason
            except Undecided as error:
                fate, detail = Fate.FROZEN, f"{error.message}. {error.hint}"
            except Exception as error:
                if not isinstance(error, MigratorError | OSError):
                    log.exception("migration %s: unexpected", header.migration)
                fate, detail = Fate.FROZEN, f"could not be settled: {error}"
            log.info("settled migration %s as its %s: %s", header.migration, header.role.value, detail)
            made.append(Settlement(header.migration, header.role, fate, detail))
    return made


def answer(directory: Path, migration: str, tools: Tools, key: str = "") -> AnyMessage:
    """Answer an `Ask` of a peer that has logged in with `key`: the destination's decision, which is made now if it was
    not made before. Raises JournalError for a migration of another peer, and then decides nothing.

    For a migration that this host knows nothing of, DISCARDED is recorded: a COMMIT that is still on its
    way would then find that. Where another living agent attends to the journal, we share only the decision
    with it, and it acts on it.
    """
    reason = "the source asked before the copy was to run"
    journal = Journal.find(directory, migration, Role.DESTINATION)
    if journal is None:
        make_room(directory, key)
        header = JournalHeader(
            migration=migration, role=Role.DESTINATION, key=key, boot_id=boot_id(), started_at=time.time()
        )
        with Journal.create(directory, header, reason="asked about, never begun") as journal:
            decision = journal.decide(Recorded.DISCARDED, reason=reason)
            journal.record(Recorded.CLOSED)
            reason = "this host knows nothing of it"
    else:
        with journal:
            check_asker(journal, key)
            if not journal.settled and journal.try_lock():
                decision = settle_destination(journal, tools, reason=reason)
            else:
                decision = journal.decide(Recorded.DISCARDED, reason=reason)
            reason = journal.reason
    if decision is Recorded.RUNNING:
        return Running(migration)
    return Discarded(migration, reason)


def override(directory: Path, migration: str, *, here: bool, tools: Tools) -> Fate:
    """An operator decides for a source that stays frozen. Raises UsageError where there is nothing to decide.

    `here` lets it run on this host, and asserts that the destination's copy does not and will not run;
    otherwise it is killed here, and asserts that the destination's copy runs.
    """
    journal = Journal.find(directory, migration, Role.SOURCE)
    if journal is None:
        raise UsageError(f"this host was never the source of a migration {migration}")
    with journal:
        if not journal.try_lock():
            raise UsageError(f"migration {migration} is being attended to", hint="end that program first")
        if journal.state is not Recorded.COMMITTING:
            raise UsageError(f"migration {migration} awaits no decision: it is {journal.state.value}")
        event = SourceEvent.DISCARDED if here else SourceEvent.RUNNING
        for action in source_step(SourceState.COMMITTED, event).actions:
            _act_for_source(action, journal, journal.header, tools)
    return Fate.SOURCE if here else Fate.DESTINATION
