"""migrate, check, agent, settle: between hosts."""

from __future__ import annotations

import asyncio
import logging
import re
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from migrator import container, host, model
from migrator.agent import AgentSettings, run_daemon, run_stdio
from migrator.api.workloads import Workload, find_workload, trees
from migrator.cli.output import duration, err, out, reported
from migrator.cli.progress import Display, show_result
from migrator.container.switchover import NetworkLock
from migrator.engine.select import select
from migrator.errors import Fate, MigratorError, UsageError
from migrator.recovery.journal import attended, journal_directory
from migrator.recovery.settle import override
from migrator.session.preflight import PreflightReport
from migrator.session.source import SourceSession, SourceSettings
from transport import keys, ssh

_BUSY_SECONDS = 15.0  # an agent that cannot reach the other host gives up before that

T = TypeVar("T")

Target = Annotated[str, typer.Argument(metavar="PID|NAME", help="Root of a process tree, or a container.")]
Peer = Annotated[str, typer.Argument(metavar="[USER@]HOST[:PORT]", help="The other host: any sshd, or an agent.")]
Identity = Annotated[
    Path | None,
    typer.Option("-i", "--identity", envvar="MIGRATOR_IDENTITY", help="Private key to log in with."),
]
KnownHosts = Annotated[
    Path | None,
    typer.Option(envvar="MIGRATOR_KNOWN_HOSTS", help="File of host keys; those of ssh by default."),
]
AcceptNew = Annotated[bool, typer.Option("--accept-new-host-key", help="Pin the key of a host never seen before.")]
RemoteCommand = Annotated[str, typer.Option(help="What starts migrator there, over a plain sshd.")]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON on standard output.")]
CopyFiles = Annotated[bool, typer.Option("--copy-files", help="Carry along files that differ or lack there.")]
CopyPath = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Carry along this file, or all below this directory; may be repeated."),
]


def migrate(
    target: Target,
    peer: Peer,
    max_downtime: Annotated[
        str, typer.Option(help="Budget, as 20ms or 0.5s; the best that can be had if not given.")
    ] = "",
    timeout: Annotated[str, typer.Option(help="Give up if it does not converge within this.")] = "10m",
    bandwidth: Annotated[str, typer.Option(help="Cap until the freeze, memory and files, as 50MB (per s).")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find out whether it could.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="No pre-copy: stop, copy, restart.")] = False,
    copy_files: CopyFiles = False,
    copy_path: CopyPath = None,
    as_json: AsJson = False,
    identity: Identity = None,
    known_hosts: KnownHosts = None,
    accept_new_host_key: AcceptNew = False,
    remote_command: RemoteCommand = ssh.COMMAND,
) -> None:
    """Move a running process tree or container to another host while it keeps working."""
    with reported():
        login = host.Login(identity, known_hosts, remote_command, accept_new_host_key)
        workload = find_workload(target)
        copy_files = copy_files or bool(copy_path)
        settings = SourceSettings(
            migration=host.new_migration(),
            peer=peer,
            max_downtime=parse_duration(max_downtime) if max_downtime else None,
            timeout=parse_duration(timeout),
            bandwidth=parse_size(bandwidth) if bandwidth else 0.0,
            dry_run=dry_run,
            copy_files=copy_files,
            trees=trees(workload, copy_files, copy_path or []),
            cold=cold,
        )
        _finish(_interruptible(_migrate(workload, settings, login)), as_json)


def check(
    target: Target,
    peer: Peer,
    copy_files: CopyFiles = False,
    copy_path: CopyPath = None,
    as_json: AsJson = False,
    identity: Identity = None,
    known_hosts: KnownHosts = None,
    accept_new_host_key: AcceptNew = False,
    remote_command: RemoteCommand = ssh.COMMAND,
) -> None:
    """Find out whether a workload can be moved to a host, and if not why. Touches nothing."""
    with reported():
        login = host.Login(identity, known_hosts, remote_command, accept_new_host_key)
        workload = find_workload(target)
        copy_files = copy_files or bool(copy_path)
        settings = SourceSettings(
            migration=host.new_migration(),
            peer=peer,
            dry_run=True,
            copy_files=copy_files,
            trees=trees(workload, copy_files, copy_path or []),
        )
        _finish(_interruptible(_migrate(workload, settings, login)), as_json)


def _finish(done: tuple[model.MigrationResult, PreflightReport | None], as_json: bool) -> None:
    result, report = done
    show_result(err, result)
    if as_json:
        print(model.to_json(result).decode())
    elif result.outcome is model.Outcome.DRY_RUN:
        out.print(f"[green]it can be moved[/] to {result.destination}")
        if report is not None:
            out.print(
                f"  {len(result.pids)} processes; {report.files} files compared;"
                f" predicted downtime {duration(report.predicted_downtime)} plus the last dirty pages"
            )
        for warning in result.warnings:
            out.print(f"  [yellow]note:[/] {warning}")


async def _migrate(
    workload: Workload, settings: SourceSettings, login: host.Login
) -> tuple[model.MigrationResult, PreflightReport | None]:
    chosen = await asyncio.to_thread(select)
    for one in await host.settle(login):
        err.print(f"[yellow]settled[/] migration {one.migration} of an earlier run: {one.detail}", markup=True)
        if one.fate is Fate.FROZEN:
            err.print("  [dim]it stays open; `migrator settle` tries again[/]")
    try:
        options = workload.source_options()
        here = await asyncio.to_thread(host.facts, chosen)
        link = await login.connect(settings.peer)
    except MigratorError as error:
        error.fate = Fate.SOURCE
        raise
    network = None
    if workload.container is not None:
        if workload.container.ifindex:
            network = NetworkLock(workload.container)
        settings = SourceSettings(
            **{
                **vars(settings),
                "container": workload.container.name,
                "container_spec": options.container_spec,
            }
        )
    with Display(err) as display:
        session = SourceSession(
            settings,
            lambda fd: chosen.engine.source(workload.pid, fd, options),
            link,
            here,
            reconnect=lambda: login.connect(settings.peer),
            network=network,
            on_event=display,
        )
        try:
            result = await session.run()
        finally:
            await link.close()
    if result.outcome is model.Outcome.MIGRATED and workload.container is not None:
        await asyncio.to_thread(container.remove, workload.container.name)
    return result, session.report


def _interruptible(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end; SIGINT and SIGTERM cancel it, which is an abort."""

    async def main() -> T:
        task = asyncio.ensure_future(work)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, task.cancel)
        return await task

    try:
        return asyncio.run(main())
    except asyncio.CancelledError as error:
        cause = error.__cause__
        err.print("[yellow]aborted[/]: the workload runs on the source, as if nothing had been asked")
        if isinstance(cause, MigratorError) and cause.fate is Fate.FROZEN:
            raise cause from None
        raise typer.Exit(130) from None


def agent(
    stdio: Annotated[bool, typer.Option("--stdio", help="Serve one link on standard input and output.")] = False,
    listen: Annotated[str, typer.Option(help="ADDRESS:PORT of the SSH server.")] = "0.0.0.0:7022",
    host_key: Annotated[Path | None, typer.Option(help="Private host key; made if missing.")] = None,
    authorized_keys: Annotated[Path | None, typer.Option(help="Who may come in.")] = None,
    metrics: Annotated[str, typer.Option(help='ADDRESS:PORT for Prometheus; "" for none.')] = "",
    bridge: Annotated[str, typer.Option(help="The bridge of this host for containers that arrive.")] = "",
    identity: Identity = None,
    known_hosts: KnownHosts = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose")] = False,
) -> None:
    """Serve other hosts. Settles first what an agent that died has left."""
    level = logging.DEBUG if verbose else logging.INFO
    logging.basicConfig(level=level, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("asyncssh").setLevel(logging.WARNING)
    with reported():
        if stdio:
            asyncio.run(run_stdio(bridge))
            return
        address, port = parse_address(listen)
        folder = Path("/etc/migrator")
        asyncio.run(
            run_daemon(
                AgentSettings(
                    address,
                    port,
                    host_key or folder / "host_key",
                    authorized_keys or folder / "authorized_keys",
                    metrics,
                    bridge,
                    host.Login(identity, known_hosts),
                )
            )
        )


def settle(
    migration: Annotated[str, typer.Argument(help="One that awaits a decision; all, if not given.")] = "",
    here: Annotated[bool, typer.Option("--here", help="Let it run here: it does not and will not run there.")] = False,
    away: Annotated[bool, typer.Option("--away", help="Kill it here: it runs there.")] = False,
    identity: Identity = None,
    known_hosts: KnownHosts = None,
) -> None:
    """Finish or undo migrations whose agent died, or decide one whose other side cannot be reached."""
    with reported():
        if here and away:
            raise UsageError("--here and --away exclude one another")
        if here or away:
            if not migration:
                raise UsageError("which migration?", hint="`migrator settle` lists those that are open")
            fate = override(journal_directory(), migration, here=here, tools=host.tools())
            out.print(f"migration {migration}: {fate.value}")
            return
        login = host.Login(identity, known_hosts)
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            settled, busy = host.settle_now(login), attended(journal_directory())
            if settled or not busy or time.monotonic() > end:
                break
            time.sleep(0.1)  # an agent may be at it, and give up
        for one in busy:
            out.print(f"migration {one} is under way, or being settled by the agent: see its log")
        if migration and migration not in [*busy, *(one.migration for one in settled)]:
            raise UsageError(
                f"migration {migration!r} is not open on this host", hint="`migrator settle` lists those that are"
            )
        for done in settled:
            out.print(f"migration {done.migration}, as its {done.role.value}: {done.detail}", markup=False)
        if not settled and not busy:
            out.print("nothing is open")
        if any(one.fate is Fate.FROZEN for one in settled):
            raise typer.Exit(9)


def keygen(
    path: Annotated[Path, typer.Argument(help="Where the private key goes; made if missing.")] = Path(
        "/etc/migrator/host_key"
    ),
) -> None:
    """Make a key, and print its public line and fingerprint."""
    with reported():
        key = keys.ensure_key(path)
        out.print(keys.public_line(key), markup=False)
        err.print(keys.fingerprint(key), markup=False)


def parse_duration(text: str) -> float:
    """Seconds of "250ms", "2s", "10m", "1h" or a plain number of seconds."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(us|ms|s|m|h|)", text)
    if found is None:
        raise UsageError(f"{text!r} is no duration", hint="such as 20ms, 1.5s, 10m")
    scale = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0}
    return float(found[1]) * scale[found[2]]


def parse_size(text: str) -> float:
    """Bytes of "50MB", "1GiB", "800k" or a plain number."""
    found = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([kKMGT]?)(i?)B?(/s)?", text)
    if found is None:
        raise UsageError(f"{text!r} is no number of bytes", hint="such as 50MB or 1GiB")
    power = " kMGT".index(found[2].replace("K", "k") or " ")
    return float(found[1]) * float(1024 if found[3] else 1000) ** power


def parse_address(text: str) -> tuple[str, int]:
    address, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"{text!r} is no ADDRESS:PORT")
    return address.strip("[]"), int(port)
