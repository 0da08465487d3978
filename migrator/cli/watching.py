"""Showing something again and again, until somebody has seen enough."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import typer
from rich.console import RenderableType
from rich.live import Live

from migrator.cli import interrupts
from migrator.cli.output import out, reported

_EVERY = 2.0  # seconds


def watched(look: Callable[[], Awaitable[RenderableType]], *, every: float = _EVERY) -> None:
    """On a terminal in one place, else one below the other. Ends with an interrupt, as it should."""

    async def show() -> None:
        with Live(console=out.rich, auto_refresh=False, transient=False) as live:
            while True:
                seen = await look()
                if out.rich.is_terminal:
                    live.update(seen, refresh=True)
                else:
                    out.show(seen)
                await asyncio.sleep(every)

    with reported():
        try:
            interrupts.run(lambda _: show())
        except interrupts.Interrupted:
            raise typer.Exit(0) from None
