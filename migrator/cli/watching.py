"""Showing something again and again, until somebody has seen enough."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Annotated, cast

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from migrator.cli import interrupts
from migrator.cli.output import out, reported
from migrator.cli.parameters import seconds
from migrator.errors import UsageError
from migrator.text import duration

EVERY = 2.0  # seconds
LEAST = 0.1

Watch = Annotated[bool, typer.Option("--watch", "-w", help="Again and again, until interrupted.")]
Interval = Annotated[
    float | None,
    typer.Option(parser=seconds, metavar="DURATION", help="With --watch: between two looks.", show_default="2s"),
]


def interval_of(watch: bool, interval: float | None) -> float:
    """Raises UsageError for one that is too short, or without --watch."""
    if interval is None:
        return EVERY
    if not watch:
        raise UsageError("--interval is for --watch")
    if not LEAST <= interval < 86400:
        raise UsageError(f"--interval {interval:g}: from {LEAST:g} s to a day")
    return interval


def watched(views: Callable[[], AsyncIterator[RenderableType | None]], *, every: float = EVERY) -> None:
    """Each view on a terminal in one place, else one below the other; None is what has shown itself.

    Ends with an interrupt, as it should.
    """

    async def show() -> None:
        live = Live(console=out.rich, auto_refresh=False, transient=False)
        async with contextlib.aclosing(cast(AsyncGenerator[RenderableType | None], views())) as looks:
            with live if out.rich.is_terminal else contextlib.nullcontext():
                began = time.monotonic()
                async for seen in looks:
                    if seen is not None and out.rich.is_terminal:
                        title = f"every {duration(every)}, {time.strftime('%H:%M:%S')}; Ctrl-C ends it"
                        live.update(Group(Text(title, style="dim"), seen), refresh=True)
                    elif seen is not None:
                        out.show(seen)
                    out.rich.file.flush()
                    await asyncio.sleep(max(began + every - time.monotonic(), LEAST / 2))
                    began = time.monotonic()

    with reported():
        try:
            interrupts.run(lambda _: show())
        except interrupts.Interrupted:
            raise typer.Exit(0) from None
