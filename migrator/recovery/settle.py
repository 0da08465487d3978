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
from dataclasses import dataclass, field
from pathlib import Path

from migrator.errors import Fate, MigratorError, Undecided, UsageError
from migrator.linux import procfs
from migrator.linux.cgroup import remove_empty
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
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id, forget_old, unattended
from migrator.session.interfaces import Groups, NoSurroundings, Surroundings, open_group

log = logging.getLogger("migrator.session")

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


@dataclass(frozen=True)
class Tools:
    """What settling acts with."""

    groups: Groups = open_group
    surroundings: Surroundings = field(default_factory=NoSurroundings)


def thaw(facts: JournalHeader, tools: Tools) -> bool:
    """Let the tasks of a journal run, where they came from; False if there are none any more."""
    if not same_boot(facts):
        return False
    if not facts.cgroup:
        # It was not frozen by a cgroup yet, but its network may have been shut already.
        tools.surroundings.reopen(facts)
        return False
    group = tools.groups(facts.cgroup)
    if group is None or not _ours(facts, group.pids()):
        # The agent may have died before it moved the first of them: then they run, where they were.
        there = bool(facts.homes) and _ours(facts, [pid for pid, _ in facts.pids])
        if there and group is not None and not group.pids():
            group.remove()
        return there
    tools.surroundings.reopen(facts)
    group.thaw()
    if facts.homes:
        group.send_home(dict(facts.homes))
    return True


def kill(facts: JournalHeader, tools: Tools) -> None:
    """Kill the tasks of a journal, frozen or not, and take down what stood around them."""
    group = tools.groups(facts.cgroup) if same_boot(facts) else None
    if group is not None and _ours(facts, group.pids()):
        group.kill()
    tools.surroundings.remove(facts)
    # What stood around them may have taken the cgroup along.
    with contextlib.suppress(FileNotFoundError):
        if group is not None and not group.pids():
            group.remove()
            remove_empty({home for _, home in facts.homes})


def same_boot(facts: JournalHeader) -> bool:
    """Whether the tasks of a journal can still exist."""
    return not facts.boot_id or facts.boot_id == boot_id()


def _ours(facts: JournalHeader, pids: list[int]) -> bool:
    """Whether a cgroup holds the tasks that the journal is about, and not others that came later."""
    if not facts.pids:
        return True
    for pid, started in facts.pids:
        try:
            if pid in pids and (not started or procfs.start_time(pid) == started):
                return True
        except (FileNotFoundError, ProcessLookupError):
            continue
    return False


def settle_destination(journal: Journal, tools: Tools, *, reason: str = "") -> Recorded:
    """Finish a destination's journal that we hold the lock of; returns its decision, RUNNING or DISCARDED."""
    found = journal.state
    if found not in DESTINATION_RECOVERY:
        assert journal.decision is not None  # closed
        return journal.decision
    state, actions = DESTINATION_RECOVERY[found]
    todo = list(actions)
    while todo:
        action = todo.pop(0)
        if action is DestinationAction.DECIDE_DISCARDED:
            why = reason or "the agent that built the copy ended before it was to run"
            decided = journal.decide(Recorded.DISCARDED, reason=why)
            event = DestinationEvent.DECIDED_DISCARDED
            if decided is Recorded.RUNNING:
                event = DestinationEvent.DECIDED_RUNNING
            assert state is DestinationState.DECIDING
            state, actions = destination_step(state, event)
            todo = list(actions)
        elif action is DestinationAction.TAKE_LOCKS:
            if waits := waiting_locks(journal.facts, tools):
                log.debug("migration %s: the copy stays frozen until it has %s", journal.facts.migration, waits)
                break  # it is decided all the same, and whoever settles next goes on
        elif action is DestinationAction.RESUME:
            if not thaw(journal.facts, tools):
                log.warning("migration %s: the copy that was to run is gone", journal.facts.migration)
        elif action is DestinationAction.DISCARD:
            kill(journal.facts, tools)
        elif action is DestinationAction.JOURNAL_RESUMED:
            journal.record(Recorded.RESUMED)
        elif action is DestinationAction.JOURNAL_CLOSE:
            journal.record(Recorded.CLOSED)
        # Nobody to send to: whoever wants to know asks.
    assert journal.decision is not None
    return journal.decision


def waiting_locks(facts: JournalHeader, tools: Tools, seconds: float = _LOCK_SECONDS) -> str:
    """Take the locks of a copy that is to run; "" once it has them all, else what it waits for."""
    if not same_boot(facts):
        return ""
    return ", ".join(tools.surroundings.take_locks(facts, seconds))


async def settle_source(journal: Journal, tools: Tools, ask: AskPeer) -> Fate:
    """Finish a source's journal that we hold the lock of; returns where the workload is.

    Raises Undecided, with the workload frozen as it was, if the destination cannot be asked.
    """
    found = journal.state
    if found not in SOURCE_RECOVERY:
        return Fate.DESTINATION if _went_away(journal) else Fate.SOURCE
    facts = journal.facts
    state, actions = SOURCE_RECOVERY[found]
    todo = list(actions)
    while todo:
        action = todo.pop(0)
        if action is SourceAction.RECONNECT:
            assert state is SourceState.COMMITTED
            try:
                answer = await ask(facts)
            except (MigratorError, OSError) as error:
                raise undecided(facts, error) from error
            event = SourceEvent.RUNNING if answer is Recorded.RUNNING else SourceEvent.DISCARDED
            state, actions = source_step(state, event)
            todo = list(actions)
        else:
            # Not on the event loop: taking down a network may want one of its own.
            await asyncio.to_thread(_act_for_source, action, journal, facts, tools)
    return Fate.DESTINATION if state is SourceState.AWAY else Fate.SOURCE


def _act_for_source(action: SourceAction, journal: Journal, facts: JournalHeader, tools: Tools) -> None:
    if action is SourceAction.JOURNAL_HERE:
        journal.record(Recorded.HERE, reason="settled after the agent ended")
    elif action is SourceAction.JOURNAL_AWAY:
        journal.record(Recorded.AWAY)
    elif action is SourceAction.JOURNAL_CLOSE:
        journal.record(Recorded.CLOSED)
    elif action is SourceAction.THAW:
        if not thaw(facts, tools) and facts.cgroup:
            why = "" if same_boot(facts) else ": this host has been rebooted"
            log.warning("migration %s: the workload is gone%s", facts.migration, why)
    elif action is SourceAction.RELEASE:
        kill(facts, tools)


def _went_away(journal: Journal) -> bool:
    return any(record.state is Recorded.AWAY for record in journal.records)


def undecided(facts: JournalHeader, why: object) -> Undecided:
    """The message for an operator who has to decide if nobody else can."""
    decide = f"`migrator settle {facts.migration}"
    return Undecided(
        f"migration {facts.migration}: {facts.peer or 'the destination'} was told to run the workload and "
        f"cannot be asked whether it does ({why}). The copy here ({_tasks(facts)}) stays frozen until it can",
        hint="restore the connection and run `migrator settle`. Only if that host is gone for good, or its "
        f"copy certainly does not run: {decide} --here`. If it runs there: {decide} --away`",
    )


def _tasks(facts: JournalHeader) -> str:
    if facts.container:
        return f"container {facts.container}"
    return f"pid {facts.pids[0][0]} and its tree" if facts.pids else f"cgroup {facts.cgroup}"


async def settle_all(directory: Path, tools: Tools, ask: AskPeer) -> list[Settlement]:
    """Settle every journal that no living agent attends to. Never raises for one of them: see the fates."""
    made = []
    forget_old(directory, now=time.time())
    for journal in unattended(directory):
        with journal:
            facts = journal.facts
            try:
                if facts.role is Role.DESTINATION:
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
                    detail = fate.value if facts.peer or fate is Fate.SOURCE else journal.reason
            except Undecided as error:
                fate, detail = Fate.FROZEN, f"{error.message}. {error.hint}"
            except Exception as error:
                if not isinstance(error, MigratorError | OSError):
                    log.exception("migration %s: unexpected", facts.migration)
                fate, detail = Fate.FROZEN, f"could not be settled: {error}"
            log.info("settled migration %s as its %s: %s", facts.migration, facts.role.value, detail)
            made.append(Settlement(facts.migration, facts.role, fate, detail))
    return made


def answer(directory: Path, migration: str, tools: Tools) -> AnyMessage:
    """Answer an `Ask`: the destination's decision, which is made now if it was not made before.

    For a migration that this host knows nothing of, DISCARDED is recorded: a COMMIT that is still on its
    way would then find that. Where another living agent attends to the journal, we share only the decision
    with it, and it acts on it.
    """
    reason = "the source asked before the copy was to run"
    journal = Journal.find(directory, migration, Role.DESTINATION)
    if journal is None:
        facts = JournalHeader(migration=migration, role=Role.DESTINATION, boot_id=boot_id(), started_at=time.time())
        with Journal.create(directory, facts, reason="asked about, never begun") as journal:
            decision = journal.decide(Recorded.DISCARDED, reason=reason)
            journal.record(Recorded.CLOSED)
            reason = "this host knows nothing of it"
    else:
        with journal:
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
            _act_for_source(action, journal, journal.facts, tools)
    return Fate.SOURCE if here else Fate.DESTINATION
