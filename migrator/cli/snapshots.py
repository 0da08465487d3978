"""snapshot, snapshots, revive, recover: going back to what was saved."""

from __future__ import annotations

import time
from typing import Annotated

import msgspec
import typer

from migrator.cli import interrupts
from migrator.cli.control import standing_in
from migrator.cli.fleet import AsJson, HostName, StoreUrl
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import logs_in, seconds
from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet import snapshots as api
from migrator.fleet.membership import host_named, opened
from migrator.fleet.recoveries import restart_lost
from migrator.host import Login
from migrator.text import duration, size

Workload = Annotated[str, typer.Argument(metavar="WORKLOAD", help="A container, on whatever host it is.")]
NOT_ALL = 19  # exit code: not everything could be restarted


@logs_in(unattended=True)
def snapshot(
    login: Login,
    workload: Workload,
    every: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="DURATION", help="On a schedule; once and now, if not."),
    ] = None,
    keep: Annotated[
        int, typer.Option(min=1, max=100_000, help="So many; older ones are removed once none of these needs them.")
    ] = 10,
    whole_every: Annotated[
        int, typer.Option(min=1, max=1000, help="Each so many-th is whole, the others have only what is new; 1: all.")
    ] = r.WHOLE_EVERY,
    restart_when_lost: Annotated[
        bool,
        typer.Option("--restart-when-lost", help="It is restarted if its host is lost and off: `migrator recover`."),
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="No schedule any more. What was saved stays.")] = False,
    store: StoreUrl = "",
) -> None:
    """Save a container where it runs, now or on a schedule. It stands still meanwhile, and runs on."""

    async def work() -> None:
        async with opened(store, login) as fleet:
            if stop:
                await fleet.state.schedules.delete(workload)
                out.say("{} is not saved on a schedule any more", workload)
            elif every is not None:
                if every < 1:
                    raise UsageError(f"a snapshot every {duration(every)} is more than can be taken", hint="1s or more")
                made = r.SnapshotSchedule(
                    workload=workload,
                    every=every,
                    keep=keep,
                    whole_every=whole_every,
                    restart_when_lost=restart_when_lost,
                )
                await fleet.state.schedules.put(workload, made)
                out.say(
                    "{} is saved every {} by the controller that leads; {} are kept", workload, duration(every), keep
                )
            else:
                async with standing_in(fleet) as lock:
                    place, made_now = await api.take(
                        fleet.state, fleet.observer, workload, lock, keep=keep, whole_every=whole_every
                    )
                out.say("[green]saved[/] on {}: {}, {}", place, made_now.image, size(made_now.bytes))

    with reported():
        interrupts.run(lambda _: work())


@logs_in(unattended=True)
def snapshots(
    login: Login,
    workload: Annotated[str, typer.Argument(metavar="[WORKLOAD]", help="Only of this one.")] = "",
    as_json: AsJson = False,
    store: StoreUrl = "",
) -> None:
    """List what was saved on all hosts, the newest first, and what is saved on a schedule."""

    async def work() -> None:
        async with opened(store, login) as fleet:
            await fleet.observer.look()
            found = await api.images(fleet.observer, workload)
            schedules = [one.record for one in (await fleet.state.schedules.all()).values()]
        if as_json:
            out.json(
                {
                    "images": [
                        {**msgspec.to_builtins(one.image), "hosts": list(one.hosts)} for one in found
                    ],
                    "schedules": msgspec.to_builtins(schedules),
                }
            )  # fmt: skip
            return
        rows = [
            [one.image.workload, one.image.image, duration(max(time.time() - one.image.at, 0.0)) + " ago",
             size(one.image.bytes), one.image.base or "-", " ".join(one.hosts)]
            for one in found
        ]  # fmt: skip
        out.table(("WORKLOAD", "IMAGE", "SAVED", "SIZE", "ADDS TO", "ON"), rows, right=("SIZE",))
        for one in schedules:
            if workload in ("", one.workload):
                out.say("{}: every {}, {} are kept", one.workload, duration(one.every), one.keep, end="")
                out.say(", restarted if its host is lost" if one.restart_when_lost else "")
                if one.last_error:
                    out.say("  [yellow]the last time it failed:[/] {}", one.last_error)

    with reported():
        interrupts.run(lambda _: work())


@logs_in(unattended=True)
def revive(
    login: Login,
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="As `migrator snapshots` lists it.")],
    on: Annotated[str, typer.Option(metavar="HOST", help="Where; the one with most room, if not told.")] = "",
    store: StoreUrl = "",
) -> None:
    """Restart a container from what was saved. It must run nowhere: that is looked for first."""

    async def work() -> None:
        async with opened(store, login) as fleet, standing_in(fleet) as lock:
            seen = await fleet.observer.look()
            found = next((one for one in await api.images(fleet.observer) if one.image.image == image), None)
            if found is None:
                raise UsageError(f"there is no image {image!r} in the fleet", hint="`migrator snapshots` lists them")
            host = on or api.place(seen.cluster, found)
            await host_named(fleet, host)
            await api.revive(fleet.state, fleet.observer, found, host, lock)
            age = duration(max(time.time() - found.image.at, 0.0))
            out.say("[green]{}[/] runs on {}, as it was {} ago", found.image.workload, host, age)

    with reported():
        interrupts.run(lambda _: work())


@logs_in(unattended=True)
def recover(
    login: Login,
    name: HostName,
    is_off: Annotated[
        bool, typer.Option("--is-off", help="You have made sure that the host does not run, and will not by itself.")
    ] = False,
    store: StoreUrl = "",
) -> None:
    """Restart elsewhere what was saved of a lost host's workloads, if that was wanted for them.

    Only you can know that the host is off: if it is not, two copies run.
    """
    with reported():
        if not is_off:
            raise UsageError(
                f"is {name} off? A host that does not answer may still run its workloads",
                hint=f"power it off, see that it is off, then: migrator recover {name} --is-off",
            )
        whole = interrupts.run(lambda _: _recover(store, login, name))
    if not whole:
        raise typer.Exit(NOT_ALL)


async def _recover(store: str, login: Login, name: str) -> bool:
    async with opened(store, login) as fleet, standing_in(fleet) as lock:
        await host_named(fleet, name)
        await fleet.observer.look()
        if name not in fleet.observer.errors:
            raise UsageError(f"{name} answers: it is not off", hint=f"`migrator drain {name}` empties it")
        done = await restart_lost(fleet.state, fleet.observer, name, lock)
    for one in done:
        if one.host:
            out.say("[green]{}[/] runs on {}, as it was {} ago", one.workload, one.host, duration(one.age))
        else:
            err.say("[red]{}[/] was not restarted: {}", one.workload, one.why)
    if not done:
        out.say("nothing of {} was to be restarted: see `migrator snapshot --restart-when-lost`", name)
    return all(one.host for one in done)
