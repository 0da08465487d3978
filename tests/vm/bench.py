"""`make bench-kernel`: the engines side by side in one guest.

    python -m tests.vm.bench [--repeat N] [--workload NAME]...

Milliseconds, medians, under an emulated processor: about ten times those of real hardware, so what counts is the
ratio. `tests/vm/measure.py` says what is measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from migrator.engine.select import CANDIDATES
from tests.vm.lab import Lab
from tests.vm.machine import Machine
from tests.vm.measure import WORKLOADS

FIGURES = ("checkpoint", "freeze", "restart")


def main() -> None:
    parser = argparse.ArgumentParser(description="Both engines side by side in one guest.")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--workload", action="append", choices=WORKLOADS)
    arguments = parser.parse_args()
    table = Table(title="in one guest under TCG, milliseconds, medians", header_style="dim", title_justify="left")
    for column in ("workload", "engine", *FIGURES):
        table.add_column(column, justify="right" if column in FIGURES else "left")
    failed = False
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        lab = Lab(Path(folder), memory_mib=2048)
        for workload in arguments.workload or WORKLOADS:
            for engine in CANDIDATES:
                # A fresh guest for each, as from a machine that has just booted.
                with lab.guest(name="bench") as guest:
                    row, error = measure(guest, engine, workload, arguments.repeat)
                failed |= bool(error)
                table.add_row(workload, engine, *(f"{row[f] * 1e3:.1f}" if row else "-" for f in FIGURES))
                if error:
                    print(f"{workload}, {engine}: {error}", file=sys.stderr)
    Console().print(table)
    sys.exit(failed)


def measure(guest: Machine, engine: str, workload: str, repeat: int) -> tuple[dict[str, float], str]:
    """Medians in seconds, and why there are none."""
    done = guest.run(f"$PYTHON -m tests.vm.measure {engine} '{workload}' {repeat}", seconds=300 * repeat, status=None)
    if done.status:
        return {}, (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {figure: statistics.median(row[figure] for row in rows) for figure in FIGURES}, ""


if __name__ == "__main__":
    main()
