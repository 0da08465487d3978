"""Plans from their approval to their end: wave after wave, and none that is out of date."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

import msgspec

from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.mover import Mover
from migrator.fleet.state import FleetState, Stored
from migrator.fleet.store import Conflict, Lock
from policies import consistency, ledger, plan, score
from policies.model import Cluster
from policies.plan import Cause

log = logging.getLogger("migrator.controller")

KEPT = 50  # plans
MAX_AGE = 600.0  # seconds from its making until a plan is begun


def sent_by_balance(history: Iterable[r.FinishedMove]) -> list[tuple[float, float]]:
    """When balancing sent how much, the earliest first; drains are not rationed."""
    return sorted(
        (one.ended_at, float(one.bytes)) for one in history if one.move.cause in (Cause.BALANCE.value, Cause.RULE.value)
    )


class Plans:
    """The plans of a fleet while one lock is held."""

    def __init__(self, state: FleetState, mover: Mover, lock: Lock) -> None:
        self._state = state
        self._mover = mover
        self._lock = lock
        self._failed: dict[str, dict[str, str]] = {}

    def finished(self, finished: r.FinishedMove) -> None:
        """Of a move that was part of a plan."""
        if finished.move.plan and finished.outcome is not r.Outcome.MIGRATED:
            reasons = self._failed.setdefault(finished.move.plan, {})
            reasons[finished.move.workload] = finished.why or finished.outcome.value

    async def step(self, cluster: Cluster, moves: Mapping[str, r.Move]) -> bool:
        """Take every approved plan a step further; whether one is under way."""
        busy = False
        for stored in (await self._state.plans.all()).values():
            if stored.record.state in (r.PlanState.APPROVED, r.PlanState.RUNNING):
                busy = await self._step(stored, cluster, moves) or busy
        return busy

    async def _step(self, stored: Stored[r.Plan], cluster: Cluster, moves: Mapping[str, r.Move]) -> bool:
        record = stored.record
        failed = {**record.failed, **self._failed.pop(record.id, {})}
        left = [move for move in record.plan.remaining(cluster) if move.workload not in failed]
        under_way = {name for name, move in moves.items() if move.plan == record.id} | {
            move.workload for move in left if move.workload in self._mover.busy
        }
        waiting = [move for move in left if move.workload not in under_way]
        changed = msgspec.structs.replace(record, failed=failed, state=r.PlanState.RUNNING)
        if not left and not under_way:
            why = f"{len(failed)} of {len(record.plan.moves)} moves did not come about" if failed else ""
            changed = msgspec.structs.replace(
                changed, state=r.PlanState.DONE, why=why, achieved=imbalance_of(cluster), changed_at=time.time()
            )
        elif waiting and not under_way:
            age = MAX_AGE if record.state is r.PlanState.APPROVED else float("inf")
            rest = msgspec.structs.replace(record.plan, moves=tuple(left))
            reasons = plan.outdated(rest, cluster, max_age=age)
            if reasons:
                why = "; ".join(reasons)[:4096]
                changed = msgspec.structs.replace(changed, state=r.PlanState.STALE, why=why, changed_at=time.time())
        if changed != record:
            try:
                await self._state.plans.put(record.id, changed, expected=stored.revision, guard=self._lock)
            except Conflict as error:
                if type(error) is not Conflict:
                    raise
                return True
        if changed.state is not r.PlanState.RUNNING:
            log.info("plan %s: %s%s", record.id, changed.state.value, f", {changed.why}" if changed.why else "")
            return False
        if waiting and not under_way:
            wave = min(move.wave for move in waiting)
            for move in waiting:
                if move.wave == wave:
                    await self._mover.begin(move, plan=record.id)
        return True

    async def propose(self, made: plan.Plan, *, by: str, state: r.PlanState, why: str = "") -> r.Plan:
        """Store a plan. What was only proposed before is out of date with that; the oldest are forgotten."""
        old = await self._state.plans.all()
        for name, stored in old.items():
            if stored.record.state is r.PlanState.PROPOSED and name != made.id:
                stale = msgspec.structs.replace(
                    stored.record, state=r.PlanState.STALE, why="a newer plan", changed_at=time.time()
                )
                await self._state.plans.put(name, stale, expected=stored.revision, guard=self._lock)
        record = r.Plan(id=made.id, state=state, plan=made, by=by, why=why, changed_at=time.time())
        await self._state.plans.put(made.id, record, guard=self._lock)
        await forget(self._state, old.values(), self._lock)
        return record


async def approve(state: FleetState, name: str, *, by: str) -> None:
    """Approve a plan that is only proposed. Raises UsageError."""
    stored = await state.plans.get(name)
    if stored is None:
        raise UsageError(f"there is no plan {name!r}", hint="`migrator plans` lists them")
    if stored.record.state in (r.PlanState.APPROVED, r.PlanState.RUNNING):
        return
    if stored.record.state is not r.PlanState.PROPOSED:
        why = f": {stored.record.why}" if stored.record.why else ""
        raise UsageError(f"plan {name} is {stored.record.state.value}{why}", hint="`migrator balance` makes a new one")
    changed = msgspec.structs.replace(stored.record, state=r.PlanState.APPROVED, by=by, changed_at=time.time())
    await state.plans.put(name, changed, expected=stored.revision)


async def forget(state: FleetState, stored: Iterable[Stored[r.Plan]], lock: Lock | None = None) -> None:
    """Forget the oldest plans that are over, beyond those that are kept."""
    over = (r.PlanState.DONE, r.PlanState.REJECTED, r.PlanState.STALE)
    ended = sorted((one.record for one in stored if one.record.state in over), key=lambda one: one.changed_at)
    for record in ended[: max(len(ended) - KEPT, 0)]:
        await state.plans.delete(record.id, guard=lock)


def imbalance_of(cluster: Cluster) -> float:
    """See `policies.score`."""
    return score.Score(ledger.Ledger(cluster, consistency.inspect(cluster))).imbalance()


def same_moves(one: plan.Plan, other: plan.Plan) -> bool:
    return {(move.workload, move.target) for move in one.moves} == {(m.workload, m.target) for m in other.moves}
