"""balance, plans: evening out the load of a fleet."""

from __future__ import annotations

import os
import time
from typing import Annotated

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.fleet import AsJson, StoreUrl
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import logs_in
from migrator.cli.plans import apply_plan, approve, follow_plan, show_plan
from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.membership import opened
from migrator.host import Login
from migrator.text import duration, size
from policies.balance import HOLD
from policies.balance import balance as plan_for

NOT_DONE = 18  # exit code: a plan that was not carried out wholly


@logs_in(unattended=True)
def balance(
    login: Login,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show the plan; it is not kept.")] = False,
    now: Annotated[bool, typer.Option("--now", help="Carry the plan out at once.")] = False,
    apply: Annotated[str, typer.Option(metavar="PLAN", help="Carry out this plan, if it is not out of date.")] = "",
    reject: Annotated[str, typer.Option(metavar="PLAN", help="This plan shall not be carried out.")] = "",
    mode: Annotated[
        str, typer.Option(metavar="off|recommend|automatic", help="What the controller does from now on.")
    ] = "",
    as_json: AsJson = False,
    store: StoreUrl = "",
) -> None:
    """Plan how to even out the load: each move with why, what it brings, and what it costs.

    The plan is kept for --apply. A running controller plans by itself, as --mode says: off, recommend (it only
    proposes plans), automatic (it carries them out).
    """
    with reported():
        if sum(map(bool, (dry_run, now, apply, reject, mode))) > 1:
            raise UsageError("--dry-run, --now, --apply, --reject and --mode exclude one another")
        if mode:
            interrupts.run(lambda _: _set_mode(store, mode))
            return
        if reject:
            interrupts.run(lambda _: _reject(store, reject))
            return
        if apply:
            done: r.Plan | None = interrupts.run(lambda _: _apply(store, login, apply))
        else:
            done = interrupts.run(lambda _: _plan(store, login, dry_run, now, as_json))
    if done is not None and (done.state is not r.PlanState.DONE or done.failed):
        raise typer.Exit(NOT_DONE)


async def _plan(store: str, login: Login, dry_run: bool, now: bool, as_json: bool) -> r.Plan | None:
    async with opened(store, login) as fleet:
        seen = await fleet.observer.look(rate=0.3)
        for note in seen.notes:
            err.say("[yellow]note:[/] {}", note)
        for name, error in sorted(fleet.observer.errors.items()):
            err.say("[yellow]note:[/] {} does not answer: {}", name, error)
        settings = await fleet.state.settings()
        # A person who asks has waited long enough.
        made, _ = plan_for(seen.cluster, HOLD, msgspec.structs.replace(settings.balance, hold=1))
        if as_json:
            out.json(msgspec.json.encode(made))
        else:
            show_plan.plan(made)
        if dry_run or not made.moves:
            return None
        if now:
            return await apply_plan(fleet, made, by=_by())
        record = r.Plan(id=made.id, state=r.PlanState.PROPOSED, plan=made, by=_by(), changed_at=time.time())
        await fleet.state.plans.put(made.id, record)
        if not as_json:
            out.say("carry it out: [bold]migrator balance --apply {}[/]", made.id)
        return None


async def _apply(store: str, login: Login, name: str) -> r.Plan:
    async with opened(store, login) as fleet:
        await approve(fleet, name, by=_by())
        return await follow_plan(fleet, name)


async def _reject(store: str, name: str) -> None:
    async with opened(store, Login()) as fleet:
        stored = await fleet.state.plans.get(name)
        if stored is None or stored.record.state is not r.PlanState.PROPOSED:
            raise UsageError(f"there is no plan {name!r} to be rejected", hint="`migrator plans` lists them")
        changed = msgspec.structs.replace(
            stored.record, state=r.PlanState.REJECTED, why=f"rejected by {_by()}", changed_at=time.time()
        )
        await fleet.state.plans.put(name, changed, expected=stored.revision)
        out.say("plan {} is rejected", name)


async def _set_mode(store: str, mode: str) -> None:
    try:
        wanted = r.Mode(mode)
    except ValueError:
        raise UsageError(f"{mode!r} is no mode", hint="off, recommend or automatic") from None
    async with opened(store, Login()) as fleet:
        settings = await fleet.state.settings()
        await fleet.state.set_settings(msgspec.structs.replace(settings, mode=wanted))
        out.say("the controller's mode is [bold]{}[/] from its next round on", wanted.value)


def plans(
    name: Annotated[str, typer.Argument(metavar="[PLAN]", help="Show this one with its moves.")] = "",
    as_json: AsJson = False,
    store: StoreUrl = "",
) -> None:
    """List the plans that were made, and what came of them."""

    async def show() -> None:
        async with opened(store, Login()) as fleet:
            found = [one.record for one in (await fleet.state.plans.all()).values()]
        if name:
            found = [one for one in found if one.id == name]
            if not found:
                raise UsageError(f"there is no plan {name!r}", hint="`migrator plans` lists them")
        found.sort(key=lambda one: one.plan.made_at)
        if as_json:
            out.json(msgspec.json.encode(found))
            return
        if name:
            show_plan.plan(found[0].plan)
        rows = [
            [
                one.id,
                one.state.value,
                duration(max(time.time() - one.plan.made_at, 0.0)) + " ago",
                len(one.plan.moves),
                size(one.plan.bytes),
                f"{one.plan.imbalance:.3f}",
                f"{one.plan.predicted:.3f}",
                f"{one.achieved:.3f}" if one.achieved is not None else "-",
                one.by,
                one.why or "-",
            ]
            for one in found
        ]
        columns = ("PLAN", "STATE", "MADE", "MOVES", "SENDS", "BEFORE", "PREDICTED", "ACHIEVED", "BY", "NOTE")
        out.table(columns, rows, right=("MOVES", "SENDS", "BEFORE", "PREDICTED", "ACHIEVED"))

    with reported():
        interrupts.run(lambda _: show())


def _by() -> str:
    return f"uid {os.getuid()}@{os.uname().nodename}"
