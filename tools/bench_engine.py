"""Downtime of the user engine by how much there is of one thing: threads, processes, descriptors, connections.

Two pid namespaces on this machine are the two hosts, and the stream goes through a socket between two engines: no
network, no session, no encryption. Each workload is moved there and back several times.

    total    seconds of a move from its survey to its end, three rounds among it
    gap      the longest time in which the program itself did not run, from freeze to resume (its own clock)
    cpu      ms of processors that both engines took from freeze to hold: what a busy machine changes least
    predict  the gap by the model of migrator.session.prediction, learnt from the moves before each
    slope    ms of gap, and of cpu, for each further one, by least squares over the three sizes; base: the rest
    phases   ms of each phase of the largest size, source and destination, medians
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "engines"))

from pidhosts import HostedWorkload, PidHost, migrate

from migrator.session.prediction import Costs
from migrator.testing.stage import require_root

ROWS = {
    "threads": (20, 50, 200),
    "processes": (30, 100, 300),
    "files": (300, 1000, 5000),
    "pipes": (100, 300, 1000),
    "connections": (50, 200, 500),
    "mappings": (3000, 10000, 30000),
}
EACH = {"pipes": 2, "connections": 2}  # what a slope counts: ends; of the others each is one
TARGETS_MS = {"threads": 0.1, "processes": 1.0, "files": 0.01, "pipes": 0.01, "connections": 0.05, "mappings": 0.005}
BASE_MS = 10.0


@dataclass
class Size:
    """All moves of one workload of one size, in ms."""

    kind: str
    count: int
    gaps: list[float] = field(default_factory=list)
    predicted: list[float] = field(default_factory=list)
    cpus: list[float] = field(default_factory=list)
    totals: list[float] = field(default_factory=list)  # seconds
    phases: dict[str, list[float]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return statistics.median(self.totals)

    @property
    def cpu(self) -> float:
        return statistics.median(self.cpus)

    @property
    def gap(self) -> float:
        return statistics.median(self.gaps)


def measure(kind: str, count: int, repeat: int, costs: Costs) -> tuple[Size, Costs]:
    size = Size(kind, count)
    with (
        tempfile.TemporaryDirectory() as folder,
        PidHost("bench-a", own_network=True) as a,
        PidHost("bench-b", own_network=True) as b,
        HostedWorkload(a, "many", Path(folder), kind, count) as workload,
    ):
        time.sleep(0.3)
        here, there = a, b
        for _ in range(repeat):
            before = time.monotonic_ns()
            moved = migrate(workload, here, there)
            size.cpus.append(moved.cpu)
            size.totals.append((time.monotonic_ns() - before) / 1e9)
            time.sleep(0.15)
            lines = [line.split() for line in workload.lines() if line.startswith("gap ")]
            size.gaps.append(max((int(e) - int(s) for _, s, e in lines if int(e) > before), default=0) / 1e6)
            work = moved.rounds[-1].work
            if work is not None and size.gaps[-1]:
                size.predicted.append(costs.seconds(work) * 1000)
                costs = costs.corrected(work, size.gaps[-1] / 1000)
            for where, phases in (("source", moved.source), ("destination", moved.destination)):
                for name, ms in phases.items():
                    size.phases.setdefault(f"{where} {name}", []).append(ms)
            here, there = there, here
        workload.check_alive_and_progressing(ticks=1)
    return size, costs


def fit(sizes: list[Size], ys: list[float]) -> tuple[float, float]:
    """(slope, base) in ms by least squares of the medians `ys`; of one size, its whole."""
    each = EACH.get(sizes[0].kind, 1)
    xs = [s.count * each for s in sizes]
    if len(sizes) < 2:
        return ys[0] / xs[0], 0.0
    line = statistics.linear_regression(xs, ys)
    return line.slope, line.intercept


def show(console: Console, rows: dict[str, list[Size]]) -> None:
    table = Table(title="the engine alone: downtime in ms, medians", header_style="dim", title_justify="left")
    for title in (
        "workload", "sizes", "total s", "gap", "predict", "cpu", "slope", "base", "cpu slope", "target", "at target",
    ):  # fmt: skip
        table.add_column(title, justify="left" if title == "workload" else "right")
    for kind, sizes in rows.items():
        slope, base = fit(sizes, [s.gap for s in sizes])
        cpu_slope, _ = fit(sizes, [s.cpu for s in sizes])
        target = TARGETS_MS[kind]
        table.add_row(
            kind,
            " / ".join(str(s.count) for s in sizes),
            " / ".join(f"{s.total:.2f}" for s in sizes),
            " / ".join(f"{s.gap:.1f}" for s in sizes),
            " / ".join(f"{statistics.median(s.predicted or [0.0]):.1f}" for s in sizes),
            " / ".join(f"{s.cpu:.1f}" for s in sizes),
            f"{slope:.4f}",
            f"{base:.1f}",
            f"{cpu_slope:.4f}",
            f"{target}",
            f"{BASE_MS + target * EACH.get(kind, 1) * sizes[-1].count:.0f}",
        )
    console.print(table)
    for kind, sizes in rows.items():
        last = sizes[-1]
        parts = {name: statistics.median(values) for name, values in last.phases.items()}
        text = "  ".join(f"{name} {ms:.1f}" for name, ms in parts.items() if ms >= 0.05)
        console.print(f"[bold]{last.count} {kind}[/]: {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="kinds, with commas between")
    parser.add_argument("--largest", action="store_true", help="only the largest size of each")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    options = parser.parse_args()
    require_root()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 190)
    rows: dict[str, list[Size]] = {}
    costs = Costs()
    for kind in options.only.split(",") if options.only else ROWS:
        for count in ROWS[kind][-1:] if options.largest else ROWS[kind]:
            size, costs = measure(kind, count, options.repeat, costs)
            rows.setdefault(kind, []).append(size)
            console.print(f"[dim]{count} {kind}: {rows[kind][-1].gap:.1f} ms[/]")
    show(console, rows)
    if options.json:
        options.json.write_text(json.dumps({kind: [vars(s) for s in sizes] for kind, sizes in rows.items()}, indent=1))


if __name__ == "__main__":
    main()
