"""balance, plans: evening out the load of a fleet."""

from __future__ import annotations

import re
import time
from typing import Annotated, Any

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.control import whoami
from migrator.cli.fleet import AsJson, PrometheusUrl, StoreUrl, look
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import logs_in, seconds
from migrator.cli.parameters import size as bytes_of
from migrator.cli.plans import apply_plan, follow_plan, show_plan
from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.membership import opened
from migrator.fleet.plans import approve
from migrator.host import Login
from migrator.text import duration, size
from policies.balance import HOLD
from policies.balance import balance as plan_for
from policies.plan import Pace
from policies.windows import Window

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
    every: Annotated[
        float | None, typer.Option(parser=seconds, metavar="DURATION", help="With --mode: between two looks.")
    ] = None,
    hold: Annotated[
        int | None, typer.Option(min=1, max=1000, help="With --mode: looks in a row that must be uneven first.")
    ] = None,
    imbalance: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="With --mode: above which it is uneven; 0.05 is usual.")
    ] = None,
    margin: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="With --mode: by how much gain must exceed cost.")
    ] = None,
    thrift: Annotated[
        float | None, typer.Option(min=0.0, max=1000.0, help="With --mode: 2 moves about half as much, 0.5 more.")
    ] = None,
    cooldown: Annotated[
        float | None, typer.Option(parser=seconds, metavar="DURATION", help="With --mode: a moved workload stays.")
    ] = None,
    at_once: Annotated[
        str, typer.Option(metavar="ALL,HOST", help="With --mode: migrations in all and per host, as 8,2.")
    ] = "",
    budget: Annotated[
        float | None,
        typer.Option(parser=bytes_of, metavar="SIZE", help="With --mode: it may send so much an hour; 0: any."),
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(metavar="[DAYS/]HH:MM-HH:MM", help="With --mode: when it may move, UTC, as sat,sun/01:00-05:00."),
    ] = None,
    as_json: AsJson = False,
    prometheus: PrometheusUrl = "",
    store: StoreUrl = "",
) -> None:
    """Plan how to even out the load: each move with why, what it brings, and what it costs.

    The plan is kept for --apply. A running controller plans by itself, as --mode says: off, recommend (it only
    proposes plans), automatic (it carries them out).
    """
    with reported():
        if sum(map(bool, (dry_run, now, apply, reject, mode))) > 1:
            raise UsageError("--dry-run, --now, --apply, --reject and --mode exclude one another")
        changes: dict[str, Any] = {
            "hold": hold, "imbalance": imbalance, "margin": margin, "thrift": thrift, "cooldown": cooldown,
            "pace": _pace(at_once) if at_once else None,
            "windows": tuple(map(window_of, window)) if window else None,
        }  # fmt: skip
        changes = {name: value for name, value in changes.items() if value is not None}
        if budget is not None:
            changes["bytes_per_hour"] = budget or None
        if (changes or every is not None) and not mode:
            raise UsageError("how the controller balances is set together with --mode", hint="such as --mode recommend")
        if mode:
            interrupts.run(lambda _: _set_mode(store, mode, every, changes))
            return
        if reject:
            interrupts.run(lambda _: _reject(store, reject))
            return
        if apply:
            done: r.Plan | None = interrupts.run(lambda _: _apply(store, login, apply, prometheus))
        else:
            done = interrupts.run(lambda _: _plan(store, login, dry_run, now, as_json, prometheus))
    if done is not None and (done.state is not r.PlanState.DONE or done.failed):
        raise typer.Exit(NOT_DONE)


async def _plan(store: str, login: Login, dry_run: bool, now: bool, as_json: bool, prometheus: str) -> r.Plan | None:
    async with opened(store, login, prometheus=prometheus) as fleet:
        seen = await look(fleet, 0.3)
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
            return await apply_plan(fleet, made, by=whoami())
        record = r.Plan(id=made.id, state=r.PlanState.PROPOSED, plan=made, by=whoami(), changed_at=time.time())
        await fleet.state.plans.put(made.id, record)
        if not as_json:
            out.say("carry it out: [bold]migrator balance --apply {}[/]", made.id)
        return None


async def _apply(store: str, login: Login, name: str, prometheus: str) -> r.Plan:
    async with opened(store, login, prometheus=prometheus) as fleet:
        await approve(fleet.state, name, by=whoami())
        return await follow_plan(fleet, name)


async def _reject(store: str, name: str) -> None:
    async with opened(store, Login()) as fleet:
        stored = await fleet.state.plans.get(name)
        if stored is None or stored.record.state is not r.PlanState.PROPOSED:
            raise UsageError(f"there is no plan {name!r} to be rejected", hint="`migrator plans` lists them")
        changed = msgspec.structs.replace(
            stored.record, state=r.PlanState.REJECTED, why=f"rejected by {whoami()}", changed_at=time.time()
        )
        await fleet.state.plans.put(name, changed, expected=stored.revision)
        out.say("plan {} is rejected", name)


async def _set_mode(store: str, mode: str, every: float | None, changes: dict[str, Any]) -> None:
    try:
        wanted = r.Mode(mode)
    except ValueError:
        raise UsageError(f"{mode!r} is no mode", hint="off, recommend or automatic") from None
    async with opened(store, Login()) as fleet:
        settings = await fleet.state.settings()
        rules = msgspec.structs.replace(settings.balance, **changes)
        interval = settings.interval if every is None else every
        await fleet.state.set_settings(msgspec.structs.replace(settings, mode=wanted, interval=interval, balance=rules))
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


_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_WINDOW = re.compile(r"(?:([a-z,]+)/)?([0-2][0-9]):([0-5][0-9])-([0-2][0-9]):([0-5][0-9])")


def window_of(text: str) -> Window:
    """Raises UsageError."""
    match = _WINDOW.fullmatch(text.lower())
    days = match[1].split(",") if match is not None and match[1] else list(_DAYS)
    if match is None or not set(days) <= set(_DAYS) or max(int(match[2]), int(match[4])) > 24:
        raise UsageError(f"{text!r} is no window", hint="such as 01:00-05:00 or sat,sun/22:00-06:00, in UTC")
    start, end = (int(match[hour]) * 3600 + int(match[hour + 1]) * 60 for hour in (2, 4))
    return Window(start=float(start), end=float(end), days=frozenset(map(_DAYS.index, days)))


def _pace(text: str) -> Pace:
    whole, comma, of_host = text.partition(",")
    if not comma or not whole.isdigit() or not of_host.isdigit() or not 0 < int(of_host) <= int(whole) <= 10_000:
        raise UsageError(f"{text!r} is no ALL,HOST: such as 8,2")
    return Pace(total=int(whole), per_host=int(of_host))
