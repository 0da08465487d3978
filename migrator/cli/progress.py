"""A migration as its operator watches it: one line per phase and round, then the timeline."""

from __future__ import annotations

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from migrator.cli.output import duration, size
from migrator.model import (
    Event,
    MigrationResult,
    Noted,
    Outcome,
    PhaseEnded,
    PhaseStarted,
    RoundDone,
    Span,
    Transferred,
    Waiting,
    Where,
)

_BAR = 40
_PAGE = 4096
_SLIVER = 100_000  # ns
_UNKNOWN = 1e6  # seconds: nothing was measured yet that a prediction could rest on


class Display:
    """An observer of a migration's events. Context manager; writes to `console`, which is standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = "connecting"
        self._since = time.monotonic()
        self._bytes = 0
        self._live = Live(
            get_renderable=self._status,
            console=console,
            refresh_per_second=8,
            transient=True,
            auto_refresh=True,
        )

    def __enter__(self) -> Display:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self._phase, self._since, self._bytes = event.name, time.monotonic(), 0
            case Transferred():
                self._phase, self._bytes = event.phase, event.bytes
            case RoundDone():
                self._round(event)
            case PhaseEnded():
                if event.span.where is Where.SOURCE and event.span.name in ("preflight", "instrument", "files"):
                    sent = f"  {size(self._bytes):>22}" if event.span.name == "files" and self._bytes else ""
                    self._console.print(f"  {event.span.name:<10} {duration(event.span.seconds):>9}{sent}")
            case Noted():
                self._console.print(f"  {event.text}", markup=False, highlight=False, soft_wrap=True)
            case Waiting():
                self._console.print(f"  [yellow]waiting[/]    {event.reason}")
            case _:
                pass

    def _round(self, event: RoundDone) -> None:
        made = event.round
        seconds = max((made.end - made.start) / 1e9, 1e-9)
        parts = [
            f"  round {made.number:<4} {duration(seconds):>9}",
            f"{made.pages:>9,} pages",
            f"{size(made.bytes):>9}",
            f"{made.bytes / seconds / 1e6:>6.0f} MB/s",
        ]
        if made.dirty_rate:
            parts.append(f"dirty {made.dirty_rate * _PAGE / 1e6:.1f} MB/s")
        if event.predicted_downtime < _UNKNOWN:
            parts.append(f"predicted downtime {duration(event.predicted_downtime)}")
        self._console.print("  ".join(parts))
        if event.verdict != "continue":
            self._console.print(f"  [dim]{event.verdict}: {event.reason}[/]")

    def _status(self) -> Text:
        seconds = time.monotonic() - self._since
        text = f"  {self._phase} {duration(seconds)}"
        if self._bytes:
            text += f"  {size(self._bytes)}  {self._bytes / max(seconds, 1e-9) / 1e6:.0f} MB/s"
        return Text(text, style="dim")


def show_result(console: Console, result: MigrationResult) -> None:
    """The end of it: what happened, the timeline of the downtime, and what was sent."""
    if result.outcome is not Outcome.MIGRATED:
        return
    console.print(
        f"\n[green]{result.container or 'pid ' + str(result.pids[0] if result.pids else '?')}[/] runs on"
        f" {result.destination} (pid {result.pid})"
    )
    timeline = result.timeline
    if timeline is not None:
        parts = timeline.downtime_parts()
        console.print(
            f"\ndowntime [bold]{duration(result.downtime)}[/]"
            f" [dim](predicted {duration(result.predicted_downtime)}; freeze to first instruction there)[/]"
        )
        if parts:
            console.print(_timeline(parts, timeline.frozen_at, timeline.resumed_at))
    pages = sum(r.pages for r in result.rounds)
    console.print(
        f"total    {duration(result.total)}: {len(result.rounds)} rounds, {pages:,} pages,"
        f" {size(result.stream_bytes)} of stream, {size(result.wire_bytes)} on the wire"
        f" (ratio {result.compression_ratio:.2f}), {result.throughput / 1e6:.0f} MB/s,"
        f" round trip {duration(result.rtt)}"
    )
    for warning in result.warnings:
        console.print(f"[yellow]note:[/] {warning}")


def _timeline(parts: list[Span], start: int, end: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(justify="left")
    table.add_column(justify="left", style="dim")
    table.add_column(justify="right")
    table.add_column()
    whole = max(end - start, 1)
    for part in _without_slivers(parts):
        left = round((part.start - start) / whole * _BAR)
        right = max(left + 1, round((part.end - start) / whole * _BAR))
        name = "on the way" if part.where is Where.BETWEEN else part.name
        table.add_row(f"  {name}", part.where.value, duration(part.seconds), " " * left + "█" * (right - left))
    table.add_row("  [bold]sum[/]", "", f"[bold]{duration(sum(p.seconds for p in parts))}[/]", "")
    return table


def _without_slivers(parts: list[Span]) -> list[Span]:
    """Waits too short to be seen are counted to the part before them: the sum stays what it is."""
    out: list[Span] = []
    for part in parts:
        if out and part.where is Where.BETWEEN and part.end - part.start < _SLIVER:
            last = out.pop()
            part = Span(last.name, last.where, last.start, part.end)
        out.append(part)
    return out
