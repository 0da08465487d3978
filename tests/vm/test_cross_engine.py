"""An image of one engine restarted by the other, both ways: it is one format.

That a workload goes on from an image of the same engine is in test_calls.py for the calls, and in the tests of this
machine for the user engine.
"""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.program import Program, numbers
from tests.vm.test_calls import WORKLOADS

LONG = 240.0  # seconds that a command may take where guests share a processor with much else


@pytest.mark.parametrize(("name", "arguments"), WORKLOADS, ids=[name for name, _ in WORKLOADS])
def test_a_workload_goes_from_engine_to_engine(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        for saves, restarts in (("kernel", "user"), ("user", "kernel")):
            guest.run(f"migrator checkpoint {program.pid} --engine {saves} --kill -o /tmp/image", seconds=LONG)
            program.await_end()
            # Its pid is taken for as long as a child of its session is.
            guest.run(f'until [ -z "$(ps -o pid= --sid {program.pid})" ]; do sleep 0.05; done')
            assert f" by {saves}," in guest.run("migrator image info /tmp/image").stdout
            guest.run(f"migrator restart --engine {restarts} --detach -i /tmp/image", seconds=LONG)
            program.check_progress()
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"
