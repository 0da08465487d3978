"""Live migrations between two guests with patched kernels, over SSH."""

from __future__ import annotations

import json

import pytest

from tests.vm.lab import migrate
from tests.vm.machine import Machine
from tests.vm.program import Program, numbers

Pair = tuple[Machine, Machine]


@pytest.mark.parametrize(
    ("name", "arguments"), [("counter", (20,)), ("heap.py", (4,)), ("threads", (6,)), ("tree", (4,))]
)
def test_a_program_moves_there_and_back(pair: Pair, name: str, arguments: tuple[object, ...]) -> None:
    here, there = pair
    with Program(here, name, *arguments) as program:
        program.check_progress()
        for _ in range(2):
            migrate(program.pid, here, there, "--copy-files")
            program.await_end()
            program.guest = there
            program.check_progress()
            here, there = there, here
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"


def test_redis_moves_and_its_client_never_notices(pair: Pair) -> None:
    """The client is on guest a, the server on a, then on b: its connection and every reply survive."""
    a, b = pair
    a.run(
        "mkdir -p /tmp/redis && migrator run -d --name shop --bridge br0 --ip 10.77.0.50/24 -- /usr/bin/redis-server "
        "--port 6379 --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp --daemonize no"
    )
    a.run("i=0; until redis-cli -h 10.77.0.50 ping; do sleep 0.2; i=$((i+1)); [ $i -lt 100 ] || exit 1; done")
    client = Program(a, "migrator.testing.redisclient", "10.77.0.50", 6379, "--rate", 200)
    with client:
        client.check_progress()
        for here, there in ((a, b), (b, a)):
            migrate("shop", here, there, "--copy-files")
            (row,) = json.loads(there.run("migrator ps --json").stdout)
            assert (row["name"], row["state"]) == ("shop", "running")
            client.check_progress()
        client.finish()
        a.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(a.run(f"tail -n 1 {client.out}.stdout").stdout)
    assert report["replies"] > 100
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    a.run("migrator stop shop")
