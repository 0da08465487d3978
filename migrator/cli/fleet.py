"""hosts, join, leave, ps --all: a fleet as it is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.table import Table
from rich.text import Text

from migrator.cli import interrupts
from migrator.cli.output import err, out, reported, table_of
from migrator.cli.parameters import logs_in
from migrator.cli.watching import Interval, Watch, interval_of, watched
from migrator.errors import UsageError
from migrator.fleet import membership
from migrator.fleet.cluster import Seen
from migrator.fleet.membership import Fleet
from migrator.host import Login
from migrator.text import duration, printable, size
from policies.model import Host, HostState, Workload

StoreUrl = Annotated[
    str,
    typer.Option(
        metavar="URL",
        envvar="MIGRATOR_STORE",
        show_default="sqlite:/var/lib/migrator/fleet.db",
        help="Where the fleet's state is: sqlite:FILE, or etcd:http://HOST:2379,…",
    ),
]
PrometheusUrl = Annotated[
    str,
    typer.Option(
        "--prometheus",
        metavar="URL",
        envvar="MIGRATOR_PROMETHEUS",
        help="Its node exporters say how loaded hosts are; else the agents.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]
HostName = Annotated[str, typer.Argument(metavar="HOST", help="A host of the fleet, by its name.")]

_BAR = 6

_STYLES = {
    HostState.ACTIVE: "green",
    HostState.CORDONED: "yellow",
    HostState.DRAINING: "yellow",
    HostState.MAINTENANCE: "cyan",
    HostState.LOST: "red",
}


@logs_in(unattended=True)
def hosts(
    login: Login,
    as_json: AsJson = False,
    watch: Watch = False,
    interval: Interval = None,
    prometheus: PrometheusUrl = "",
    store: StoreUrl = "",
) -> None:
    """List the hosts of the fleet: state, load, pressure, and how many workloads each has."""
    rows = _hosts_json if as_json else None
    _show(store, login, _hosts_table, rows, watch=watch, interval=interval, prometheus=prometheus)


def ps_all(store: str, *, as_json: bool, rate: float, watch: bool, interval: float | None) -> None:
    """`migrator ps --all`."""
    login = Login(**_login_of_environment())
    as_rows = _workloads_json if as_json else None
    _show(store, login, _workloads_table, as_rows, rate=rate, watch=watch, interval=interval)


@logs_in(unattended=True)
def join(
    login: Login,
    address: Annotated[list[str], typer.Argument(metavar="HOST[:PORT]", help="Its agent; several may be given.")],
    label: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For rules; repeatable.")] = None,
    store: StoreUrl = "",
) -> None:
    """Take hosts into the fleet whose agents let this machine in. `migrator init` sees to that as well."""
    with reported():
        labels = labels_of(label or [])

        async def all_of_them() -> None:
            async with membership.opened(store, login) as fleet:
                for one in address:
                    host = await membership.join(fleet, one, labels=labels)
                    out.say(
                        "[green]{}[/] is of the fleet: {} cores, {}, kernel {}",
                        host.name,
                        host.cpus,
                        size(host.memory_bytes),
                        host.kernel,
                    )

        interrupts.run(lambda _: all_of_them())


@logs_in(unattended=True)
def leave(login: Login, name: HostName, store: StoreUrl = "") -> None:
    """Take a host out of the fleet. What runs there runs on, and is not moved any more."""

    async def forget() -> None:
        async with membership.opened(store, login) as fleet:
            await membership.host_named(fleet, name)
            await fleet.state.unregister(name)
            out.say("{} is not of the fleet any more; what runs there runs on", name)

    with reported():
        interrupts.run(lambda _: forget())


def _show(
    store: str,
    login: Login,
    table: Callable[[Seen], Table],
    rows: Callable[[Seen], list[dict[str, object]]] | None,
    *,
    watch: bool,
    interval: float | None,
    rate: float = 0.0,
    prometheus: str = "",
) -> None:
    """Once, or again and again; with `rows` for programs, each look a line of JSON if there are several."""
    with reported():
        every = interval_of(watch, interval)

        async def once() -> None:
            async with membership.opened(store, login, prometheus=prometheus) as fleet:
                seen = await look(fleet, rate)
            if rows is not None:
                out.json(rows(seen))
            else:
                out.show(table(seen))
                for note in _notes(fleet, seen):
                    err.show(note)

        if not watch:
            interrupts.run(lambda _: once())
            return

    async def again() -> AsyncIterator[Group | None]:
        async with membership.opened(store, login, prometheus=prometheus) as fleet:
            while True:
                seen = await look(fleet, rate)
                if rows is not None:
                    out.json(rows(seen), indent=None)
                yield Group(table(seen), *_notes(fleet, seen)) if rows is None else None

    watched(again, every=every)


async def look(fleet: Fleet, rate: float) -> Seen:
    """Raises UsageError if there is nothing to look at."""
    seen = await fleet.observer.look(rate=rate)
    if not seen.cluster.hosts:
        raise UsageError("the fleet has no hosts", hint="`migrator join HOST` takes one in, `migrator init` many")
    return seen


def _notes(fleet: Fleet, seen: Seen) -> list[Text]:
    """What a person should know about what was shown."""
    silent = (f"{name} does not answer: {error}" for name, error in sorted(fleet.observer.errors.items()))
    return [Text.assemble(("note:", "yellow"), " ", printable(text)) for text in (*seen.notes, *silent)]


def _hosts_table(seen: Seen) -> Table:
    count: dict[str, int] = {}
    for one in seen.cluster.workloads:
        count[one.host] = count.get(one.host, 0) + 1
    columns = ("NAME", "STATE", "CPU", "MEMORY", "NETWORK", "PRESSURE", "WORKLOADS", "KERNEL", "LABELS")
    rows = [_host_cells(host, count.get(host.name, 0)) for host in seen.cluster.hosts]
    return table_of(columns, rows, right=("NETWORK", "WORKLOADS"))


def _host_cells(host: Host, workloads: int) -> list[object]:
    state = Text(host.state.value, style=_STYLES[host.state])
    labels = " ".join(f"{key}={value}" for key, value in sorted(host.labels.items())) or "-"
    if host.state is HostState.LOST:
        return [host.name, state, "-", "-", "-", "-", "?", "-", labels]
    pressure = max(host.pressure.cpu, host.pressure.memory, host.pressure.io)
    return [
        host.name,
        state,
        bar(host.load.cpu / host.capacity.cpu),
        bar(host.load.memory / host.capacity.memory),
        f"{size(host.load.network)}/s",
        f"{pressure:.0%}",
        workloads,
        host.kernel or "-",
        labels,
    ]


def bar(share: float) -> Text:
    """A small bar and what it stands for."""
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    style = "red" if share > 0.9 else "yellow" if share > 0.75 else "green"
    made = Text("━" * full, style=style, no_wrap=True)
    made.append("━" * (_BAR - full), style="bright_black")
    made.append(f" {share:.0%}", style="")
    return made


def _workloads_table(seen: Seen) -> Table:
    columns = ("NAME", "HOST", "CPU", "MEMORY", "DIRTY", "NETWORK", "MOVED", "NOTES")
    rows = []
    for one in sorted(seen.cluster.workloads, key=lambda one: (one.host, one.name)):
        notes = []
        if one.moving_to:
            notes.append(f"moving to {one.moving_to}")
        if one.pinned:
            notes.append("pinned")
        notes += [f"with {group}" for group in one.affinity] + [f"apart from {group}" for group in one.anti_affinity]
        if one.downtime_budget is not None:
            notes.append(f"stops at most {duration(one.downtime_budget)}")
        moved = duration(seen.cluster.time - one.last_moved) + " ago" if one.last_moved is not None else "-"
        rows.append(
            [
                one.name,
                one.host,
                f"{one.used.cpu:.2f}",
                size(one.used.memory),
                f"{size(one.dirty_rate)}/s" if one.dirty_rate else "-",
                f"{size(one.used.network)}/s",
                moved,
                "; ".join(notes) or "-",
            ]
        )
    return table_of(columns, rows, right=("CPU", "MEMORY", "DIRTY", "NETWORK"))


def _hosts_json(seen: Seen) -> list[dict[str, object]]:
    return [_host_json(host, seen) for host in seen.cluster.hosts]


def _host_json(host: Host, seen: Seen) -> dict[str, object]:
    return {
        "name": host.name,
        "state": host.state.value,
        "capacity": _amount(host.capacity),
        "load": _amount(host.load),
        "pressure": {"cpu": host.pressure.cpu, "memory": host.pressure.memory, "io": host.pressure.io},
        "labels": host.labels,
        "kernel": host.kernel,
        "engines": sorted(host.engines),
        "cpu_features": sorted(host.cpu_features),
        "observed_at": host.observed_at,
        "workloads": [one.name for one in seen.cluster.workloads if one.host == host.name],
    }


def _amount(amount: Any) -> dict[str, float]:
    return {"cpu": amount.cpu, "memory": amount.memory, "network": amount.network}


def _workloads_json(seen: Seen) -> list[dict[str, object]]:
    return [_workload_json(one) for one in seen.cluster.workloads]


def _workload_json(one: Workload) -> dict[str, object]:
    return {
        "name": one.name,
        "host": one.host,
        "used": _amount(one.used),
        "dirty_bytes_per_second": one.dirty_rate,
        "moving_to": one.moving_to,
        "last_moved": one.last_moved,
        "pinned": one.pinned,
        "affinity": list(one.affinity),
        "anti_affinity": list(one.anti_affinity),
        "downtime_budget": one.downtime_budget,
        "value": one.value,
    }


def labels_of(texts: list[str]) -> dict[str, str]:
    labels = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or not equals:
            raise UsageError(f"{text!r} is no label", hint="such as zone=a")
        labels[key] = value
    return labels


def _login_of_environment() -> dict[str, Any]:
    import os
    from pathlib import Path

    found = {"identity": os.environ.get("MIGRATOR_IDENTITY"), "known_hosts": os.environ.get("MIGRATOR_KNOWN_HOSTS")}
    return {name: Path(value) for name, value in found.items() if value}
