"""From a kernel without the calls to one with them, and back: one engine saves, the other restarts, while the stream
is on its way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.lab import Lab, migrate, restart_agent
from tests.vm.machine import Machine
from tests.vm.program import Program, numbers

Pair = tuple[Machine, Machine]


@pytest.fixture(scope="module")
def kernels(module_folder: Path) -> Iterator[Pair]:
    """(a kernel without the calls, one with them whose agent restarts by the kernel engine whatever comes).

    They have the same vdso, which tasks of Debian's own kernel could not do without."""
    with Lab(module_folder).pair("uncalled", "release") as (stock, patched):
        restart_agent(patched, "--engine", "kernel")
        yield stock, patched


def there_and_back(workload: object, kernels: Pair) -> Iterator[Machine]:
    """Each of the two moves; the guest that it runs on then."""
    stock, patched = kernels
    for here, there, engines in ((stock, patched, ("user", "kernel")), (patched, stock, ("kernel", "user"))):
        result = migrate(workload, here, there, "--copy-files")
        assert result["engine"] == engines[0], result["engine_reason"]
        assert "engine: {} saves, {} restarts (their images are the same)".format(*engines) in result["warnings"]
        assert result["rounds"], "its memory went ahead"
        yield there


@pytest.mark.parametrize(
    ("name", "arguments"), [("counter", (20,)), ("heap.py", (4,)), ("threads", (6,)), ("tree", (4,))]
)
def test_a_program_moves_from_a_stock_kernel_to_a_patched_one_and_back(
    kernels: Pair, name: str, arguments: tuple[object, ...]
) -> None:
    with Program(kernels[0], name, *arguments) as program:
        program.check_progress()
        for there in there_and_back(program.pid, kernels):
            program.await_end()
            program.guest = there
            program.check_progress()
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"


def test_redis_moves_and_its_client_never_notices(kernels: Pair) -> None:
    stock, _ = kernels
    stock.run(
        "mkdir -p /tmp/redis && migrator run -d --name shop --bridge br0 --ip 10.77.0.50/24 -- /usr/bin/redis-server "
        "--port 6379 --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp --daemonize no"
    )
    stock.run("i=0; until redis-cli -h 10.77.0.50 ping; do sleep 0.2; i=$((i+1)); [ $i -lt 100 ] || exit 1; done")
    client = Program(stock, "migrator.testing.redisclient", "10.77.0.50", 6379, "--rate", 100)
    with client:
        client.check_progress()
        for _ in there_and_back("shop", kernels):
            client.check_progress()
        client.finish()
        stock.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(stock.run(f"tail -n 1 {client.out}.stdout").stdout)
    assert report["replies"] > 100
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    stock.run("migrator stop shop")
