"""run, ps, stop, thaw: containers on this host."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from migrator.api import containers
from migrator.cli import interrupts
from migrator.cli.output import err, out, reported, table_of
from migrator.cli.parameters import Name, Target
from migrator.cli.watching import Interval, Watch, interval_of, watched
from migrator.text import duration, size

_COLUMNS = ("NAME", "HOST", "STATE", "PID", "TASKS", "MEMORY", "DIRTY", "AGE", "ADDRESSES")

AT_ONCE = 0.2  # seconds: whoever ends before has not begun what it is for


def run(
    argv: Annotated[
        list[str], typer.Argument(metavar="COMMAND [ARG]", help="The command, after `--`; it is process 1.")
    ],
    name: Annotated[str, typer.Option(help="Its name, the same on every host.")],
    ip: Annotated[
        list[str] | None, typer.Option(help="ADDRESS/LENGTH on its network; moves with it. Repeatable.")
    ] = None,
    bridge: Annotated[
        str | None, typer.Option(help='The bridge to attach to; made if it is migrator0. "" for none.')
    ] = None,
    gateway: Annotated[str, typer.Option(help="Default route.")] = "",
    hostname: Annotated[str, typer.Option(help="Its host name; the name by default.")] = "",
    root: Annotated[str, typer.Option(help="A directory as its root; the host's by default.")] = "",
    env: Annotated[
        list[str] | None, typer.Option("-e", "--env", help="KEY=VALUE, or KEY to pass on. Repeatable.")
    ] = None,
    tmpfs: Annotated[list[str] | None, typer.Option(help="PATH[:OPTIONS], a tmpfs of its own. Repeatable.")] = None,
    workdir: Annotated[str, typer.Option("-w", "--workdir", help="Its working directory.")] = "/",
    detach: Annotated[bool, typer.Option("-d", "--detach", help="Return once it runs.")] = False,
) -> None:
    """Start a command in a container, so that it can always be moved."""

    async def whole(_: interrupts.Signals) -> int:
        output = containers.Output(spec)
        made = await containers.run(spec)
        if await containers.ends(made, within=AT_ONCE):
            status = await containers.wait(made)
            _tell_end(name, status, output)
            return status
        if detach:
            out.say("{}", made.init_pid)
            return 0
        err.say("[dim]{}: pid {}; its output goes to {}[/]", name, made.init_pid, made.spec.effective_log)
        try:
            return await containers.wait(made)
        except asyncio.CancelledError:
            await containers.stop(name)
            return 128 + signal.SIGINT

    with reported():
        spec = containers.spec_for(
            name, argv, bridge=bridge, ip=ip, gateway=gateway, hostname=hostname, root=root, env=env,
            tmpfs=tmpfs, cwd=workdir,
        )  # fmt: skip
        status = interrupts.run(whole, on=(signal.SIGINT,))
    raise typer.Exit(status)


def _tell_end(name: str, status: int, output: containers.Output) -> None:
    how = f"by signal {status - 128}" if status > 128 else f"with exit status {status}"
    lines = output.lines(10)
    if lines:
        err.say("{}: the command has ended {}; its output, in {}:", name, how, output.path)
    else:
        err.say("{}: the command has ended {}, and there is no output in {}", name, how, output.path)
    for line in lines:
        err.say("  {}", line)


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    rate: Annotated[float, typer.Option(help="Seconds over which to measure dirty rates; 0 for none.")] = 0.0,
    everywhere: Annotated[bool, typer.Option("--all", "-a", help="Those of all hosts of the fleet.")] = False,
    watch: Watch = False,
    interval: Interval = None,
    store: Annotated[str, typer.Option(metavar="URL", envvar="MIGRATOR_STORE", help="With --all: the fleet's.")] = "",
) -> None:
    """List the containers of this host: state, memory, and how fast they write to it. Or of a whole fleet."""
    if everywhere:
        from migrator.cli.fleet import ps_all

        ps_all(store, as_json=as_json, rate=rate, watch=watch, interval=interval)
        return
    with reported():
        every = interval_of(watch, interval)
    if watch:
        watched(lambda: _tables(rate), every=every)
        return
    with reported():
        rows = interrupts.run(lambda _: containers.list(rate=rate))
        if as_json:
            out.json([asdict(row) for row in rows])
        else:
            out.table(_COLUMNS, map(_cells, rows), right=("PID", "TASKS", "MEMORY", "DIRTY"))


async def _tables(rate: float) -> AsyncIterator[Table]:
    while True:
        rows = await containers.list(rate=rate)
        yield table_of(_COLUMNS, map(_cells, rows), right=("PID", "TASKS", "MEMORY", "DIRTY"))


def _cells(row: containers.Row) -> list[object]:
    dirty = row.dirty_bytes_per_second
    return [
        row.name,
        row.host,
        row.state,
        row.init_pid or "-",
        row.pids,
        size(row.memory),
        f"{size(dirty)}/s" if dirty is not None else "-",
        duration(row.age),
        " ".join(row.addresses) or "-",
    ]


def stop(name: Name) -> None:
    """End a container: SIGTERM, and SIGKILL after ten seconds."""
    with reported():
        interrupts.run(lambda _: containers.stop(name))


def thaw(target: Target) -> None:
    """Let frozen tasks run, as `restart --frozen` has left them. Refused while a migration of them is not decided:
    see `migrator settle`."""
    with reported():
        interrupts.run(lambda _: containers.thaw(target))
