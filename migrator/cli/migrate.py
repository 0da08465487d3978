"""migrate, check: between hosts."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

import migrator
from migrator import model
from migrator.cli import interrupts
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import AsJson, CopyFiles, CopyPath, EngineName, Peer, Target, logs_in, seconds, size
from migrator.cli.progress import Display, show_result
from migrator.host import Login
from migrator.text import duration


class OnOverrun(StrEnum):
    ABORT = "abort"
    CONTINUE = "continue"


@logs_in()
def migrate(
    target: Target,
    peer: Peer,
    login: Login,
    max_downtime: Annotated[
        float | None,
        typer.Option(parser=seconds, metavar="DURATION", help="As 20ms or 0.5s; the best that can be had, if not."),
    ] = None,
    on_overrun: Annotated[
        OnOverrun,
        typer.Option(help="A stop over --max-downtime by a quarter, at least 20 ms: run on and try again, or go on."),
    ] = OnOverrun.ABORT,
    timeout: Annotated[
        float,
        typer.Option(
            parser=seconds, metavar="DURATION", show_default="10m", help="Give up if it does not converge within this."
        ),
    ] = 600.0,
    bandwidth: Annotated[
        float,
        typer.Option(
            parser=size, metavar="SIZE", show_default="none",
            help="Cap until the freeze, memory and files, as 50MB (per s).",
        ),
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only find out whether it could: as `check`.")] = False,
    cold: Annotated[bool, typer.Option("--cold", help="No pre-copy: stop, copy, restart.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Look at the copy before it runs: it must be what was saved, or goes.")
    ] = False,
    copy_files: CopyFiles = False,
    copy_path: CopyPath = None,
    engine: EngineName = "",
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Move a running process tree or container to another host while it keeps working."""
    settings = migrator.MigrateSettings(
        max_downtime=max_downtime,
        on_overrun=on_overrun.value,
        timeout=timeout,
        bandwidth=bandwidth,
        cold=cold,
        copy_files=copy_files,
        copy_paths=tuple(copy_path or ()),
        engine=engine,
        verify=verify,
    )
    if dry_run:
        _check(target, peer, settings, login, as_json)
        return
    with reported(), _aborted(), Display(err) as display:
        result = interrupts.run(
            lambda _: migrator.migrate(target, peer, settings=settings, login=login, on_event=display)
        )
    show_result(err, result)
    if as_json:
        out.json(model.to_json(result), indent=None)


@logs_in()
def check(
    target: Target,
    peer: Peer,
    login: Login,
    copy_files: CopyFiles = False,
    copy_path: CopyPath = None,
    engine: EngineName = "",
    as_json: AsJson = False,
) -> None:
    """Find out whether a workload can be moved to a host, and if not why. Changes nothing."""
    settings = migrator.MigrateSettings(copy_files=copy_files, copy_paths=tuple(copy_path or ()), engine=engine)
    _check(target, peer, settings, login, as_json)


def _check(target: str, peer: str, settings: migrator.MigrateSettings, login: Login, as_json: bool) -> None:
    with reported(), _aborted(), Display(err) as display:
        found = interrupts.run(lambda _: migrator.check(target, peer, settings=settings, login=login, on_event=display))
    if as_json:
        out.json(model.to_json(found.result), indent=None)
        return
    out.say("[green]it can be moved[/] to {}", found.result.destination)
    out.say(
        "  {} processes; {} files compared; predicted downtime {} plus the last dirty pages",
        found.processes, found.files, duration(found.predicted_downtime),
    )  # fmt: skip
    out.say("  engine {}: {}", found.result.engine, found.result.engine_reason)
    for note in found.notes:
        out.say("  [yellow]note:[/] {}", note)


class _aborted:
    """An interrupt of a migration is an abort, and says where the workload is."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, interrupts.Interrupted):
            err.say("[yellow]aborted[/]: the workload runs on the source, as if nothing had been asked")
            raise typer.Exit(130) from None
