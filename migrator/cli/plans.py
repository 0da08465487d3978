"""Plans as people read them, and their being carried out."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from migrator.cli.control import followed, leading, outcome_line
from migrator.cli.output import err, out
from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.membership import Fleet
from migrator.text import duration, size
from policies.plan import Move, Plan


class show_plan:
    """Ways to show moves."""

    @staticmethod
    def moves(moves: Iterable[Move]) -> None:
        rows = [
            [
                move.workload,
                move.source,
                move.target,
                f"{move.gain:.3f}",
                size(move.cost.bytes),
                duration(move.cost.seconds),
                duration(move.cost.downtime),
                f"{move.cost.risk:.0%}",
                move.reason,
            ]
            for move in moves
        ]
        columns = ("WORKLOAD", "FROM", "TO", "GAIN", "SENDS", "TAKES", "STOPS", "RISK", "BECAUSE")
        out.table(columns, rows, right=("GAIN", "SENDS", "TAKES", "STOPS", "RISK"))

    @staticmethod
    def as_json(move: Move) -> object:
        return msgspec.to_builtins(move)

    @staticmethod
    def plan(plan: Plan) -> None:
        if not plan.moves:
            out.say("[green]nothing to do[/]: imbalance {:.3f}", plan.imbalance)
        else:
            show_plan.moves(plan.moves)
            out.say(
                "imbalance [bold]{:.3f}[/], {:.3f} afterwards; {} to send",
                plan.imbalance, plan.predicted, size(plan.bytes),
            )  # fmt: skip
        for note in plan.notes:
            out.say("  [dim]{}[/]", note)


async def apply_plan(fleet: Fleet, plan: Plan, *, by: str) -> r.Plan:
    """Store a plan as approved, and follow it to its end."""
    record = r.Plan(id=plan.id, state=r.PlanState.APPROVED, plan=plan, by=by, changed_at=time.time())
    await fleet.state.plans.put(plan.id, record)
    return await follow_plan(fleet, plan.id)


async def follow_plan(fleet: Fleet, name: str) -> r.Plan:
    """Until it is over; says what came of each move, and of all."""
    told: set[str] = set()
    found: list[r.Plan] = []

    async def look() -> tuple[str, bool]:
        stored = await fleet.state.plans.get(name)
        if stored is None:
            raise UsageError(f"plan {name} is gone")
        plan = stored.record
        found[:] = [plan]
        ended = 0
        for one in (await fleet.state.history.all()).values():
            if one.record.move.plan == name:
                ended += 1
                if one.record.move.migration not in told:
                    told.add(one.record.move.migration)
                    err.say("  {}", outcome_line(one.record))
        over = plan.state not in (r.PlanState.APPROVED, r.PlanState.RUNNING)
        return f"plan {name}: {ended} of {len(plan.plan.moves)} moves are over", over

    async with leading(fleet) as controller:
        await followed(look, controller)
    plan = found[0]
    if plan.state is r.PlanState.DONE:
        achieved = f"{plan.achieved:.3f}" if plan.achieved is not None else "not known"
        out.say("[green]plan {} is done[/]: imbalance {}", name, achieved, end="")
        if plan.plan.imbalance:
            out.say(" [dim](was {:.3f}, predicted {:.3f})[/]", plan.plan.imbalance, plan.plan.predicted, end="")
        out.say("")
        for workload, why in sorted(plan.failed.items()):
            out.say("  • {} stayed: {}", workload, why)
    else:
        out.say("[yellow]plan {} is {}[/]: {}", name, plan.state.value, plan.why or "nothing more is moved for it")
    return plan
