"""The protocol of a migration as two tables: (state, event) -> (state, actions). No I/O, no time.

The promise (docs/safety.md): at every instant at most one copy can run, and after any single failure
exactly one does, or the source copy is frozen and an operator is told what to decide. It rests on three
rules that the tables below keep, and that `tests/unit/test_protocol_exploration.py` checks for every
order, loss and repetition of messages and a crash of either side between any two actions:

1. Until the source sends COMMIT, the source decides. It never sends COMMIT after it has recorded HERE,
   and it has recorded COMMITTING before COMMIT: then a source that starts again asks instead of thawing.
2. From then on the journal of the destination decides, once: RUNNING or DISCARDED, the first record wins.
   The destination says DISCARDED to nobody before that is recorded; that includes migrations that it has
   never heard of.
3. The source copy dies only after the destination has said RUNNING; the destination's copy runs only after
   RUNNING is recorded; whatever is frozen at that time is frozen by its cgroup and survives every agent.

A copy that has locks on files which both hosts share (LOCKING) runs only when it has them: after the source
copy, which has them until then, was killed. So RUNNING is said first, and the locks are taken then.

Actions of one step are done in order, and each is finished before the next begins: a journal record is
durable before the act that it announces. `COPY`, `SAVE` and `BUILD` take long, run beside the rest, and
end with an event; any later step that has actions stops them first. But BUILT comes when nothing is left that
could be refused, and the holding of the copy goes on beside READY and its answer: `DECIDE_RUNNING` waits for
it, and where it has failed, decides DISCARDED.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final, Generic, NamedTuple, TypeVar


class SourceState(enum.Enum):
    START = "start"
    PREFLIGHT = "preflight"  # hosts compare each other
    PRECOPY = "pre-copy"  # rounds are sent while the workload runs
    SAVING = "saving"  # freezing; the last state is on its way
    SAVING_READY = "saving, destination ready"
    SAVED = "saved"  # frozen by cgroup, all sent; the destination is not ready yet
    COMMITTED = "committed"  # COMMIT may have been sent: frozen until the destination's decision is known
    AWAY = "away"  # decided: it runs on the destination
    HERE = "here"  # decided: it runs on the source


class SourceEvent(enum.Enum):
    BEGIN = "begin"
    ACCEPTED = "accepted"  # by both preflight checks
    CONVERGED = "converged"  # time to freeze
    SAVED = "saved"  # the image is sent whole, the tasks are held by their cgroup, COMMITTING is durable
    CANCEL = "cancel"  # by a person, or by --timeout
    FAILED = "failed"  # something on this host did not work
    LINK_LOST = "link lost"
    LINK_BACK = "link back"
    UNREACHABLE = "unreachable"  # tried long enough to reach the destination
    PROTOCOL_ERROR = "protocol error"
    # messages of the destination
    READY = "ready"
    RUNNING = "running"
    DISCARDED = "discarded"


class SourceAction(enum.Enum):
    SEND_HELLO = "send hello"
    JOURNAL_OPEN = "journal: open"
    SEND_BEGIN = "send begin"
    COPY = "pre-copy rounds"  # ends with CONVERGED
    SAVE = "freeze, save and hold"  # records COMMITTING meanwhile; ends with SAVED
    SEND_COMMIT = "send commit"
    SEND_ASK = "send ask"
    SEND_DONE = "send done"
    SEND_ABORT = "send abort"
    JOURNAL_HERE = "journal: here"
    JOURNAL_AWAY = "journal: away"
    JOURNAL_CLOSE = "journal: closed"
    THAW = "thaw"
    RELEASE = "kill the frozen copy"
    RECONNECT = "reconnect"  # ends with LINK_BACK or UNREACHABLE
    TELL_OPERATOR = "tell the operator"


class DestinationState(enum.Enum):
    START = "start"
    PREFLIGHT = "preflight"
    BUILDING = "building"
    READY = "ready"  # built; held by its cgroup, or about to be
    DECIDING = "deciding"  # writing the decision; its outcome is the next event
    LOCKING = "locking"  # decided that it runs; frozen until it has the locks that the source copy had
    RUNNING = "running"  # decided
    DISCARDED = "discarded"  # decided
    ENDED = "ended"  # nothing was begun


class DestinationEvent(enum.Enum):
    BUILT = "built"  # about to be held by its cgroup
    CANCEL = "cancel"
    FAILED = "failed"
    LINK_LOST = "link lost"
    PROTOCOL_ERROR = "protocol error"
    DECIDED_RUNNING = "decided: running"
    DECIDED_LOCKING = "decided: running, once its locks are taken"
    DECIDED_DISCARDED = "decided: discarded"
    LOCKED = "locks taken"
    # messages of the source
    HELLO = "hello"
    BEGIN = "begin"
    COMMIT = "commit"
    ABORT = "abort"
    ASK = "ask"
    DONE = "done"


class DestinationAction(enum.Enum):
    SEND_VERDICT = "send verdict"
    JOURNAL_OPEN = "journal: open"
    BUILD = "build and hold"  # says BUILT between the two
    SEND_READY = "send ready"
    DECIDE_RUNNING = "once held, journal: running, unless already decided"
    DECIDE_DISCARDED = "journal: discarded, unless already decided"
    TAKE_LOCKS = "take the locks that the source copy had, if any"  # in LOCKING it goes on, and ends with LOCKED
    RESUME = "resume"
    JOURNAL_RESUMED = "journal: resumed"
    DISCARD = "kill what was built"
    SEND_RUNNING = "send running"
    SEND_DISCARDED = "send discarded"
    JOURNAL_CLOSE = "journal: closed"
    TELL_OPERATOR = "tell the operator"


State = TypeVar("State", bound=enum.Enum)
Event = TypeVar("Event", bound=enum.Enum)
Action = TypeVar("Action", bound=enum.Enum)


class Step(NamedTuple, Generic[State, Action]):
    state: State
    actions: tuple[Action, ...]


SourceStep = Step[SourceState, SourceAction]
DestinationStep = Step[DestinationState, DestinationAction]


def _source_table() -> dict[tuple[SourceState, SourceEvent], SourceStep]:
    s, e, a = SourceState, SourceEvent, SourceAction
    give_up = (a.JOURNAL_HERE, a.THAW, a.SEND_ABORT, a.JOURNAL_CLOSE)
    table: dict[tuple[SourceState, SourceEvent], SourceStep] = {
        (s.START, e.BEGIN): Step(s.PREFLIGHT, (a.SEND_HELLO,)),
        (s.PREFLIGHT, e.ACCEPTED): Step(s.PRECOPY, (a.JOURNAL_OPEN, a.SEND_BEGIN, a.COPY)),
        (s.PRECOPY, e.CONVERGED): Step(s.SAVING, (a.SAVE,)),
        # The last READY may overtake our own hold().
        (s.SAVING, e.READY): Step(s.SAVING_READY, ()),
        (s.SAVING, e.SAVED): Step(s.SAVED, ()),
        (s.SAVING_READY, e.SAVED): Step(s.COMMITTED, (a.SEND_COMMIT,)),
        (s.SAVED, e.READY): Step(s.COMMITTED, (a.SEND_COMMIT,)),
        # Nothing but the destination's word ends this state.
        (s.COMMITTED, e.RUNNING): Step(s.AWAY, (a.JOURNAL_AWAY, a.RELEASE, a.SEND_DONE, a.JOURNAL_CLOSE)),
        (s.COMMITTED, e.DISCARDED): Step(s.HERE, (a.JOURNAL_HERE, a.THAW, a.JOURNAL_CLOSE)),
        (s.COMMITTED, e.READY): Step(s.COMMITTED, ()),  # a late one
        (s.COMMITTED, e.LINK_LOST): Step(s.COMMITTED, (a.RECONNECT,)),
        (s.COMMITTED, e.PROTOCOL_ERROR): Step(s.COMMITTED, (a.RECONNECT,)),
        (s.COMMITTED, e.FAILED): Step(s.COMMITTED, (a.RECONNECT,)),
        (s.COMMITTED, e.LINK_BACK): Step(s.COMMITTED, (a.SEND_ASK,)),
        (s.COMMITTED, e.CANCEL): Step(s.COMMITTED, ()),  # too late: the driver says so and waits
        (s.COMMITTED, e.UNREACHABLE): Step(s.COMMITTED, (a.TELL_OPERATOR,)),
        # Whoever repeats an answer has not heard that it was heard.
        (s.AWAY, e.RUNNING): Step(s.AWAY, (a.SEND_DONE,)),
    }
    for event in (e.CANCEL, e.FAILED, e.LINK_LOST, e.PROTOCOL_ERROR, e.DISCARDED):
        table[s.START, event] = Step(s.HERE, ())
        table[s.PREFLIGHT, event] = Step(s.HERE, (a.SEND_ABORT,))
        for state in (s.PRECOPY, s.SAVING, s.SAVING_READY, s.SAVED):
            table[state, event] = Step(s.HERE, give_up)
    # After the end there is nothing left to break.
    for state in (s.AWAY, s.HERE):
        for event in (e.CANCEL, e.FAILED, e.LINK_LOST, e.PROTOCOL_ERROR, e.UNREACHABLE, e.READY):
            table[state, event] = Step(state, ())
    table[s.HERE, e.DISCARDED] = Step(s.HERE, ())
    return table


def _destination_table() -> dict[tuple[DestinationState, DestinationEvent], DestinationStep]:
    s, e, a = DestinationState, DestinationEvent, DestinationAction
    refuse = Step(s.DECIDING, (a.DECIDE_DISCARDED,))
    table: dict[tuple[DestinationState, DestinationEvent], DestinationStep] = {
        (s.START, e.HELLO): Step(s.PREFLIGHT, (a.SEND_VERDICT,)),
        (s.PREFLIGHT, e.BEGIN): Step(s.BUILDING, (a.JOURNAL_OPEN, a.BUILD)),
        (s.BUILDING, e.BUILT): Step(s.READY, (a.SEND_READY,)),
        (s.READY, e.COMMIT): Step(s.DECIDING, (a.DECIDE_RUNNING,)),
        (s.DECIDING, e.DECIDED_RUNNING): Step(s.RUNNING, (a.RESUME, a.SEND_RUNNING, a.JOURNAL_RESUMED)),
        (s.DECIDING, e.DECIDED_LOCKING): Step(s.LOCKING, (a.SEND_RUNNING, a.TAKE_LOCKS)),
        # Said again: it is only now known since when it runs.
        (s.LOCKING, e.LOCKED): Step(s.RUNNING, (a.RESUME, a.SEND_RUNNING, a.JOURNAL_RESUMED)),
        (s.LOCKING, e.COMMIT): Step(s.LOCKING, (a.SEND_RUNNING,)),
        (s.LOCKING, e.ASK): Step(s.LOCKING, (a.SEND_RUNNING,)),
        (s.LOCKING, e.ABORT): Step(s.LOCKING, (a.SEND_RUNNING,)),
        (s.LOCKING, e.DONE): Step(s.LOCKING, ()),  # said again in answer to the second RUNNING
        (s.LOCKING, e.FAILED): Step(s.LOCKING, (a.TELL_OPERATOR,)),  # the locks cannot be taken in the copy
        (s.DECIDING, e.DECIDED_DISCARDED): Step(s.DISCARDED, (a.SEND_DISCARDED, a.DISCARD, a.JOURNAL_CLOSE)),
        (s.RUNNING, e.COMMIT): Step(s.RUNNING, (a.SEND_RUNNING,)),
        (s.RUNNING, e.ASK): Step(s.RUNNING, (a.SEND_RUNNING,)),
        (s.RUNNING, e.ABORT): Step(s.RUNNING, (a.SEND_RUNNING,)),
        (s.RUNNING, e.DONE): Step(s.RUNNING, (a.JOURNAL_CLOSE,)),
        (s.RUNNING, e.FAILED): Step(s.RUNNING, (a.TELL_OPERATOR,)),  # the copy would not resume
        (s.DISCARDED, e.BEGIN): Step(s.DISCARDED, (a.SEND_DISCARDED,)),
        (s.DISCARDED, e.COMMIT): Step(s.DISCARDED, (a.SEND_DISCARDED,)),
        (s.DISCARDED, e.ASK): Step(s.DISCARDED, (a.SEND_DISCARDED,)),
        (s.DISCARDED, e.FAILED): Step(s.DISCARDED, (a.TELL_OPERATOR,)),  # what was built would not die
    }
    for state in (s.START, s.PREFLIGHT, s.ENDED):
        # A migration nobody here knows of does not run here, and after this answer it never will.
        table[state, e.ASK] = refuse
        table[state, e.COMMIT] = refuse
    for event in (e.CANCEL, e.FAILED, e.LINK_LOST, e.PROTOCOL_ERROR, e.ABORT, e.DONE):
        for state in (s.START, s.PREFLIGHT, s.ENDED):
            table[state, event] = Step(s.ENDED, ())
    for event in (e.CANCEL, e.FAILED, e.LINK_LOST, e.PROTOCOL_ERROR, e.ABORT, e.ASK):
        for state in (s.BUILDING, s.READY):
            table[state, event] = refuse
    for event in (e.CANCEL, e.LINK_LOST, e.PROTOCOL_ERROR):
        for state in (s.LOCKING, s.RUNNING):
            table[state, event] = Step(state, ())
    for event in (e.CANCEL, e.LINK_LOST, e.PROTOCOL_ERROR, e.ABORT, e.DONE):
        table[s.DISCARDED, event] = Step(s.DISCARDED, ())
    return table


SOURCE: Final[Mapping[tuple[SourceState, SourceEvent], SourceStep]] = _source_table()
DESTINATION: Final[Mapping[tuple[DestinationState, DestinationEvent], DestinationStep]] = _destination_table()


def source_step(state: SourceState, event: SourceEvent) -> SourceStep:
    """What the source does. A pair that is not in the table is a protocol error of that state."""
    step = SOURCE.get((state, event))
    return step if step is not None else SOURCE[state, SourceEvent.PROTOCOL_ERROR]


def destination_step(state: DestinationState, event: DestinationEvent) -> DestinationStep:
    """What the destination does. A pair that is not in the table is a protocol error of that state.

    DECIDING has no row of its own for that: its outcome comes from our own disk, and drivers take no other
    event before it. KeyError there is a bug of the driver.
    """
    step = DESTINATION.get((state, event))
    return step if step is not None else DESTINATION[state, DestinationEvent.PROTOCOL_ERROR]


class Recorded(enum.Enum):
    """What a journal says last. `docs/safety.md` has the meaning of each."""

    OPEN = "open"  # source: copying, nothing committed. destination: building, nothing decided
    COMMITTING = "committing"  # source: COMMIT may have been sent
    AWAY = "away"  # source: the destination runs it; the copy here may be killed
    HERE = "here"  # source: it runs here; COMMIT was not sent, or the destination has discarded
    RUNNING = "running"  # destination: decided; the copy may still be frozen
    RESUMED = "resumed"  # destination: the copy has run. Never to be thawed again: it may be moving on
    DISCARDED = "discarded"  # destination: decided; what was built may still be there
    CLOSED = "closed"  # done: nothing left to do


# What an agent does with a journal that it finds at its start.
SOURCE_RECOVERY: Final[Mapping[Recorded, SourceStep]] = {
    Recorded.OPEN: Step(SourceState.HERE, (SourceAction.JOURNAL_HERE, SourceAction.THAW, SourceAction.JOURNAL_CLOSE)),
    Recorded.COMMITTING: Step(SourceState.COMMITTED, (SourceAction.RECONNECT,)),
    Recorded.AWAY: Step(SourceState.AWAY, (SourceAction.RELEASE, SourceAction.JOURNAL_CLOSE)),
    Recorded.HERE: Step(SourceState.HERE, (SourceAction.THAW, SourceAction.JOURNAL_CLOSE)),
}

DESTINATION_RECOVERY: Final[Mapping[Recorded, DestinationStep]] = {
    Recorded.OPEN: Step(DestinationState.DECIDING, (DestinationAction.DECIDE_DISCARDED,)),
    # Locks that the source copy still has put the rest off: whoever settles next comes to it.
    Recorded.RUNNING: Step(
        DestinationState.RUNNING,
        (DestinationAction.TAKE_LOCKS, DestinationAction.RESUME, DestinationAction.JOURNAL_RESUMED),
    ),
    Recorded.RESUMED: Step(DestinationState.RUNNING, ()),
    Recorded.DISCARDED: Step(DestinationState.DISCARDED, (DestinationAction.DISCARD, DestinationAction.JOURNAL_CLOSE)),
}
