"""A picture of a migration as its user saw it: latency above, what the migration did below.

Two panels, because a migration takes seconds and its downtime milliseconds: the upper one shows the
whole of it, the lower one the moment that the client noticed most, magnified. In each, a dot is one
exchange of the client (when its reply came, how long it took), a bar is one phase of the migration,
and the shaded stretch is the longest wait.

SVG 1.1 written by hand: no drawing library, and the file opens in any browser.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH = 1000
LEFT, RIGHT = 190, 40
PLOT = WIDTH - LEFT - RIGHT
LATENCY_HEIGHT = 150
ROW = 22
COLOURS = {"source": "#4477aa", "destination": "#228833", "both": "#b8860b", "": "#777777"}
FONT = "DejaVu Sans, Helvetica, Arial, sans-serif"

Sample = tuple[int, int]


@dataclass(frozen=True)
class Bar:
    """One phase: `start` and `end` in ns of CLOCK_MONOTONIC, `where` "source", "destination" or "both"."""

    name: str
    start: int
    end: int
    where: str = ""


def read_samples(path: Path | str) -> list[Sample]:
    """What a client wrote: one "SENT_NS RECEIVED_NS" per line. Raises `ValueError`, `OSError`."""
    samples = []
    for line in Path(path).read_text().splitlines():
        sent, received = line.split()
        samples.append((int(sent), int(received)))
    return samples


def longest_wait(samples: Sequence[Sample], start: int | None = None, end: int | None = None) -> Sample:
    """The exchange that took longest among those that touch `start`..`end`. Raises `ValueError` for none."""
    touching = [
        (sent, received)
        for sent, received in samples
        if (start is None or received >= start) and (end is None or sent <= end)
    ]
    if not touching:
        raise ValueError("the client exchanged nothing during the migration")
    return max(touching, key=lambda sample: sample[1] - sample[0])


def downtime_svg(
    samples: Sequence[Sample], bars: Sequence[Bar], *, title: str, subtitle: str = "", claim: str = "{} of downtime"
) -> str:
    """The picture as SVG text.

    samples:  (sent, received) of each exchange of one client, ns of the same clock as the bars
    bars:     the phases of the migration, on both hosts, in any order
    title:    the first line; the longest wait is added to it, as `claim` says

    Raises `ValueError` where there are no bars, or no exchange during them.
    """
    if not bars:
        raise ValueError("a migration without phases has no picture")
    first, last = min(bar.start for bar in bars), max(bar.end for bar in bars)
    gap = longest_wait(samples, first, last)
    wait = max(gap[1] - gap[0], 1)

    margin = max((last - first) // 12, wait // 2, 1)
    whole = _Panel(first - margin, last + margin, unit=1e9, label="seconds since the migration began", zero=first)
    # Magnified: the longest wait takes about a third of the width.
    near = _Panel(
        gap[0] - wait, gap[1] + wait, unit=1e6, label="milliseconds since the unanswered request", zero=gap[0]
    )
    # What fills less than a pixel of the whole is seen in the magnified panel.
    wide = [bar for bar in bars if bar.end - bar.start >= (whole.end - whole.start) / PLOT]
    seen = [bar for bar in bars if bar.end > near.start and bar.start < near.end]

    parts: list[str] = []
    y = 78.0
    y = _panel(parts, whole, samples, wide, gap, y, heading="The whole migration")
    y = _panel(parts, near, samples, seen, gap, y + 34, heading="The longest wait, magnified")
    parts.append(_legend(bars, y + 24))
    height = int(y + 44)
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="{FONT}" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(24, 34, f"{title}: {claim.format(_duration(wait))}", size=19, weight="bold"),
        _text(24, 55, subtitle, fill="#555"),
    ]
    return "\n".join([*head, *parts, "</svg>", ""])


@dataclass(frozen=True)
class _Panel:
    start: int
    end: int
    unit: float  # ns
    label: str
    zero: int  # the time that the axis calls 0

    def x(self, ns: float) -> float:
        return LEFT + PLOT * min(max((ns - self.start) / (self.end - self.start), 0.0), 1.0)


def _panel(
    parts: list[str],
    panel: _Panel,
    samples: Sequence[Sample],
    bars: Sequence[Bar],
    gap: Sample,
    top: float,
    *,
    heading: str,
) -> float:
    """Draws one panel from `top` down; returns where it ends."""
    rows = _rows(bars)
    plot = top + 20
    bottom = plot + LATENCY_HEIGHT
    floor = bottom + 10 + ROW * len(rows)
    parts.append(_text(24, top + 4, heading, weight="bold"))
    parts.append(_rect(panel.x(gap[0]), plot, panel.x(gap[1]), floor, "#ee6677", opacity=0.18))
    parts += _time_axis(panel, plot, floor)
    parts += _latency(panel, samples, gap, plot, bottom)
    for number, (name, row) in enumerate(rows.items()):
        parts += _row(panel, name, row, bottom + 10 + ROW * number)
    parts.append(_text(LEFT + PLOT / 2, floor + 34, panel.label, fill="#555", anchor="middle"))
    return floor + 38


def _time_axis(panel: _Panel, top: float, floor: float) -> list[str]:
    step = _nice((panel.end - panel.start) / panel.unit / 8)
    first = math.ceil((panel.start - panel.zero) / panel.unit / step)
    parts = [_line(LEFT, floor, LEFT + PLOT, floor, "#999")]
    while (at := panel.zero + first * step * panel.unit) <= panel.end:
        x = panel.x(at)
        parts.append(_line(x, top, x, floor, "#e8e8e8"))
        parts.append(_text(x, floor + 16, f"{first * step:g}", anchor="middle", fill="#555"))
        first += 1
    return parts


def _latency(panel: _Panel, samples: Sequence[Sample], gap: Sample, top: float, bottom: float) -> list[str]:
    shown = [sample for sample in samples if sample[1] >= panel.start and sample[0] <= panel.end]
    highest = max((received - sent for sent, received in shown), default=1) / 1e6
    step = _nice(highest / 4)
    ceiling = step * math.ceil(highest * 1.08 / step)
    parts = []
    for tick in range(round(ceiling / step) + 1):
        y = bottom - (bottom - top) * tick * step / ceiling
        parts.append(_line(LEFT, y, LEFT + PLOT, y, "#e8e8e8" if tick else "#999"))
        parts.append(_text(LEFT - 8, y + 4, f"{tick * step:g}", anchor="end", fill="#555"))
    middle = (top + bottom) / 2
    parts.append(
        f'<text x="{LEFT - 52}" y="{middle:.1f}" fill="#555" text-anchor="middle" '
        f'transform="rotate(-90 {LEFT - 52} {middle:.1f})">client latency, ms</text>'
    )
    # Dots of one place are drawn once: a long run has more exchanges than the picture has pixels.
    dots = {
        (round(panel.x(received), 1), round(bottom - (bottom - top) * (received - sent) / 1e6 / ceiling, 1))
        for sent, received in shown
        if panel.start <= received <= panel.end
    }
    path = "".join(f"M{x} {y}h0" for x, y in sorted(dots))
    parts.append(
        f'<path d="{path}" stroke="#33557f" stroke-width="3.2" stroke-linecap="round" fill="none" opacity="0.75"/>'
    )
    x, y = panel.x(gap[1]), bottom - (bottom - top) * (gap[1] - gap[0]) / 1e6 / ceiling
    parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="#cc3344"/>')
    aside, anchor = (-10, "end") if x > LEFT + PLOT - 180 else (10, "start")
    words = f"{_duration(gap[1] - gap[0])} without a reply"
    parts.append(_text(x + aside, y + 4, words, fill="#aa2233", weight="bold", anchor=anchor))
    return parts


def _rows(bars: Sequence[Bar]) -> dict[str, list[Bar]]:
    """Bars by row, in order of time. "round 1", "round 2" ... share the row "round"."""
    rows: dict[str, list[Bar]] = {}
    for bar in sorted(bars, key=lambda bar: (bar.start, bar.end)):
        rows.setdefault(bar.name.rstrip("0123456789 "), []).append(bar)
    return rows


def _row(panel: _Panel, name: str, bars: Sequence[Bar], top: float) -> list[str]:
    total = sum(bar.end - bar.start for bar in bars)
    label = f"{name} ×{len(bars)}" if len(bars) > 1 else bars[0].name
    parts = [_text(LEFT - 12, top + 14, label, anchor="end")]
    for bar in bars:
        left, right = panel.x(bar.start), panel.x(bar.end)
        if len(bars) > 1:
            right -= 0.6  # so that neighbours stay two
        right = max(right, left + 1.5)
        parts.append(_rect(left, top + 3, right, top + ROW - 4, COLOURS.get(bar.where, "#777777")))
    end = panel.x(max(bar.end for bar in bars))
    words = _duration(total)
    if end + 8 + 8 * len(words) < LEFT + PLOT:
        parts.append(_text(end + 6, top + 14, words, fill="#555"))
    else:
        begin = panel.x(min(bar.start for bar in bars))
        if begin - LEFT > 8 * len(words):
            parts.append(_text(begin - 6, top + 14, words, fill="#555", anchor="end"))
        else:
            parts.append(_text(LEFT + PLOT - 8, top + 14, words, fill="white", anchor="end"))
    return parts


def _legend(bars: Sequence[Bar], y: float) -> str:
    parts = []
    x = float(LEFT)
    for where in ("source", "destination", "both"):
        if any(bar.where == where for bar in bars):
            parts.append(_rect(x, y - 10, x + 14, y + 2, COLOURS[where]))
            words = "both hosts" if where == "both" else f"on the {where}"
            parts.append(_text(x + 20, y + 1, words, fill="#555"))
            x += 150
    parts.append(f'<circle cx="{x + 6}" cy="{y - 4}" r="2.4" fill="#33557f"/>')
    parts.append(_text(x + 16, y + 1, "one exchange of the client", fill="#555"))
    return "\n".join(parts)


def _nice(step: float) -> float:
    """The next of 1, 2, 5, 10, ... times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * 0.999)


def _duration(ns: int) -> str:
    if ns >= 1_000_000_000:
        return f"{ns / 1e9:.2f} s"
    if ns >= 100_000_000:
        return f"{ns / 1e6:.0f} ms"
    if ns >= 100_000:
        return f"{ns / 1e6:.1f} ms"
    return f"{ns / 1e3:.0f} µs"


def _text(
    x: float,
    y: float,
    words: str,
    *,
    fill: str = "",
    anchor: str = "",
    size: int = 0,
    weight: str = "",
) -> str:
    style = "".join(
        f' {name}="{value}"'
        for name, value in (
            ("fill", fill),
            ("text-anchor", anchor),
            ("font-size", size),
            ("font-weight", weight),
        )
        if value
    )
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{escape(words)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _rect(left: float, top: float, right: float, bottom: float, colour: str, *, opacity: float = 1.0) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(right - left, 0):.1f}" height="{bottom - top:.1f}" '
        f'fill="{colour}"' + (f' opacity="{opacity}"' if opacity < 1 else "") + "/>"
    )
