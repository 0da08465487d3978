"""checkpoint, restart, image info: images in files and pipes, on one host."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from migrator import container
from migrator.cli import image_buffer
from migrator.cli.attended import attended, silence
from migrator.cli.interrupts import aborting, held_back
from migrator.cli.output import err, out, reported
from migrator.cli.workload import Workload, find_workload
from migrator.engine.base import AfterCheckpoint, DestinationOptions
from migrator.engine.own_tree import OwnTreeSource, holds_us
from migrator.engine.user.dump.source import UserSource
from migrator.engine.user.engine import UserEngine
from migrator.engine.user.restore.destination import UserDestination
from migrator.errors import CheckpointFailed, Refused, UsageError
from migrator.image.render import render_text, to_json
from migrator.imageinfo import read_info
from migrator.linux import pipes

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
        if output is not None and str(output) != "-":
            _save_to(output, workload, after)
            return
        if sys.stdout.isatty():
            raise UsageError("an image is not for a terminal", hint=f"migrator checkpoint {target} -o FILE, or > FILE")
        _save(workload, sys.stdout.fileno(), after, "standard output")


def _save(
    workload: Workload, fd: int, after: AfterCheckpoint, where: str, whole: Callable[[], None] = lambda: None
) -> None:
    """Save to `fd`. `whole` is called while the tasks still stand, when the image is complete: what it raises
    lets them run on."""
    with aborting(), attended() as journal, _source(workload, fd) as source, silence(workload, after) as network:
        source.survey()
        journal.begin(workload, source)
        try:
            source.arm()
            if network is not None:
                network.lock()
            source.freeze()
            source.final()
            whole()
        except BrokenPipeError:
            raise CheckpointFailed(f"{where}: whoever reads it has gone away") from None
        except OSError as error:
            raise CheckpointFailed(f"{error.filename or where}: {error.strerror}") from error
        with held_back():
            if after is AfterCheckpoint.RUN:
                source.thaw()
                return
            source.hold()
            if after is AfterCheckpoint.KILL:
                journal.gone()
                source.release()
            else:
                for process in source.tree.living:  # none runs on before it stops: the signal waits in the frozen
                    os.kill(process.pid, signal.SIGSTOP)
                source.thaw()
    if workload.container is not None and after is AfterCheckpoint.KILL:
        container.remove(workload.container.name)


def _source(workload: Workload, fd: int) -> UserSource:
    if not holds_us(workload.pid):
        return UserEngine().source(workload.pid, fd, workload.source_options())
    if workload.container is not None:
        raise Refused(
            [f"container {workload.name}: migrator itself runs in it"],
            hint="save it from outside, or name the pid of a program in it",
        )
    return OwnTreeSource(workload.pid, fd, workload.source_options())


def _save_to(path: Path, workload: Workload, after: AfterCheckpoint) -> None:
    """To a file: written beside and renamed, so that a file of that name is a whole image or not there.
    To anything else of that name, such as a FIFO: written to it."""
    path = Path(os.path.realpath(path))
    try:
        special = path.exists() and not stat.S_ISREG(path.stat().st_mode)
        beside = path if special else path.with_name(f".{path.name}.{os.getpid()}")
        fresh = 0 if special else os.O_CREAT | os.O_EXCL
        fd = os.open(beside, os.O_WRONLY | os.O_CLOEXEC | fresh, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error

    def whole() -> None:
        if not special:
            os.fsync(fd)
            os.rename(beside, path)

    try:
        _save(workload, fd, after, str(path), whole)
    except BaseException:
        if not special:
            beside.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


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
        fd = _image(source)
        with aborting():
            if pipes.is_pipe(fd):
                fd = _keep_if_needed(fd)
            with UserEngine().destination(fd, DestinationOptions(bridge=bridge)) as destination:
                root = destination.build()
                if pidfile is not None:
                    _write_pidfile(pidfile, root)
                with held_back():
                    _let_go(destination, frozen=frozen)
        if frozen:
            err.print(f"[dim]pid {root} is frozen in {destination.cgroup}; `migrator thaw {root}` lets it run[/]")
        if detach or frozen:
            out.print(root)
            return
        status = _wait(root)
        if destination.sandbox is not None:
            container.remove(destination.sandbox.spec.name)
        else:
            with contextlib.suppress(OSError):  # processes that outlive the root stay in it
                os.rmdir(destination.cgroup)
    raise typer.Exit(status)


def _image(path: Path | None) -> int:
    if path is None or str(path) == "-":
        if sys.stdin.isatty():
            raise UsageError("no image on standard input", hint="migrator restart -i FILE, or < FILE")
        return 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="an image made by `migrator checkpoint`") from error
    if stat.S_ISDIR(os.fstat(fd).st_mode):
        raise UsageError(f"{path} is a directory", hint="an image made by `migrator checkpoint`")
    return fd


def _keep_if_needed(fd: int) -> int:
    in_the_way = image_buffer.beginning(fd)
    if not in_the_way():
        return fd
    err.print("[dim]the original is still here: reading to the end of the image first[/]")
    return image_buffer.keep(fd, in_the_way)


def _write_pidfile(path: Path, pid: int) -> None:
    try:
        path.write_text(f"{pid}\n")
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}", hint="nothing was restarted") from error


def _let_go(destination: UserDestination, *, frozen: bool) -> None:
    destination.hold()
    if frozen:
        destination.leave_frozen()
        if destination.sandbox is not None:
            destination.sandbox.settled()  # its port stays shut until `migrator thaw`
        return
    if destination.sandbox is not None:
        destination.sandbox.open_port()  # first: connections ask their peers for what they missed
    destination.resume()
    destination.tidy()


def _wait(root: int) -> int:
    """Wait for the root; signals meant for us are its. The status as a shell counts it."""
    for number in _FORWARDED:
        signal.signal(number, lambda n, _frame: _forward(root, n))
    _, status = os.waitpid(root, 0)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


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
