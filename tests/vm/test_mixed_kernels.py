"""From a kernel without the calls to one with them, and back."""

from __future__ import annotations

from pathlib import Path

from tests.vm.lab import Lab, migrate
from tests.vm.program import Program, numbers


def test_a_counter_moves_from_a_stock_kernel_to_a_patched_one_and_back(folder: Path) -> None:
    with Lab(folder).pair("off", "release") as (stock, patched), Program(stock, "counter", 20) as counter:
        counter.check_progress()
        for here, there in ((stock, patched), (patched, stock)):
            migrate(counter.pid, here, there, "--copy-files")
            counter.await_end()
            counter.guest = there
            counter.check_progress()
        lines = counter.finish()
    assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"
