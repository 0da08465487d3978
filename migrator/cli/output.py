"""What people see: tables and errors. Everything about the work itself goes to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from migrator.errors import Fate, MigratorError, Refused

err = Console(stderr=True, highlight=False, soft_wrap=True)
out = Console(highlight=False, soft_wrap=True)


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors of ours into a message, a hint, where the workload is, and an exit code."""
    try:
        yield
    except MigratorError as error:
        show_error(error)
        raise typer.Exit(error.exit_code) from None
    except PermissionError as error:
        err.print(f"[red]error:[/] {error.strerror}: {error.filename or 'a privileged operation'}", markup=True)
        if os.geteuid() != 0:
            err.print("  [dim]do:[/] run migrator as root")
        else:
            err.print("  [dim]do:[/] root itself may not do this here: a container, or a security module, forbids it")
        raise typer.Exit(1) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except OSError as error:
        err.print("[red]error:[/] ", end="")
        err.print(": ".join(filter(None, (error.filename and str(error.filename), error.strerror))), markup=False)
        raise typer.Exit(1) from None


def show_error(error: MigratorError) -> None:
    if isinstance(error, Refused) and len(error.reasons) > 1:
        err.print(f"[red]error:[/] {len(error.reasons)} things cannot be carried:")
        for reason in error.reasons:
            err.print(f"  • {reason}", markup=False)
    else:
        err.print("[red]error:[/] ", end="")
        err.print(error.message, markup=False)
    if error.hint:
        err.print("  [dim]do:[/] ", end="")
        err.print(error.hint, markup=False)
    if error.fate is not Fate.UNTOUCHED:
        err.print(f"  [dim]the workload is[/] {error.fate.value}")


def size(count: float) -> str:
    """A number of bytes for people: 3 significant digits, binary units."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d {hours}h" if days else f"{hours}h {minutes}m" if hours else f"{minutes}m {seconds}s"
