"""Every order of events, exhaustively: both tables, the network between them, and crashes of either side.

The network is a set of messages that were ever sent: each can be delivered at any time, as often as one
likes, in any order, or never. That covers loss, repetition and lateness, also across connections. Either
agent can crash between any two actions and start again; tasks that a dead agent had stopped by ptrace run
on (source) or are gone (destination), tasks held by a cgroup stay frozen.

All of it twice: with a workload that has locks on files which both hosts share (`locked`). Its copy must have
them before it runs, and can get them once the source copy is dead.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import pytest

from migrator.protocol import states
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

SS, SE, SA = SourceState, SourceEvent, SourceAction
DS, DE, DA = DestinationState, DestinationEvent, DestinationAction

# What long actions consist of, as far as others can tell.
WORK = {
    SA.COPY: ("converged",),
    SA.SAVE: ("freeze", "committing", "image", "hold", "saved"),
    DA.BUILD: ("build", "built", "hold"),
    DA.TAKE_LOCKS: ("lock",),
}
SENDS = {
    SA.SEND_HELLO: DE.HELLO,
    SA.SEND_BEGIN: DE.BEGIN,
    SA.SEND_COMMIT: DE.COMMIT,
    SA.SEND_ASK: DE.ASK,
    SA.SEND_DONE: DE.DONE,
    SA.SEND_ABORT: DE.ABORT,
    DA.SEND_VERDICT: SE.ACCEPTED,
    DA.SEND_READY: SE.READY,
    DA.SEND_RUNNING: SE.RUNNING,
    DA.SEND_DISCARDED: SE.DISCARDED,
}
IMAGE = "image"


@dataclass(frozen=True)
class Source:
    state: SourceState | None = SS.START  # None: the agent is dead
    todo: tuple[SourceAction, ...] = ()
    work: tuple[str, ...] = ()
    journal: Recorded | None = None
    copy: str = "run"  # run, stop (by ptrace), held (by cgroup), dead


@dataclass(frozen=True)
class Destination:
    state: DestinationState | None = DS.START
    todo: tuple[DestinationAction | DestinationEvent, ...] = ()
    work: tuple[str, ...] = ()
    journal: Recorded | None = None  # progress
    decision: Recorded | None = None  # the first record of RUNNING or DISCARDED
    copy: str = "none"  # none, stop, held, run
    locks: bool = False  # the copy has its locks


@dataclass(frozen=True)
class World:
    source: Source = Source()
    destination: Destination = Destination()
    net: frozenset[object] = frozenset()
    locked: bool = False


class Violation(AssertionError):
    pass


def source_event(world: World, event: SourceEvent) -> World:
    me = world.source
    assert me.state is not None and not me.todo
    if me.state is SS.HERE and event is SE.RUNNING:
        raise Violation("told that it runs elsewhere after it was decided that it runs here")
    if me.state is SS.AWAY and event is SE.DISCARDED:
        raise Violation("told that the copy was discarded after it was said to run")
    state, actions = source_step(me.state, event)
    return replace(world, source=replace(me, state=state, todo=actions, work=() if actions else me.work))


def source_act(world: World) -> World:
    me = world.source
    action, me = me.todo[0], replace(me, todo=me.todo[1:])
    if action in SENDS:
        world = replace(world, net=world.net | {SENDS[action]})
    elif action in WORK:
        me = replace(me, work=WORK[action])
    elif action is SA.JOURNAL_OPEN:
        me = replace(me, journal=Recorded.OPEN)
    elif action is SA.JOURNAL_HERE:
        # Before anything is begun there may be no journal; the table does not use it there.
        me = replace(me, journal=Recorded.HERE)
    elif action is SA.JOURNAL_AWAY:
        me = replace(me, journal=Recorded.AWAY)
    elif action is SA.JOURNAL_CLOSE:
        me = replace(me, journal=Recorded.CLOSED)
    elif action is SA.THAW:
        if me.copy == "dead":
            raise Violation("thawing what was killed")
        me = replace(me, copy="run")
    elif action is SA.RELEASE:
        if me.copy not in ("held", "dead"):
            raise Violation(f"killing a copy that is {me.copy}")
        me = replace(me, copy="dead")
    return replace(world, source=me)


def source_work(world: World) -> World:
    me = world.source
    piece, me = me.work[0], replace(me, work=me.work[1:])
    if piece == "freeze":
        me = replace(me, copy="stop")
    elif piece == "committing":
        me = replace(me, journal=Recorded.COMMITTING)
    elif piece == "image":
        world = replace(world, net=world.net | {IMAGE})
    elif piece == "hold":
        me = replace(me, copy="held")
    elif piece in ("converged", "saved"):
        return source_event(replace(world, source=me), SE(piece))
    return replace(world, source=me)


def source_start(me: Source) -> Source:
    if me.journal in SOURCE_RECOVERY:
        state, actions = SOURCE_RECOVERY[me.journal]
        return replace(me, state=state, todo=actions)
    return replace(me, state=SS.HERE if me.copy != "dead" else SS.AWAY)


def source_crash(me: Source) -> Source:
    return replace(me, state=None, todo=(), work=(), copy="run" if me.copy == "stop" else me.copy)


def destination_event(world: World, event: DestinationEvent) -> World:
    me = world.destination
    assert me.state is not None and not me.todo
    state, actions = destination_step(me.state, event)
    # Held while READY is answered; locks are taken whatever else is said.
    goes_on = not actions or event in (DE.BUILT, DE.COMMIT) or state is DS.LOCKING
    return replace(world, destination=replace(me, state=state, todo=actions, work=me.work if goes_on else ()))


def destination_act(world: World) -> World:
    me = world.destination
    action, me = me.todo[0], replace(me, todo=me.todo[1:])
    if isinstance(action, DestinationEvent):
        return destination_event(replace(world, destination=me), action)
    if action in SENDS:
        if action is DA.SEND_DISCARDED and me.decision is not Recorded.DISCARDED:
            raise Violation("said DISCARDED before it was recorded")
        if action is DA.SEND_RUNNING and me.decision is not Recorded.RUNNING:
            raise Violation("said RUNNING before it was recorded")
        world = replace(world, net=world.net | {SENDS[action]})
    elif action is DA.TAKE_LOCKS and me.state is DS.RUNNING:  # settling: without a driver beside it
        me = replace(me, locks=world.locked)
    elif action in WORK:
        me = replace(me, work=WORK[action])
    elif action is DA.JOURNAL_OPEN:
        if me.journal is not None or me.decision is not None:
            return replace(world, destination=destination_start(me))  # the file exists: settle that instead
        me = replace(me, journal=Recorded.OPEN)
    elif action in (DA.DECIDE_RUNNING, DA.DECIDE_DISCARDED):
        mine = Recorded.RUNNING if action is DA.DECIDE_RUNNING else Recorded.DISCARDED
        me = replace(me, decision=me.decision or mine, journal=me.journal or Recorded.OPEN)
        won = DE.DECIDED_LOCKING if world.locked else DE.DECIDED_RUNNING
        won = won if me.decision is Recorded.RUNNING else DE.DECIDED_DISCARDED
        me = replace(me, todo=(won, *me.todo))
    elif action is DA.RESUME:
        if me.copy not in ("held", "run"):
            raise Violation(f"resuming a copy that is {me.copy}")
        if world.locked and not me.locks:
            raise Violation("resuming a copy that has not got its locks")
        me = replace(me, copy="run")
    elif action is DA.DISCARD:
        if me.copy == "run":
            raise Violation("discarding a copy that runs")
        me = replace(me, copy="none", locks=False)
    elif action is DA.JOURNAL_RESUMED:
        me = replace(me, journal=Recorded.RESUMED)
    elif action is DA.JOURNAL_CLOSE:
        me = replace(me, journal=Recorded.CLOSED)
    return replace(world, destination=me)


def destination_work(world: World) -> World:
    me = world.destination
    piece, me = me.work[0], replace(me, work=me.work[1:])
    if piece == "build":
        me = replace(me, copy="stop")
    elif piece == "hold":
        me = replace(me, copy="held")
    elif piece == "built":
        return destination_event(replace(world, destination=me), DE.BUILT)
    elif piece == "lock":
        return destination_event(replace(world, destination=replace(me, locks=True)), DE.LOCKED)
    return replace(world, destination=me)


def destination_start(me: Destination) -> Destination:
    me = replace(me, todo=(), work=())
    if me.journal in (Recorded.CLOSED, Recorded.RESUMED):
        return replace(me, state=DS.RUNNING if me.decision is Recorded.RUNNING else DS.DISCARDED)
    found = me.decision or me.journal
    if found is None:
        return replace(me, state=DS.START)
    state, actions = DESTINATION_RECOVERY[found]
    return replace(me, state=state, todo=actions)


def destination_crash(me: Destination) -> Destination:
    return replace(me, state=None, todo=(), work=(), copy="none" if me.copy == "stop" else me.copy)


def waits_for_hold(me: Destination) -> bool:
    return bool(me.work) and me.todo[:1] == (DA.DECIDE_RUNNING,) and DRIVER["DECIDE_RUNNING waits for the hold"]


def waits_for_locks(world: World) -> bool:
    """Whether the next thing that the destination does is to take locks, and the source copy has them."""
    me = world.destination
    settling = me.todo[:1] == (DA.TAKE_LOCKS,) and me.state is DS.RUNNING
    locking = not me.todo and me.work == ("lock",)
    return (settling or locking) and world.locked and world.source.copy != "dead"


DRIVER = {"DECIDE_RUNNING waits for the hold": True}

SOURCE_SPONTANEOUS = (SE.CANCEL, SE.FAILED, SE.LINK_LOST, SE.PROTOCOL_ERROR)
DESTINATION_SPONTANEOUS = (DE.CANCEL, DE.FAILED, DE.LINK_LOST, DE.PROTOCOL_ERROR)


def successors(world: World) -> Iterator[World]:
    me, other = world.source, world.destination
    if me.state is None:
        yield replace(world, source=source_start(me))
    else:
        yield replace(world, source=source_crash(me))
        if me.work:
            yield source_work(world)
        if me.todo:
            yield source_act(world)
        else:
            if me.state is SS.START:
                yield source_event(world, SE.BEGIN)
            events = [e for e in world.net if isinstance(e, SourceEvent)]
            events += SOURCE_SPONTANEOUS
            if me.state is SS.COMMITTED:
                events += (SE.LINK_BACK, SE.UNREACHABLE)
            for event in events:
                yield source_event(world, event)
    if other.state is None:
        yield replace(world, destination=destination_start(other))
    else:
        yield replace(world, destination=destination_crash(other))
        waits = waits_for_locks(world)
        ready = not waits and (other.work[:1] != ("lock",) or not other.todo)
        if other.work and ready and (other.work[0] != "build" or IMAGE in world.net):
            yield destination_work(world)
        if waits_for_hold(other):  # which may fail
            yield replace(world, destination=replace(other, todo=(DA.DECIDE_DISCARDED, *other.todo[1:]), work=()))
        elif other.todo:
            if not waits:
                yield destination_act(world)
        else:
            heard = [e for e in world.net if isinstance(e, DestinationEvent)]
            for event in (*heard, *DESTINATION_SPONTANEOUS):
                yield destination_event(world, event)
        if DE.ASK in world.net:
            # Another agent process of that host gets the question while this one still lives. It shares
            # nothing with it but the journal.
            decision = other.decision or Recorded.DISCARDED
            answer = SE.RUNNING if decision is Recorded.RUNNING else SE.DISCARDED
            yield replace(
                world,
                destination=replace(other, decision=decision, journal=other.journal or Recorded.OPEN),
                net=world.net | {answer},
            )


def check(world: World) -> None:
    here, there = world.source.copy, world.destination.copy
    if there == "run" and here not in ("held", "dead"):
        raise Violation(f"two copies: the source is {here}")
    if there == "run" and world.locked and here != "dead":
        raise Violation(f"the copy runs while the locks are the source's, which is {here}")
    if here == "dead" and there not in ("held", "run"):
        raise Violation("no copy is left")
    if here == "dead" and world.destination.decision is not Recorded.RUNNING:
        raise Violation("killed on the source before the destination decided")


@cache
def explore(locked: bool) -> dict[World, World | None]:
    """All reachable worlds, each with the one it was first reached from."""
    first = World(locked=locked)
    seen: dict[World, World | None] = {first: None}
    queue = deque([first])
    while queue:
        world = queue.popleft()
        try:
            check(world)
            following = set(successors(world))
        except Violation as violation:
            raise AssertionError(f"{violation}:\n{story(seen, world)}") from None
        for new in following:
            if new not in seen:
                seen[new] = world
                queue.append(new)
    return seen


def story(seen: dict[World, World | None], world: World | None) -> str:
    lines: list[str] = []
    while world is not None:
        lines.append(str(world))
        world = seen[world]
    return "\n".join(reversed(lines))


def finish_source(world: World) -> World:
    while world.source.todo:
        world = source_act(world)
    return world


def finish_destination(world: World) -> World:
    while not waits_for_locks(world):
        me = world.destination
        if waits_for_hold(me) or (not me.todo and me.work == ("lock",)):
            world = destination_work(world)
        elif me.todo:
            world = destination_act(world)
        else:
            break
    return world


def destination_hears(world: World, event: DestinationEvent) -> World:
    if world.destination.todo:  # it is being settled and waits for locks; another answers from the journal
        assert world.destination.decision is Recorded.RUNNING
        return replace(world, net=world.net | ({SE.RUNNING} if event is DE.ASK else frozenset()))
    return finish_destination(destination_event(world, event))


def quiet(world: World, *, destination_first: bool) -> World:
    """Both agents run again, nothing of the old connection arrives any more, the link is back."""
    if world.source.state is None:
        world = replace(world, source=source_start(world.source))
    if world.destination.state is None:
        world = replace(world, destination=destination_start(world.destination))
    world = finish_destination(finish_source(replace(world, net=frozenset())))
    for side in ("destination", "source") if destination_first else ("source", "destination"):
        if side == "source":
            world = finish_source(source_event(world, SE.LINK_LOST))
            if world.source.state is SS.COMMITTED:
                world = finish_source(source_event(world, SE.LINK_BACK))
                assert DE.ASK in world.net
        else:
            world = destination_hears(world, DE.LINK_LOST)
    if DE.ASK in world.net:
        world = destination_hears(replace(world, net=frozenset()), DE.ASK)
        (answer,) = world.net
        assert isinstance(answer, SourceEvent)
        world = finish_destination(finish_source(source_event(world, answer)))
    check(world)
    return world


both = pytest.mark.parametrize("locked", [False, True])


@both
def test_at_no_instant_can_two_copies_run_and_none_is_ever_lost(locked: bool) -> None:
    worlds = explore(locked)
    assert len(worlds) > 1000
    outcomes = {(w.source.copy, w.destination.copy) for w in worlds}
    assert ("dead", "run") in outcomes and ("held", "held") in outcomes
    assert (("held", "run") in outcomes) is not locked
    assert ("run", "run") not in outcomes


@both
@pytest.mark.parametrize("destination_first", [True, False])
def test_from_every_state_exactly_one_copy_runs_once_the_link_is_back(destination_first: bool, locked: bool) -> None:
    for world in explore(locked):
        end = quiet(world, destination_first=destination_first)
        copies = (end.source.copy, end.destination.copy)
        assert copies in (("run", "none"), ("dead", "run")), story(explore(locked), world)


@both
def test_a_source_whose_peer_is_gone_for_ever_runs_or_is_frozen_with_a_message(locked: bool) -> None:
    frozen = 0
    for world in explore(locked):
        if world.source.state is None:
            world = replace(world, source=source_start(world.source))
        world = finish_source(world)
        world = finish_source(source_event(world, SE.LINK_LOST))
        if world.source.state is SS.COMMITTED:
            assert SA.TELL_OPERATOR in source_step(SS.COMMITTED, SE.UNREACHABLE).actions
            frozen += 1
        else:
            assert world.source.copy == ("dead" if world.source.state is SS.AWAY else "run")
    assert frozen


@both
def test_a_destination_whose_peer_is_gone_for_ever_keeps_nothing_frozen_but_what_waits_for_locks(locked: bool) -> None:
    for world in explore(locked):
        if world.destination.state is None:
            world = replace(world, destination=destination_start(world.destination))
        world = finish_destination(world)
        world = destination_hears(world, DE.LINK_LOST)
        waits = waits_for_locks(world) and world.destination.decision is Recorded.RUNNING
        assert world.destination.copy == "held" if waits else world.destination.copy in ("none", "run")
        # Once the source's host is gone, or has said that its copy is, the locks are free.
        world = finish_destination(replace(world, source=replace(world.source, copy="dead")))
        assert world.destination.copy in ("none", "run")


@both
def test_a_copy_that_has_run_is_never_thawed_again_by_a_restart(locked: bool) -> None:
    for world in explore(locked):
        me = world.destination
        if me.state is None and me.journal in (Recorded.RESUMED, Recorded.CLOSED):
            assert DA.RESUME not in destination_start(me).todo


# Each of these is a plausible mistake. That the exploration finds it says that it looks where it should.
MISTAKES = {
    "a source that starts again thaws without asking": (
        "SOURCE_RECOVERY",
        Recorded.COMMITTING,
        (SS.HERE, (SA.JOURNAL_HERE, SA.THAW, SA.JOURNAL_CLOSE)),
    ),
    "a source that loses the link after COMMIT thaws": (
        "SOURCE",
        (SS.COMMITTED, SE.LINK_LOST),
        (SS.HERE, (SA.JOURNAL_HERE, SA.THAW, SA.JOURNAL_CLOSE)),
    ),
    "a destination resumes before it has recorded that": (
        "DESTINATION",
        (DS.READY, DE.COMMIT),
        (DS.DECIDING, (DA.RESUME, DA.DECIDE_RUNNING)),
    ),
    "a destination says DISCARDED without recording it": (
        "DESTINATION",
        (DS.START, DE.ASK),
        (DS.START, (DA.SEND_DISCARDED,)),
    ),
    "a source kills its copy as soon as COMMIT is sent": (
        "SOURCE",
        (SS.SAVED, SE.READY),
        (SS.COMMITTED, (SA.SEND_COMMIT, SA.RELEASE)),
    ),
    "the tasks are held only after COMMITTING is recorded and COMMIT sent": (
        "WORK",
        SA.SAVE,
        ("freeze", "committing", "image", "saved", "hold"),
    ),
    "a copy runs before it has its locks": (
        "DESTINATION",
        (DS.DECIDING, DE.DECIDED_LOCKING),
        (DS.RUNNING, (DA.RESUME, DA.SEND_RUNNING, DA.JOURNAL_RESUMED)),
    ),
    "a copy that waits for its locks is discarded when the link is lost": (
        "DESTINATION",
        (DS.LOCKING, DE.LINK_LOST),
        (DS.DISCARDED, (DA.DISCARD,)),
    ),
    "a copy that is settled runs without its locks": (
        "DESTINATION_RECOVERY",
        Recorded.RUNNING,
        (DS.RUNNING, (DA.RESUME, DA.JOURNAL_RESUMED)),
    ),
    "RUNNING is recorded before the copy is held": (
        "DRIVER",
        "DECIDE_RUNNING waits for the hold",
        False,
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_exploration_finds_a_mistake(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, key, wrong = MISTAKES[mistake]
    home = states if table in ("SOURCE", "DESTINATION") else sys.modules[__name__]
    monkeypatch.setitem(getattr(home, table), key, wrong)
    with pytest.raises(AssertionError):
        for locked in (False, True):
            for world in explore.__wrapped__(locked):
                assert quiet(world, destination_first=True).destination.copy in ("none", "run")
