"""The user engine on the patched kernel: workloads saved, killed and restarted in a guest."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.program import Program

WORKLOADS = [
    ("counter", ()),
    ("memory", (16, 20, "all")),
    ("threads", (6,)),
    ("tree", (4,)),
    ("signals", ()),
    ("fds", ()),
    ("fp", ()),
    ("creds", ()),
    ("heap.py", (4,)),
    ("pipeline.sh", ()),
]


@pytest.mark.parametrize(("name", "arguments"), WORKLOADS, ids=[name for name, _ in WORKLOADS])
def test_a_workload_goes_on_from_its_image(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        guest.run(f"migrator checkpoint {program.pid} --kill -o /tmp/image")
        program.await_end()
        guest.run("migrator restart --detach -i /tmp/image")
        program.check_progress()
        program.finish()
