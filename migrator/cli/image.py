"""checkpoint, restart, image info: images in files and pipes, on one host."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from migrator import container
from migrator.cli.output import err, out, reported
from migrator.cli.workload import Workload, find_workload
from migrator.engine.base import AfterCheckpoint, CheckpointFlags, DestinationOptions
from migrator.engine.user.engine import UserEngine
from migrator.errors import UsageError
from migrator.image.render import render_text, to_json
from migrator.imageinfo import read_info

images = typer.Typer(help="Look into images.", no_args_is_help=True)


def checkpoint(
    target: Annotated[
        str, typer.Argument(metavar="PID|NAME", help="Root of the tree, or a container's name.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to a file, not standard output.")
    ] = None,
    kill: Annotated[bool, typer.Option("--kill", help="End the tasks once they are saved.")] = False,
    leave_running: Annotated[
        bool, typer.Option("--leave-running", help="Let them run on (the default).")
    ] = False,
    leave_stopped: Annotated[
        bool, typer.Option("--leave-stopped", help="Leave them stopped; SIGCONT resumes.")
    ] = False,
) -> None:
    """Save a running process tree or container to a stream: a file, a pipe, a socket."""
    with reported():
        if kill + leave_running + leave_stopped > 1:
            raise UsageError("--kill, --leave-running and --leave-stopped exclude one another")
        after = (
            AfterCheckpoint.KILL if kill else AfterCheckpoint.STOP if leave_stopped else AfterCheckpoint.RUN
        )
        workload = find_workload(target)
        if output is None and sys.stdout.isatty():
            raise UsageError(
                "an image is not for a terminal", hint=f"migrator checkpoint {target} -o FILE, or > FILE"
            )
        if output is None:
            _save(workload, sys.stdout.fileno(), after)
        else:
            _save_to_file(workload, output, after)


def _save(workload: Workload, fd: int, after: AfterCheckpoint) -> None:
    flags = CheckpointFlags.SUBTREE
    UserEngine().checkpoint(workload.pid, fd, flags, after=after, options=workload.source_options())
    if workload.container is not None and after is AfterCheckpoint.KILL:
        container.remove(workload.container.name)


def _save_to_file(workload: Workload, path: Path, after: AfterCheckpoint) -> None:
    """Written beside and renamed: a file of that name is a whole image or not there."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    try:
        # until the file is whole and on the disk nothing may be killed
        killing = after is AfterCheckpoint.KILL
        _save(workload, fd, AfterCheckpoint.STOP if killing else after)
        os.fsync(fd)
        os.rename(beside, path)
        if killing:
            workload.kill()
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def restart(
    source: Annotated[
        Path | None, typer.Option("-i", "--input", help="Read a file, not standard input.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once the tasks run.")] = False,
    pidfile: Annotated[Path | None, typer.Option(help="Write the root's pid to this file.")] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="Leave the tasks frozen in their cgroup.")] = False,
    bridge: Annotated[str, typer.Option(help="For a container: the bridge of this host.")] = "",
) -> None:
    """Restart what was saved. Waits for its end and exits as it does, unless --detach or --frozen."""
    with reported():
        if source is None and sys.stdin.isatty():
            raise UsageError("no image on standard input", hint="migrator restart -i FILE, or < FILE")
        fd = 0
        if source is not None:
            try:
                fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UsageError(
                    f"{source}: {error.strerror}", hint="an image made by `migrator checkpoint`"
                ) from error
        engine = UserEngine()
        with engine.destination(fd, DestinationOptions(bridge=bridge)) as destination:
            root = destination.build()
            destination.hold()
            if pidfile is not None:
                pidfile.write_text(f"{root}\n")
            if frozen:
                destination.leave_frozen()
            else:
                destination.resume()
            sandbox = destination.sandbox
        if sandbox is not None:
            sandbox.open_port()
        if frozen:
            err.print(f"pid {root} is frozen in {destination.cgroup}; `migrator thaw {root}` lets it run")
        if detach or frozen:
            out.print(root)
            return
    raise typer.Exit(_wait(root))


def _wait(root: int) -> int:
    """Wait for the root; signals meant for us are its. The status as a shell counts it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _frame: os.kill(root, n))
    while True:
        try:
            _, status = os.waitpid(root, 0)
        except InterruptedError:
            continue
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code


@images.command("info")
def info(
    path: Annotated[
        str, typer.Argument(metavar="FILE|-", help="An image, whole or broken; - is standard input.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    errors: Annotated[bool, typer.Option("-e", "--errors", help="Only the errors.")] = False,
    tree: Annotated[bool, typer.Option("-p", "--tree", help="Only the task tree.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Every mapping and object.")] = False,
) -> None:
    """Show what is in an image: tree, memory, descriptors, errors. Exits with 6 if it is not whole."""
    with reported():
        found = read_info(path)
        if as_json:
            print(json.dumps(to_json(found), indent=2))
        else:
            print(render_text(found, errors=errors, tree=tree, verbose=verbose))
    if not found.whole:
        raise typer.Exit(6)
