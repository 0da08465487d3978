"""An image of one engine restarted by the other, both ways: it is one format."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.program import Program, numbers
from tests.vm.test_calls import WORKLOADS, kill, save


@pytest.mark.parametrize(("name", "arguments"), WORKLOADS, ids=[name for name, _ in WORKLOADS])
def test_a_workload_goes_from_engine_to_engine(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        guest.run(f"migrator checkpoint {program.pid} --kill -o /tmp/image")
        program.await_end()
        # Its pid is taken for as long as a child of its session is.
        guest.run(f'until [ -z "$(ps -o pid= --sid {program.pid})" ]; do sleep 0.05; done')
        guest.run("mktree -d < /tmp/image")
        program.check_progress()
        save(guest, program.pid)
        kill(guest, program.pid)
        guest.run("migrator restart --detach -i /tmp/image")
        program.check_progress()
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"
