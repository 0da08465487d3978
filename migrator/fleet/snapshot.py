"""What a controller knows at a moment, for its page and for programs: bounded lists of plain values."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec

from migrator.fleet import records as r
from migrator.fleet.controller import LEADER, Controller
from policies.model import Host, Workload

MOST = 1000  # hosts or workloads that are shown
_PLANS, _HISTORY = 10, 20

Shown = dict[str, Annotated[object, "a value of JSON"]]


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """`may_act`: whether there is a token with which one may."""

    name: str
    leads: bool
    leader: str
    mode: str
    may_act: bool
    imbalance: float
    hosts: list[Shown]
    workloads: list[Shown]
    moves: list[Shown]
    drains: list[Shown]
    plans: list[Shown]
    history: list[Shown]
    notes: list[str]


async def snapshot(controller: Controller, *, may_act: bool = False) -> Snapshot:
    """Of the last round, and of the store as it is now. Raises StoreUnavailable, StoreCorrupt."""
    state, seen = controller.state, controller.observer.seen
    holder = await state.store.holder(LEADER)
    cordons = await state.cordons.all()
    plans = sorted((one.record for one in (await state.plans.all()).values()), key=lambda one: -one.plan.made_at)
    history = [one.record for one in (await state.history.all()).values()][-_HISTORY:]
    count: dict[str, int] = {}
    for one in seen.cluster.workloads:
        count[one.host] = count.get(one.host, 0) + 1
    notes = [*seen.notes, *(f"{name} does not answer: {why}" for name, why in controller.observer.errors.items())]
    if max(len(seen.cluster.hosts), len(seen.cluster.workloads)) > MOST:
        notes.append(f"only {MOST} hosts and workloads are shown; `migrator ps --all` has all")
    return Snapshot(
        name=controller.name,
        leads=controller.lock is not None,
        leader=holder.value.decode(errors="replace") if holder is not None else "",
        mode=(await state.settings()).mode.value,
        may_act=may_act,
        imbalance=controller.imbalance,
        hosts=[_host(one, count.get(one.name, 0)) for one in seen.cluster.hosts[:MOST]],
        workloads=[_workload(one) for one in seen.cluster.workloads[:MOST]],
        moves=[_move(one.record, controller) for one in (await state.moves.all()).values()],
        drains=[_drain(one.record) for one in cordons.values() if one.record.drain is not None],
        plans=[_plan(one) for one in plans[:_PLANS]],
        history=[_ended(one) for one in reversed(history)],
        notes=notes[:100],
    )


def _host(host: Host, workloads: int) -> Shown:
    return {
        "name": host.name,
        "state": host.state.value,
        "cpu": round(host.load.cpu / host.capacity.cpu, 3),
        "memory": round(host.load.memory / host.capacity.memory, 3),
        "pressure": round(max(host.pressure.cpu, host.pressure.memory, host.pressure.io), 2),
        "workloads": workloads,
    }


def _workload(one: Workload) -> Shown:
    return {
        "name": one.name,
        "host": one.host,
        "moving_to": one.moving_to,
        "cpu": round(one.used.cpu, 2),
        "memory": one.used.memory,
        "dirty_rate": one.dirty_rate,
        "pinned": one.pinned,
    }


def _move(move: r.Move, controller: Controller) -> Shown:
    now = controller.mover.progress.get(move.workload) if controller.mover is not None else None
    return {
        "workload": move.workload,
        "source": move.source,
        "destination": move.destination,
        "reason": move.reason,
        "phase": now.phase if now is not None else "",
        "bytes": now.bytes if now is not None else 0,
        "predicted_bytes": move.predicted_bytes,
        "predicted_downtime": now.predicted_downtime if now is not None else None,
    }


def _drain(cordon: r.Cordon) -> Shown:
    assert cordon.drain is not None
    drain, progress = cordon.drain, cordon.drain.progress
    ends_at = progress.ends_at if progress is not None and drain.record.ended_at is None else None
    return {
        "host": cordon.host,
        "state": drain.record.state.value,
        "total": progress.total if progress is not None else len(drain.record.wanted),
        "done": progress.done if progress is not None else 0,
        "ends_in": max(round(ends_at - time.time()), 0) if ends_at is not None else None,
        "stays": drain.stays,
    }


def _plan(plan: r.Plan) -> Shown:
    return {
        "id": plan.id,
        "state": plan.state.value,
        "imbalance": plan.plan.imbalance,
        "predicted": plan.plan.predicted,
        "achieved": plan.achieved,
        "why": plan.why,
        "notes": list(plan.plan.notes),
        "moves": [
            {
                "workload": move.workload,
                "source": move.source,
                "target": move.target,
                "reason": move.reason,
                "gain": move.gain,
                "bytes": move.cost.bytes,
                "seconds": move.cost.seconds,
                "downtime": move.cost.downtime,
                "risk": move.cost.risk,
            }
            for move in plan.plan.moves
        ],
    }


def _ended(one: r.FinishedMove) -> Shown:
    return {
        "workload": one.move.workload,
        "source": one.move.source,
        "destination": one.move.destination,
        "outcome": one.outcome.value,
        "downtime": one.downtime,
        "predicted_downtime": one.move.predicted_downtime,
        "bytes": one.bytes,
        "why": one.why,
    }
