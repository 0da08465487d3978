"""The kernel engine in a guest: workloads saved, ended and restarted by it, and by both engines in turn."""

from __future__ import annotations

import pytest

from tests.vm.machine import Machine
from tests.vm.program import Program, numbers

WORKLOADS = [
    ("counter", ()),
    ("memory", (16, 20, "all")),
    ("threads", (6,)),
    ("tree", (4,)),
    ("fds", ()),
    ("heap.py", (4,)),
    ("pipeline.sh", ()),
]
ENGINES = [("kernel", "kernel"), ("kernel", "user"), ("user", "kernel")]


@pytest.mark.parametrize(("saves", "restarts"), ENGINES, ids=["-".join(pair) for pair in ENGINES])
@pytest.mark.parametrize(("name", "arguments"), WORKLOADS, ids=[name for name, _ in WORKLOADS])
def test_a_workload_goes_on_from_its_image(
    guest: Machine, name: str, arguments: tuple[object, ...], saves: str, restarts: str
) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        guest.run(f"migrator checkpoint {program.pid} --engine {saves} --kill -o /tmp/image")
        program.await_end()
        assert f" by {saves}," in guest.run("migrator image info /tmp/image").stdout
        guest.run(f"migrator restart --engine {restarts} --detach -i /tmp/image")
        program.check_progress()
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"
