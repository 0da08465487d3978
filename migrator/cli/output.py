"""What people see. All that this command writes to a terminal goes through here.

    out.say("[green]it can be moved[/] to {}", host)

The template is ours and may have styles; values are anybody's: names of files, processes and hosts, and what
the other side tells. They are shown with `printable()`, so that none of them can drive the terminal, begin a
line, or be taken for a style. What belongs to the work itself goes to `out`, all about it to `err`.
"""

from __future__ import annotations

import json
import logging
import os
import string
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, LiteralString

import typer
from rich import console as rich_console
from rich.console import RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from migrator.errors import Fate, MigratorError, Refused
from migrator.text import printable

_FILE_WIDTH = 1000


class Console:
    """One of the two standard streams."""

    def __init__(self, *, stderr: bool = False) -> None:
        self.rich = _Guarded(stderr=stderr, highlight=False, soft_wrap=True)
        if not self.rich.is_terminal and "COLUMNS" not in os.environ:
            self.rich.width = _FILE_WIDTH

    def say(self, template: LiteralString, *values: object, end: str = "\n") -> None:
        """One line. `template` is as for str.format(), with styles as of rich."""
        self.rich.print(_formatter.vformat(template, values, {}), end=end)

    def lines(self, text: str) -> None:
        """Several lines as they are, without styles."""
        self.rich.file.write("\n".join(map(printable, text.split("\n"))))

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> None:
        """As `table_of`."""
        self.show(table_of(columns, rows, right=right))

    def show(self, renderable: RenderableType) -> None:
        """What is built elsewhere of texts that are printable. A file has lines as long as they need be."""
        self.rich.print(renderable)

    def json(self, value: object, *, indent: int | None = 2) -> None:
        """For programs: JSON as text, or a value to be made JSON; in ASCII, where all else is escaped."""
        if isinstance(value, str | bytes):
            value = json.loads(value)
        self.rich.file.write(json.dumps(value, indent=indent).replace("\x7f", "\\u007f") + "\n")


def table_of(columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    """A table with a line of titles; the columns of `right` are adjusted to the right. Cells are anybody's texts, or
    a `Text` of ours; where there is no room they go on in the next line, so that a name can be copied whole."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for title in columns:
        table.add_column(title, justify="right" if title in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(value if isinstance(value, Text) else Text(printable(value)) for value in row))
    return table


class _Guarded(rich_console.Console):
    """Where a text has slipped through, it is still no more than a text."""

    def render(
        self, renderable: RenderableType, options: rich_console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.replace("\n", "").isprintable():
                yield segment
            else:
                yield segment._replace(text="\n".join(map(printable, segment.text.split("\n"))))


class _Formatter(string.Formatter):
    def format_field(self, value: Any, spec: str) -> str:
        return escape(printable(format(value if isinstance(value, int | float) else printable(value), spec)))


class _PrintableFormatter(logging.Formatter):
    """Each line of a log, a traceback's too, holds only what is printable."""

    def format(self, record: logging.LogRecord) -> str:
        record.msg, record.args = printable(record.getMessage()), None
        return "\n".join(map(printable, super().format(record).split("\n")))


_formatter = _Formatter()
err = Console(stderr=True)
out = Console()


def log_to_stderr(level: int = logging.WARNING, form: str = "%(message)s") -> None:
    """What the program logs from here on, for a service manager's journal or whoever watches."""
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter(form))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for library in ("asyncssh", "httpcore", "httpx", "pyroute2"):  # each message of theirs is a line
        logging.getLogger(library).setLevel(logging.WARNING)


def show_crash(error: BaseException) -> None:
    """A mistake of ours, and where it was made."""
    err.lines("".join(traceback.format_exception(error)))


@contextmanager
def reported() -> Iterator[None]:
    """Turn errors of ours into a message, a hint, where the workload is, and an exit code."""
    try:
        yield
    except MigratorError as error:
        show_error(error)
        raise typer.Exit(error.exit_code) from None
    except PermissionError as error:
        err.say("[red]error:[/] {}: {}", error.strerror, error.filename or "a privileged operation")
        if os.geteuid() != 0:
            err.say("  [dim]do:[/] run migrator as root")
        else:
            err.say("  [dim]do:[/] root itself may not do this here: a container, or a security module, forbids it")
        raise typer.Exit(1) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(1) from None
    except OSError as error:
        err.say("[red]error:[/] {}", ": ".join(filter(None, (error.filename and str(error.filename), error.strerror))))
        raise typer.Exit(1) from None


def show_error(error: MigratorError) -> None:
    if isinstance(error, Refused) and len(error.reasons) > 1:
        err.say("[red]error:[/] {} things cannot be carried:", len(error.reasons))
        for reason in error.reasons:
            err.say("  • {}", reason)
    else:
        err.say("[red]error:[/] {}", error.message)
    if error.hint:
        err.say("  [dim]do:[/] {}", error.hint)
    if error.fate is not Fate.UNTOUCHED:
        err.say("  [dim]the workload is[/] {}", error.fate.value)
