"""checkpoint, restart, image info: images in files and pipes, on one host."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from migrator.api import local
from migrator.api.workloads import find_workload
from migrator.cli.interrupts import aborting, held_back
from migrator.cli.output import err, out, reported
from migrator.engine.base import AfterCheckpoint
from migrator.errors import UsageError
from migrator.image.render import render_text, to_json
from migrator.imageinfo import read_info

images = typer.Typer(help="Look into images.", no_args_is_help=True)

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def checkpoint(
    target: Annotated[str, typer.Argument(metavar="PID|NAME", help="Root of the tree, or a container's name.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a file, not standard output.")
    ] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End the tasks once they are saved.")] = False,
    leave_running: Annotated[bool, typer.Option("--leave-running", help="Let them run on (the default).")] = False,
    leave_stopped: Annotated[
        bool, typer.Option("--leave-stopped", help="Leave them stopped; SIGCONT resumes.")
    ] = False,
) -> None:
    """Save a running process tree or container to a stream: a file, a pipe, a socket.

    A program may save itself: started below the tree, migrator leaves itself out of the image, and has ended
    with status 0 in the copy.
    """
    with reported():
        if kill + leave_running + leave_stopped > 1:
            raise UsageError("--kill, --leave-running and --leave-stopped exclude one another")
        after = AfterCheckpoint.KILL if kill else AfterCheckpoint.STOP if leave_stopped else AfterCheckpoint.RUN
        workload = find_workload(target)
        to_file = output is not None and str(output) != "-"
        if not to_file and sys.stdout.isatty():
            raise UsageError("an image is not for a terminal", hint=f"migrator checkpoint {target} -o FILE, or > FILE")
        with aborting():
            where = output if output is not None and to_file else sys.stdout.fileno()
            local.checkpoint(workload, where, after=after, critical=held_back)


def restart(
    source: Annotated[
        Path | None, typer.Option("-i", "--input", metavar="FILE", help="Read a file, not standard input.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once the tasks run; prints the pid.")] = False,
    pidfile: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the root's pid to this file.")] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen", help="Leave the tasks frozen, for `migrator thaw`; prints the pid.")
    ] = False,
    bridge: Annotated[str, typer.Option(help="For a container: the bridge of this host.")] = "",
) -> None:
    """Restart what was saved. Waits for its end and exits as it does, unless --detach or --frozen."""
    with reported():
        with aborting():
            made = local.restart(
                _image(source),
                frozen=frozen,
                bridge=bridge,
                built=lambda pid: _write_pidfile(pidfile, pid),
                waiting=lambda: err.print("[dim]the original is still here: reading to the end of the image first[/]"),
                critical=held_back,
            )
        if frozen:
            err.print(f"[dim]pid {made.pid} is frozen in {made.cgroup}; `migrator thaw {made.pid}` lets it run[/]")
        if detach or frozen:
            out.print(made.pid)
            return
        for number in _FORWARDED:  # signals meant for us are the root's
            signal.signal(number, lambda n, _frame: _forward(made.pid, n))
        status = made.wait()
    raise typer.Exit(status)


def _image(path: Path | None) -> Path | int:
    if path is not None and str(path) != "-":
        return path
    if sys.stdin.isatty():
        raise UsageError("no image on standard input", hint="migrator restart -i FILE, or < FILE")
    return 0


def _write_pidfile(path: Path | None, pid: int) -> None:
    if path is None:
        return
    try:
        path.write_text(f"{pid}\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="nothing was restarted") from error


def _forward(root: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(root, number)


@images.command("info")
def info(
    path: Annotated[str, typer.Argument(metavar="FILE|-", help="An image, whole or broken; - is standard input.")],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    errors: Annotated[bool, typer.Option("-e", "--errors", help="Only the errors.")] = False,
    tree: Annotated[bool, typer.Option("-p", "--tree", help="Only the task tree.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Every mapping and object.")] = False,
) -> None:
    """Show what is in an image: tree, memory, descriptors, errors. Exits with 6 if it is not whole."""
    with reported():
        found = read_info(path)
        if as_json:
            print(to_json(found))
        else:
            print(render_text(found, errors=errors, tree=tree, verbose=verbose))
    if not found.whole:
        raise typer.Exit(6)
