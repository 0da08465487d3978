"""drain, cordon, uncordon: keeping a host free, and emptying it."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.control import followed, leading, outcome_line, whoami
from migrator.cli.fleet import AsJson, HostName, StoreUrl
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import logs_in, seconds
from migrator.cli.plans import apply_plan, show_plan
from migrator.errors import UsageError
from migrator.fleet import membership
from migrator.fleet import records as r
from migrator.fleet.membership import Fleet, host_named, opened
from migrator.fleet.store import Conflict
from migrator.host import Login
from migrator.text import duration, size
from policies import drain as policy
from policies.plan import Pace

NOT_EMPTY = 17  # exit code: something stayed

_AFTER = {"stop": policy.AtDeadline.STOP, "force": policy.AtDeadline.FORCE, "save": policy.AtDeadline.SAVE}


@logs_in(unattended=True)
def drain(
    login: Login,
    name: HostName,
    deadline: Annotated[
        float | None, typer.Option(parser=seconds, metavar="DURATION", help="The time it has, as 10m; none, if not.")
    ] = None,
    at_deadline: Annotated[
        str, typer.Option(metavar="stop|force|save", help="What becomes of what is left then.")
    ] = "stop",
    parallel: Annotated[int, typer.Option(min=1, max=1000, help="Migrations at once.")] = 2,
    evacuate: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="DURATION", help="The host dies in so long: most valuable first."),
    ] = None,
    reason: Annotated[str, typer.Option(help="For those who wonder.")] = "",
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Leave it to a running controller.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go where.")] = False,
    as_json: AsJson = False,
    store: StoreUrl = "",
) -> None:
    """Empty a host: nothing new comes to it, and all that runs there is moved to others. Asked for again, it goes on.

    Ends with "empty", verified, or with what stayed there and why, and then exits with 17.
    """
    with reported():
        if at_deadline not in _AFTER:
            raise UsageError(f"{at_deadline!r} is nothing to do at a deadline", hint="stop, force or save")
        if evacuate is not None and deadline is not None:
            raise UsageError("--evacuate is a deadline of its own")
        asked = _Asked(name, evacuate or deadline, _AFTER[at_deadline], parallel, evacuate is not None, reason)
        ended = interrupts.run(lambda _: _drain(store, login, asked, detach, dry_run, as_json))
    if ended is not None and ended.record.state is not policy.State.EMPTY:
        raise typer.Exit(NOT_EMPTY)


class _Asked:
    def __init__(
        self,
        host: str,
        seconds: float | None,
        at_deadline: policy.AtDeadline,
        parallel: int,
        evacuate: bool,
        reason: str,
    ) -> None:
        self.host = host
        self.seconds = seconds
        self.at_deadline = at_deadline
        self.parallel = parallel
        self.evacuate = evacuate
        self.reason = reason

    async def begin(self, fleet: Fleet) -> policy.Record:
        seen = await fleet.observer.look()
        return policy.begin(
            seen.cluster,
            self.host,
            seconds=self.seconds,
            at_deadline=self.at_deadline,
            parallel=self.parallel,
            evacuate=self.evacuate,
        )


async def _drain(store: str, login: Login, asked: _Asked, detach: bool, dry_run: bool, as_json: bool) -> r.Drain | None:
    name = asked.host
    async with opened(store, login) as fleet:
        await host_named(fleet, name)
        if dry_run:
            await _foretell(fleet, asked, as_json)
            return None
        while not await _begun(fleet, asked):
            pass  # somebody has changed it meanwhile: look again
        if detach:
            out.say(
                "{} is being drained by the controller that leads; `migrator drain {}` shows how it goes", name, name
            )
            return None
        return await _follow(fleet, name, as_json)


async def _begun(fleet: Fleet, asked: _Asked) -> bool:
    """Begin a drain, or find one under way. False if something else was written while we looked."""
    name = asked.host
    stored = await fleet.state.cordons.get(name)
    running = stored.record.drain if stored is not None else None
    if running is not None and running.record.state is policy.State.RUNNING:
        err.say("[yellow]note:[/] a drain of {} is under way: going on with that", name)
        return True
    begun = await asked.begin(fleet)
    if running is not None and running.record.state is policy.State.EMPTY and not begun.wanted:
        return True  # it is empty still, and what was moved can be brought back
    cordon = r.Cordon(
        host=name,
        mode=r.HostMode.DRAINING,
        since=time.time(),
        by=whoami(),
        reason=asked.reason,
        drain=r.Drain(record=begun),
    )
    try:
        await fleet.state.cordons.put(name, cordon, expected=stored.revision if stored is not None else 0)
    except Conflict:
        return False
    return True


async def _foretell(fleet: Fleet, asked: _Asked, as_json: bool) -> None:
    record = await asked.begin(fleet)
    # All at once, on a cluster in which the host is closed already.
    cordons = {**fleet.observer.known.cordons, asked.host: _closed(asked.host)}
    cluster = fleet.observer.with_cordons(cordons).cluster
    many = max(len(record.wanted), 1)
    record = msgspec.structs.replace(record, parallel=many)
    whole = policy.step(cluster, record, policy.Settings(pace=Pace(total=many, per_host=many)))
    moves = [action.move for action in whole.actions if isinstance(action, policy.Start)]
    if as_json:
        out.json({"moves": [show_plan.as_json(move) for move in moves], "stays": whole.stays})
        return
    show_plan.moves(moves)
    for workload, why in whole.stays.items():
        out.say("[yellow]{}[/] would stay: {}", workload, why)
    out.say("nothing was done")


def _closed(name: str) -> r.Cordon:
    return r.Cordon(host=name, mode=r.HostMode.DRAINING, since=time.time())


async def _follow(fleet: Fleet, name: str, as_json: bool) -> r.Drain:
    began = time.time()
    told: set[str] = set()
    found: list[r.Drain] = []

    async def look() -> tuple[str, bool]:
        stored = await fleet.state.cordons.get(name)
        if stored is None or stored.record.drain is None:
            raise UsageError(f"the drain of {name} was given up", hint="what has moved stays where it is now")
        found[:] = [stored.record.drain]
        if not as_json:
            for finished in await _ended_since(fleet, name, began, told):
                err.say("  {}", outcome_line(finished))
        return _line(name, found[0]), found[0].record.state is not policy.State.RUNNING

    async with leading(fleet) as controller:
        try:
            await followed(look, controller)
        except asyncio.CancelledError:
            err.say("[yellow]the drain is not over[/]: `migrator drain {}` goes on with it, ", name, end="")
            err.say("`migrator uncordon {}` gives it up", name)
            raise
    ended = found[0]
    if as_json:
        out.json(_json(name, ended))
    elif ended.record.state is policy.State.EMPTY:
        out.say("[green]{} is empty[/], as it says itself: {}", name, _summary(ended.record))
    else:
        out.say("[yellow]{} is not empty[/]: {} of {} stayed", name, len(ended.stays), len(ended.record.wanted))
        for workload, why in sorted(ended.stays.items()):
            out.say("  • {}: {}", workload, why)
    return ended


async def _ended_since(fleet: Fleet, name: str, began: float, told: set[str]) -> list[r.FinishedMove]:
    ended = []
    for stored in (await fleet.state.history.all()).values():
        one = stored.record
        if one.move.drain_of == name and one.ended_at >= began and one.move.migration not in told:
            told.add(one.move.migration)
            ended.append(one)
    return ended


def _line(name: str, drain: r.Drain) -> str:
    progress = drain.progress
    if progress is None:
        return f"{name}: waiting for a controller to begin"
    line = f"{name}: {progress.done} of {progress.total} gone, {progress.running} under way, {progress.left} left"
    if progress.bytes_left:
        line += f", {size(progress.bytes_left)} to send"
    if progress.ends_at is not None and progress.left + progress.running:
        line += f", over in about {duration(max(round(progress.ends_at - time.time()), 1))}"
    return line


def _summary(record: policy.Record) -> str:
    seconds = (record.ended_at or time.time()) - record.began_at
    text = f"{len(record.moved)} moved in {duration(seconds)}"
    return text + (f", {len(record.ended)} ended or saved" if record.ended else "")


def _json(name: str, drain: r.Drain) -> dict[str, object]:
    record = drain.record
    return {
        "host": name,
        "state": record.state.value,
        "moved": record.moved,
        "ended": list(record.ended),
        "stays": drain.stays,
        "began_at": record.began_at,
        "ended_at": record.ended_at,
    }


def cordon(
    name: HostName,
    maintenance: Annotated[bool, typer.Option("--maintenance", help="It is empty and may be rebooted.")] = False,
    reason: Annotated[str, typer.Option(help="For those who wonder.")] = "",
    store: StoreUrl = "",
) -> None:
    """Let nothing new come to a host. What runs there stays."""

    async def close() -> None:
        async with opened(store, Login()) as fleet:
            await host_named(fleet, name)
            mode = r.HostMode.MAINTENANCE if maintenance else r.HostMode.CORDONED
            made = r.Cordon(host=name, mode=mode, since=time.time(), by=whoami(), reason=reason)
            try:
                await fleet.state.cordons.put(name, made, expected=0)
            except Conflict:
                raise UsageError(f"{name} is cordoned already", hint=f"migrator uncordon {name}") from None
            out.say("[yellow]{}[/] is {}: nothing new comes to it", name, mode.value)

    with reported():
        interrupts.run(lambda _: close())


@logs_in(unattended=True)
def uncordon(
    login: Login,
    name: HostName,
    bring_back: Annotated[bool, typer.Option("--bring-back", help="Move home what a drain has moved away.")] = False,
    store: StoreUrl = "",
) -> None:
    """Let workloads come to a host again. A drain of it that is under way is given up: what has moved stays there."""
    with reported():
        failed = interrupts.run(lambda _: _uncordon(store, login, name, bring_back))
    if failed:
        raise typer.Exit(NOT_EMPTY)


async def _uncordon(store: str, login: Login, name: str, bring_back: bool) -> bool:
    async with opened(store, login) as fleet:
        await host_named(fleet, name)
        drain = (await membership.uncordon(fleet.state, name, drained=bring_back)).drain
        out.say("[green]{}[/] takes workloads again", name)
        if not bring_back or drain is None:
            return False
        seen = await fleet.observer.look()
        made = policy.give_back(seen.cluster, drain.record)
        for note in made.notes:
            err.say("[yellow]note:[/] {}", note)
        if not made.moves:
            out.say("nothing is to be brought back")
            return bool(made.notes)
        done = await apply_plan(fleet, made, by=whoami())
        return done.state is not r.PlanState.DONE or bool(done.failed)
