"""Carrying out moves: claimed in the store, ordered from the source's agent, and followed to their end.

A claim (`records.Move`) is there from before the order until its outcome is known, whoever leads meanwhile. So a
workload is never moved by two, and whoever leads next goes on with what it finds claimed: the agent says what became
of it, or, if it has forgotten, both hosts say where the workload runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable

from migrator import model
from migrator.errors import MigratorError, UsageError
from migrator.fleet import records as r
from migrator.fleet.agents import Agent, peer_of
from migrator.fleet.observer import Observer
from migrator.fleet.state import FleetState, Stored
from migrator.fleet.store import Conflict, Lock, NotHeld, StoreUnavailable
from migrator.host import new_migration
from migrator.protocol.fleet import Depart, Departed, Departing
from policies import plan as policy_plan
from policies.explain import move_text

log = logging.getLogger("migrator.controller")

_AGAIN = 1.0  # seconds between two attempts to hear what became of a move
_TIMEOUT = 600.0  # seconds that pre-copy may take


class Mover:
    """The moves under way while one lock is held. `progress` by workload; `finished` is told of each end."""

    def __init__(
        self, state: FleetState, observer: Observer, lock: Lock, finished: Callable[[r.FinishedMove], None]
    ) -> None:
        self._state = state
        self._observer = observer
        self._lock = lock
        self._finished = finished
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.progress: dict[str, Departing] = {}

    @property
    def busy(self) -> set[str]:
        """Workloads on their way."""
        return {name for name, task in self._tasks.items() if not task.done()}

    async def begin(self, move: policy_plan.Move, *, plan: str = "", drain_of: str = "", force: bool = False) -> bool:
        """Claim the workload and have it sent away. False, with nothing done, if it is being moved already.

        Its downtime budget is the migration's limit, unless `force`.

        Raises NotHeld if another controller leads now.
        """
        claim = r.Move(
            workload=move.workload,
            source=move.source,
            destination=move.target,
            migration=new_migration(),
            token=self._lock.token,
            started_at=time.time(),
            plan=plan,
            drain_of=drain_of,
            cause=move.cause.value,
            reason=move.reason,
            predicted_downtime=max(move.cost.downtime, 0.0),
            predicted_bytes=int(move.cost.bytes),
            predicted_seconds=max(move.cost.seconds, 0.0),
            factors=move.cost.factors,
        )
        try:
            revision = await self._state.begin(claim, guard=self._lock)
        except NotHeld:
            raise
        except Conflict:
            return False
        log.info("%s", move_text(move))
        target = self._observer.agents[move.target].host
        rule = self._observer.known.rules.get(move.workload)
        budget = rule.downtime_budget if rule is not None and not force else None
        order = Depart(
            claim.migration,
            claim.workload,
            peer_of(target),
            self._state.fleet.id,
            self._lock.token,
            budget,
            _TIMEOUT,
        )
        self._follow(Stored(claim, revision), order)
        return True

    def adopt(self, stored: Stored[r.Move]) -> None:
        """Go on with a move that an earlier leader has claimed."""
        if stored.record.workload not in self.busy:
            log.info("%s: following migration %s of an earlier leader", stored.record.workload, stored.record.migration)
            self._follow(stored, None)

    def _follow(self, stored: Stored[r.Move], order: Depart | None) -> None:
        name = stored.record.workload
        self._tasks[name] = asyncio.create_task(self._run(stored, order), name=f"move of {name}")

    async def _run(self, stored: Stored[r.Move], order: Depart | None) -> None:
        move = stored.record
        try:
            departed = await self._to_the_end(move, order)
            finished = _finished(move, departed)
            while True:
                try:
                    await self._state.end(finished, expected=stored.revision, guard=self._lock)
                    break
                except StoreUnavailable as error:
                    log.warning("%s: the end of its move cannot be stored yet: %s", move.workload, error)
                    await asyncio.sleep(_AGAIN)
            log.info("%s: %s%s", move.workload, finished.outcome.value, f", {finished.why}" if finished.why else "")
            self._observer.moved(finished)
            self._finished(finished)
        except Conflict as error:  # another leads, and has heard the end, or will
            log.warning("%s: its move is no longer ours: %s", move.workload, error)
        except asyncio.CancelledError:
            raise
        except Exception:
            log.exception("following the move of %s failed; the next leader goes on", move.workload)
        finally:
            self.progress.pop(move.workload, None)

    async def _to_the_end(self, move: r.Move, order: Depart | None) -> Departed:
        """What came of it, as long as that takes. An UNDECIDED one is followed until it is decided."""
        agent = self._observer.agents.get(move.source)
        while True:
            if agent is None:
                raise UsageError(f"host {move.source} is not of the fleet any more")
            try:
                stream = agent.depart(order) if order is not None else agent.watch(move.migration)
                departed = await self._last(move.workload, stream)
                if departed.outcome not in ("unknown", "undecided"):
                    return departed
            except (MigratorError, OSError) as error:
                log.warning("%s: %s", move.workload, error)
                departed = Departed(move.migration, "unknown", reason=str(error)[:4000])
            order = None
            found = await self._look(move, agent, departed)
            if found is not None:
                return found
            await asyncio.sleep(_AGAIN)
            agent = self._observer.agents.get(move.source)

    async def _last(self, workload: str, stream: AsyncIterator[Departing | Departed]) -> Departed:
        async for now in stream:
            if isinstance(now, Departed):
                return now
            self.progress[workload] = now
        raise MigratorError("the answer has no end")

    async def _look(self, move: r.Move, source: Agent, departed: Departed) -> Departed | None:
        """Where the workload runs, if that tells what became of its move: both hosts must say so now."""
        target = self._observer.agents.get(move.destination)
        if target is None:
            return None
        if departed.outcome == "unknown" and departed.reason:
            # Its agent may know, once it can be reached: ask that first.
            try:
                async for now in source.watch(move.migration):
                    if isinstance(now, Departing):
                        return None
                    if now.outcome not in ("unknown", "undecided"):
                        return now
            except (MigratorError, OSError):
                return None
        try:
            here, there = await asyncio.gather(source.observe(), target.observe())
        except (MigratorError, OSError):
            return None
        at_source = {one.name: one.state for one in here.workloads}.get(move.workload)
        at_target = {one.name: one.state for one in there.workloads}.get(move.workload)
        if at_target == "running" and at_source is None:
            return Departed(move.migration, model.Outcome.MIGRATED.value, reason="its agent was started anew")
        if at_source == "running" and at_target is None:
            return Departed(move.migration, model.Outcome.ABORTED.value, reason="it runs where it was")
        if at_source is None and at_target is None:
            return Departed(move.migration, model.Outcome.ABORTED.value, reason="it has ended")
        return None

    async def close(self) -> None:
        """Stop following; what is under way goes on, and the next leader follows it."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)


_OUTCOMES = {
    "migrated": r.Outcome.MIGRATED,
    "refused": r.Outcome.REFUSED,
    "aborted": r.Outcome.ABORTED,
    "undecided": r.Outcome.UNDECIDED,
}


def _finished(move: r.Move, departed: Departed) -> r.FinishedMove:
    why = departed.reason + (f" ({departed.hint})" if departed.hint else "")
    return r.FinishedMove(
        move=move,
        outcome=_OUTCOMES.get(departed.outcome, r.Outcome.ABORTED),
        ended_at=time.time(),
        why=why[:4096],
        downtime=departed.downtime,
        bytes=departed.bytes,
        seconds=departed.seconds,
    )
