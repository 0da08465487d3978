"""checkpoint, restart, image info: images in files and pipes, on one host."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import migrator
from migrator.cli import interrupts
from migrator.cli.output import err, out, reported
from migrator.cli.parameters import EngineName, Target
from migrator.errors import UsageError
from migrator.image.render import render_text, to_json
from migrator.text import size

images = typer.Typer(help="Look into images.", no_args_is_help=True)

_STDIN, _STDOUT = 0, 1
_After = migrator.AfterCheckpoint


def checkpoint(
    target: Target,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a file, not standard output.")
    ] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End the tasks once they are saved.")] = False,
    leave_running: Annotated[bool, typer.Option("--leave-running", help="Let them run on (the default).")] = False,
    leave_stopped: Annotated[
        bool, typer.Option("--leave-stopped", help="Leave them stopped; SIGCONT resumes.")
    ] = False,
    engine: EngineName = "",
) -> None:
    """Save a running process tree or container to a stream: a file, a pipe, a socket.

    A program may save itself: started below the tree, migrator leaves itself out of the image, and has ended
    with status 0 in the copy.
    """
    with reported():
        if kill + leave_running + leave_stopped > 1:
            raise UsageError("--kill, --leave-running and --leave-stopped exclude one another")
        after = _After.KILL if kill else _After.STOP if leave_stopped else _After.RUN
        to = _STDOUT if output is None or str(output) == "-" else output
        if to == _STDOUT and sys.stdout.isatty():
            raise UsageError("an image is not for a terminal", hint=f"migrator checkpoint {target} -o FILE, or > FILE")
        interrupts.run(lambda _: migrator.checkpoint(target, to, after=after, engine=engine))


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
    verify: Annotated[
        bool, typer.Option("--verify", help="Look at the copy before it runs: it must be what was saved, or goes.")
    ] = False,
    engine: EngineName = "",
) -> None:
    """Restart what was saved. Waits for its end and exits as it does, unless --detach or --frozen."""

    async def whole(signals: interrupts.Signals) -> int:
        made = await migrator.restart(
            _image(source),
            frozen=frozen,
            bridge=bridge,
            verify=verify,
            engine=engine,
            built=lambda pid: _write_pidfile(pidfile, pid),
            waiting=lambda: err.say("[dim]the original is still here: reading to the end of the image first[/]"),
        )
        if frozen:
            err.say("[dim]pid {} is frozen in {}; `migrator thaw {}` lets it run[/]", made.pid, made.cgroup, made.pid)
        if detach or frozen:
            out.say("{}", made.pid)
            return 0
        signals.forward(made.pid)
        return await migrator.wait(made)

    with reported():
        status = interrupts.run(whole)
    raise typer.Exit(status)


def _image(path: Path | None) -> Path | int:
    if path is not None and str(path) != "-":
        return path
    if sys.stdin.isatty():
        raise UsageError("no image on standard input", hint="migrator restart -i FILE, or < FILE")
    return _STDIN


def _write_pidfile(path: Path | None, pid: int) -> None:
    if path is None:
        return
    try:
        path.write_text(f"{pid}\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="nothing was restarted") from error


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
        found = migrator.read_info(path)
        if as_json:
            out.json(to_json(found))
        else:
            out.lines(render_text(found, errors=errors, tree=tree, verbose=verbose))
    if not found.whole:
        raise typer.Exit(6)


@images.command("convert")
def convert(
    path: Annotated[str, typer.Argument(metavar="FILE|-", help="An image of any revision; - is standard input.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to a file, not standard output.")
    ] = None,
) -> None:
    """Make an image of the current revision from an older one. Exits with 6 if it is not whole."""
    with reported():
        if output is None and sys.stdout.isatty():
            raise UsageError("an image is not for a terminal", hint=f"migrator image convert {path} -o FILE, or > FILE")
        made = migrator.convert_image(
            _STDIN if path == "-" else Path(path), output if output is not None else sys.stdout.fileno()
        )
        err.say("[dim]revision {} to {}: {} records, {}[/]", made.from_rev, made.to_rev, made.records, size(made.bytes))
