"""A migration as its operator watches it: one line per phase and round, then the timeline."""

from __future__ import annotations

import time

from rich.live import Live
from rich.table import Table
from rich.text import Text

from migrator.cli.output import Console
from migrator.errors import Fate
from migrator.model import (
    Event,
    MigrationResult,
    Noted,
    Outcome,
    Phase,
    PhaseEnded,
    PhaseStarted,
    RoundDone,
    Settled,
    Transferred,
    Waiting,
    Where,
)
from migrator.text import duration, printable, size

_BAR = 40
_PAGE = 4096
_SLIVER = 100_000  # ns
_FIRST, _PAUSE = 10, 1.0  # so many rounds are shown, then one in so many seconds, and the last
_UNKNOWN = 1e6  # seconds: nothing was measured yet that a prediction could rest on
_SHOWN = ("preflight", "instrument", "files")  # phases that are told by themselves, not in the timeline


class Display:
    """An observer of a migration's events. Context manager; writes to `console`, which is standard error."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = "connecting"
        self._since = time.monotonic()
        self._bytes = 0
        self._told = 0.0  # when a round was shown last
        self._live = Live(
            get_renderable=self._status,
            console=console.rich,
            refresh_per_second=8,
            transient=True,
            auto_refresh=True,
        )

    def __enter__(self) -> Display:
        if self._console.rich.is_terminal:
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
                self._ended(event.phase)
            case Noted():
                self._console.say("  {}", event.text)
            case Waiting():
                self._console.say("  [yellow]waiting[/]    {}", event.reason)
            case Settled():
                self._console.say(
                    "[yellow]settled[/] migration {} of an earlier run: {}", event.migration, event.detail
                )
                if event.fate == Fate.FROZEN.value:
                    self._console.say("  [dim]it stays open; `migrator settle` tries again[/]")
            case _:
                pass

    def _ended(self, phase: Phase) -> None:
        if phase.where is not Where.SOURCE or phase.name not in _SHOWN:
            return
        sent = f"  {size(self._bytes):>22}" if phase.name == "files" and self._bytes else ""
        self._console.say("  {:<10} {:>9}{}", phase.name, duration(phase.seconds), sent)

    def _round(self, event: RoundDone) -> None:
        made = event.round
        if made.number > _FIRST and event.verdict == "continue" and time.monotonic() - self._told < _PAUSE:
            return
        self._told = time.monotonic()
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
        self._console.say("{}", "  ".join(parts))
        if event.verdict == "freeze":  # why it is given up, the error says
            self._console.say("  [dim]{}: {}[/]", event.verdict, event.reason)

    def _status(self) -> Text:
        seconds = time.monotonic() - self._since
        text = f"  {self._phase} {duration(seconds)}"
        if self._bytes:
            text += f"  {size(self._bytes)}  {self._bytes / max(seconds, 1e-9) / 1e6:.0f} MB/s"
        return Text(printable(text), style="dim")


def show_result(console: Console, result: MigrationResult) -> None:
    """The end of it: what happened, the timeline of the downtime, and what was sent."""
    if result.outcome is not Outcome.MIGRATED:
        return
    what = result.container or f"pid {result.pids[0] if result.pids else '?'}"
    console.say("\n[green]{}[/] runs on {} (pid {})", what, result.destination, result.pid)
    timeline = result.timeline
    if timeline is not None:
        console.say(
            "\ndowntime [bold]{}[/] [dim](predicted {}, off by {}; freeze to first instruction there)[/]",
            duration(result.downtime), duration(result.predicted_downtime), duration(abs(result.prediction_error)),
        )  # fmt: skip
        if result.first_packet:
            console.say("first packet of the container {} after the freeze", duration(result.first_packet))
        parts = timeline.downtime_parts()
        if parts:
            console.show(_timeline(parts, timeline.frozen_at, timeline.resumed_at))
    console.say(
        "total    {}: {} rounds, {:,} pages, {} of stream, {} on the wire (ratio {:.2f}), {:.0f} MB/s, round trip {}",
        duration(result.total), len(result.rounds), sum(r.pages for r in result.rounds), size(result.stream_bytes),
        size(result.wire_bytes), result.compression_ratio, result.throughput / 1e6, duration(result.rtt),
    )  # fmt: skip
    console.say("engine   {}: {}", result.engine, result.engine_reason)
    for warning in result.warnings:
        console.say("[yellow]note:[/] {}", warning)


def _timeline(parts: list[Phase], start: int, end: int) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1))
    table.add_column(justify="left")
    table.add_column(justify="left", style="dim")
    table.add_column(justify="right")
    table.add_column()
    whole = max(end - start, 1)
    for part in _without_slivers(parts):
        left = round((part.start - start) / whole * _BAR)
        right = max(left + 1, round((part.end - start) / whole * _BAR))
        name = "on the way" if part.where is Where.BETWEEN else printable(part.name)
        bar = " " * left + "█" * (right - left)
        table.add_row(Text(f"  {name}"), part.where.value, duration(part.seconds), bar)
    table.add_row("  [bold]sum[/]", "", f"[bold]{duration(sum(p.seconds for p in parts))}[/]", "")
    return table


def _without_slivers(parts: list[Phase]) -> list[Phase]:
    """Waits too short to be seen are counted to the part before them: the sum stays what it is."""
    out: list[Phase] = []
    for part in parts:
        if out and part.where is Where.BETWEEN and part.end - part.start < _SLIVER:
            last = out.pop()
            part = Phase(last.name, last.start, part.end, where=last.where)
        out.append(part)
    return out
