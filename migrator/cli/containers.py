"""run, ps, stop, thaw: containers on this host."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from migrator import container
from migrator.cli.output import duration, err, out, reported, size
from migrator.container import state, switchover
from migrator.errors import UsageError
from migrator.linux import cgroup
from migrator.recovery.journal import Journal, JournalError, boot_id, journal_directory


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
    with reported():
        spec = container.spec_for(
            name, argv, bridge=bridge, ip=ip, gateway=gateway, hostname=hostname, root=root, env=env,
            tmpfs=tmpfs, cwd=workdir,
        )  # fmt: skip
        made = container.run(spec)
        if detach:
            out.print(made.init_pid)
            return
        err.print(f"[dim]{name}: pid {made.init_pid}; its output goes to {made.spec.effective_log}[/]")
        try:
            status = container.wait(made)
        except KeyboardInterrupt:
            container.stop(name)
            raise typer.Exit(130) from None
        container.remove(name)
    raise typer.Exit(status or 0)


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    rate: Annotated[float, typer.Option(help="Seconds over which to measure dirty rates; 0 for none.")] = 0.0,
) -> None:
    """List the containers of this host: state, memory, and how fast they write to it."""
    with reported():
        rows = container.rows()
        rates = _dirty_rates(rows, rate) if rate > 0 else {}
        if as_json:
            print(json.dumps([{**asdict(r), "dirty_bytes_per_second": rates.get(r.name)} for r in rows], indent=2))
            return
        table = Table(box=None, pad_edge=False, header_style="dim")
        for title in ("NAME", "HOST", "STATE", "PID", "TASKS", "MEMORY", "DIRTY", "AGE", "ADDRESSES"):
            table.add_column(title, justify="right" if title in ("PID", "TASKS", "MEMORY", "DIRTY") else "left")
        for row in rows:
            dirty = f"{size(rates[row.name])}/s" if row.name in rates else "-"
            table.add_row(
                row.name, row.host, row.state, str(row.init_pid or "-"), str(row.pids), size(row.memory), dirty,
                duration(row.age), " ".join(row.addresses) or "-",
            )  # fmt: skip
        out.print(table)


def _dirty_rates(rows: list[container.Row], seconds: float) -> dict[str, float]:
    """Bytes per second written, by container: two sweeps of dirty tracking, `seconds` apart."""
    from migrator.api.workloads import find_workload
    from migrator.engine.select import select

    found: dict[str, float] = {}
    sink = os.open("/dev/null", os.O_WRONLY)
    try:
        for row in rows:
            if row.state != "running":
                continue
            workload = find_workload(row.name)
            with select().engine.source(workload.pid, sink, workload.source_options()) as source:
                found[row.name] = source.dirty_rate(seconds)
    finally:
        os.close(sink)
    return found


def stop(name: Annotated[str, typer.Argument(help="A container of this host.")]) -> None:
    """End a container: SIGTERM, and SIGKILL after ten seconds."""
    with reported():
        found = container.get(name)
        _refuse_if_moving(found.name, found.cgroup)
        container.stop(name)


def thaw(
    target: Annotated[str, typer.Argument(metavar="PID|NAME", help="Frozen by `restart --frozen`.")],
) -> None:
    """Let frozen tasks run. Refused while a migration of them is not decided: see `migrator settle`."""
    with reported():
        found = container.find(target)
        if found is not None:
            group = cgroup.Cgroup.at(found.cgroup)
        elif target.isdigit() and os.path.exists(f"/proc/{target}"):
            group = cgroup.Cgroup.of(int(target))
            found = state.of_pid(int(target))
        else:
            raise UsageError(f"there is no container and no process {target!r} on this host")
        with group:
            _refuse_if_moving(found.name if found is not None else "", str(group.path))
            if found is not None:
                switchover.reopen(found)
                found.settled()
            group.thaw()


def _refuse_if_moving(name: str, path: str) -> None:
    """Where a migration is open, only its journal says who may run: a thaw by hand could make two copies."""
    folder = journal_directory()
    for file in sorted(folder.glob("*.journal")) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError, JournalError), Journal.open(file) as journal:
            facts = journal.facts
            mine = (name and facts.container == name) or Path(facts.cgroup or "-").name == Path(path).name
            if mine and not journal.settled and facts.boot_id in ("", boot_id()):
                raise UsageError(
                    f"{name or path} takes part in migration {facts.migration}, which is not over",
                    hint="`migrator settle` finishes it, or says what to decide",
                )
