"""A comparison as a picture: imbalance over the day, and what each rule sent for how much of it. SVG, for any page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .compare import Comparison
from .simulate import Run

WIDTH, HEIGHT, EDGE = 960, 760, 60
COLOURS = ("#7f7f7f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#000000")


def svg(found: Comparison) -> str:
    """One SVG document; it needs nothing else, and the same comparison makes the same one."""
    shown = (found.nothing, found.ours[0], *found.others)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        'font-size="13">',
        f"<title>Imbalance of {found.hosts} hosts under {len(shown)} rules</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *_over_time(found, shown),
        *_by_bytes(found, shown),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'


def _frame(top: float, height: float, title: str, below: str, most: float) -> list[str]:
    right, bottom = WIDTH - 220, top + height
    parts = [
        _text(EDGE, top - 12, title),
        f'<path d="M{EDGE} {top:.1f}V{bottom:.1f}H{right}" fill="none" stroke="#222"/>',
        _text((EDGE + right) / 2, bottom + 36, below, "middle"),
    ]
    for share in (0.0, 0.5, 1.0):
        parts.append(_text(EDGE - 6, bottom - share * height + 4, f"{share * most:.2f}", "end"))
    return parts


def _over_time(found: Comparison, shown: Sequence[Run]) -> list[str]:
    top, height, width = 50.0, 270.0, WIDTH - 220 - EDGE
    most = max((value for run in shown for value in run.imbalance), default=0.0) or 1.0
    count = max(len(found.nothing.imbalance) - 1, 1)
    hours = count * found.interval / 3600
    parts = _frame(top, height, "Imbalance (0 is even)", "hours", most)
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_text(EDGE + share * width, top + height + 18, f"{share * hours:.0f}", "middle"))
    for number, run in enumerate(shown):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{EDGE + at / count * width:.1f},{top + height * (1 - value / most):.1f}"
            for at, value in enumerate(run.imbalance)
        )
        wide = 2.5 if run is found.ours[0] else 1.2
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{wide}"/>')
        parts.append(_text(WIDTH - 205, top + 16 + 20 * number, run.rule, fill=colour))
    return parts


def _by_bytes(found: Comparison, shown: Sequence[Run]) -> list[str]:
    top, height, width = 430.0, 250.0, WIDTH - 220 - EDGE
    runs = (*shown, *found.ours[1:])
    most = max(run.mean for run in runs) or 1.0
    sent = max(run.bytes for run in runs) or 1.0
    parts = _frame(top, height, "Mean imbalance, by what was sent: lower and further left is better", "GiB sent", most)
    for share in (0.0, 0.5, 1.0):
        parts.append(_text(EDGE + share * width, top + height + 18, f"{share * sent / 2**30:.0f}", "middle"))

    def at(run: Run) -> tuple[float, float]:
        return EDGE + run.bytes / sent * width, top + height * (1 - run.mean / most)

    ours = sorted((found.nothing, *found.ours), key=lambda run: run.bytes)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(at, ours))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{COLOURS[1]}" stroke-dasharray="4 3"/>')
    for number, run in enumerate(shown):
        x, y = at(run)
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
        if run.bytes:  # the others lie on one point
            parts.append(_text(x + 8, y - 6, run.rule, fill=colour))
    parts.append(_text(WIDTH - 205, top + 16, "- - - migrator, by thrift", fill=COLOURS[1]))
    return parts
