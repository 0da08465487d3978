"""An image of one engine restarted by the other, both ways: it is one format.

That a workload goes on from an image of the same engine is in test_calls.py for the calls, and in the tests of this
machine for the user engine.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program, numbers
from tests.vm.test_calls import ENDLESS, LONG, WORKLOADS

# What the kernel engine refuses, and is there for a moment only: locker looks into /proc/self all the time, fds makes
# and ends connections. Whatever is refused when it is saved runs on; what cannot be restarted the user engine carries.
PASSING = re.compile("/proc/.* is about a task|/proc/.* cannot be opened|a TCP connection")
BOTH_WAYS = (("kernel", "user"), ("user", "kernel"))
ALL = [*WORKLOADS, *ENDLESS]


def from_engine_to_engine(
    guest: Machine, workload: object, gone: Callable[[], None], goes_on: Callable[[], None]
) -> None:
    for saves, restarts in BOTH_WAYS:
        for attempt in range(5):
            try:
                guest.run(f"migrator checkpoint {workload} --engine {saves} --kill -o /tmp/image", seconds=LONG)
            except CommandFailed as error:
                if attempt == 4 or not (saves == "kernel" and PASSING.search(str(error))):
                    raise
                continue
            gone()
            guest.run(f"head -c 500 /tmp/image | grep -aqw {saves}")  # the header says who has written it
            try:
                guest.run(f"migrator restart --engine {restarts} --detach -i /tmp/image", seconds=LONG)
                break
            except CommandFailed as error:
                if attempt == 4 or not (restarts == "kernel" and PASSING.search(str(error))):
                    raise
                guest.run("migrator restart --engine user --detach -i /tmp/image", seconds=LONG)
        goes_on()


@pytest.mark.parametrize(("name", "arguments"), ALL, ids=["-".join(map(str, (name, *rest[:1]))) for name, rest in ALL])
def test_a_workload_goes_from_engine_to_engine(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()

        def gone() -> None:
            program.await_end()
            # Its pid is taken for as long as a child of its session is.
            guest.run(f'until [ -z "$(ps -o pid= --sid {program.pid})" ]; do sleep 0.05; done')

        from_engine_to_engine(guest, program.pid, gone, program.check_progress)
        if (name, arguments) in ENDLESS:
            return
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"


def test_terminals_are_restarted_by_the_kernel_engine_alone(guest: Machine) -> None:
    with Program(guest, "terminals") as program:
        program.check_progress()
        guest.run(f"migrator checkpoint {program.pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
        program.await_end()
        with pytest.raises(CommandFailed, match=r"exit status 5[^$]*has a terminal \(/dev/pts/\d+\)"):
            guest.run("migrator restart --engine user --detach -i /tmp/image", seconds=LONG)
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
        program.check_progress()
        program.finish()


def test_redis_goes_from_engine_to_engine_with_its_client_connected(guest: Machine) -> None:
    guest.run("ip link add br0 type bridge && ip addr add 10.77.0.1/24 dev br0 && ip link set br0 up")
    guest.run(
        "mkdir -p /tmp/redis && migrator run -d --name shop --bridge br0 --ip 10.77.0.50/24 -- /usr/bin/redis-server "
        "--port 6379 --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp --daemonize no"
    )
    guest.run("i=0; until redis-cli -h 10.77.0.50 ping; do sleep 0.2; i=$((i+1)); [ $i -lt 100 ] || exit 1; done")
    client = Program(guest, "migrator.testing.redisclient", "10.77.0.50", 6379, "--rate", 50)
    with client:
        client.check_progress()
        from_engine_to_engine(guest, "shop", lambda: None, client.check_progress)
        client.finish()
        guest.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(guest.run(f"tail -n 1 {client.out}.stdout").stdout)
    assert report["replies"] > 10
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    guest.run("migrator stop shop")
