"""The kernel engine in guests: what it refuses, images that lie, and workloads moved between two kernels."""

from __future__ import annotations

import json

import pytest

from tests.vm.lab import AGENT_PORT, migrate, start_agent
from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program, numbers

Pair = tuple[Machine, Machine]
LONG = 240.0  # seconds that a command may take where guests share a processor with much else


def test_what_the_kernel_refuses_is_named_and_the_program_runs_on(guest: Machine) -> None:
    pid = guest.spawn("sleep 1000 < /dev/kmsg")
    where = guest.run(f"cat /proc/{pid}/cgroup").stdout
    with pytest.raises(CommandFailed, match=rf"exit status 3[^$]*task {pid}, descriptor 0"):
        guest.run(f"migrator checkpoint {pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
    assert guest.run(f"cat /proc/{pid}/cgroup").stdout == where
    guest.run(f"kill {pid} && while [ -e /proc/{pid} ]; do sleep 0.1; done")


def test_an_image_that_was_cut_restarts_nothing(guest: Machine) -> None:
    with Program(guest, "counter") as program:
        guest.run(f"migrator checkpoint {program.pid} --engine kernel --kill -o /tmp/image", seconds=LONG)
        program.await_end()
        with pytest.raises(CommandFailed, match="exit status 6"):
            guest.run("head -c 20000 /tmp/image | migrator restart --engine kernel --detach", seconds=LONG)
        assert guest.run(f"ls -d /proc/{program.pid} /sys/fs/cgroup/migrator/restart-*", status=None).stdout == ""
        guest.run("migrator restart --engine kernel --detach -i /tmp/image", seconds=LONG)
        program.check_progress()
        program.finish()


# ---------------------------------------------------------------------- between hosts


@pytest.fixture(scope="module")
def kernels(pair: Pair) -> Pair:
    """Two guests whose agents restart by the kernel engine."""
    for machine in pair:
        machine.run("pkill -f 'migrator agent'; while pgrep -f 'migrator agent'; do sleep 0.1; done")
        start_agent(machine, "--engine", "kernel")
    return pair


@pytest.mark.parametrize(("name", "arguments"), [("counter", (20,)), ("heap.py", (4,)), ("tree", (4,))])
def test_a_program_moves_there_and_back(kernels: Pair, name: str, arguments: tuple[object, ...]) -> None:
    here, there = kernels
    with Program(here, name, *arguments) as program:
        program.check_progress()
        for _ in range(2):
            result = migrate(program.pid, here, there, "--copy-files", "--engine", "kernel")
            assert (result["engine"], result["engine_reason"]) == ("kernel", "it was asked for")
            assert len(result["rounds"]) > 1, "its memory went ahead"
            program.await_end()
            program.guest = there
            program.check_progress()
            here, there = there, here
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"


def test_a_source_that_dies_before_the_decision_leaves_its_tasks_frozen_and_settles_them_here(kernels: Pair) -> None:
    here, there = kernels
    with Program(here, "counter", 20) as counter:
        counter.check_progress()
        here.run(
            f"MIGRATOR_FAULT=source.saved:exit migrator migrate {counter.pid} root@b:{AGENT_PORT} --copy-files "
            "--engine kernel --identity /var/root/.ssh/id_ed25519",
            seconds=LONG,
            status=None,
        )
        frozen = here.run("cat /sys/fs/cgroup/migrator/*/cgroup.freeze").stdout
        assert "1" in frozen.split()
        here.run("migrator settle --identity /var/root/.ssh/id_ed25519", seconds=LONG)
        counter.check_progress()
        there.run(f"for i in {{1..300}}; do [ -e /proc/{counter.pid} ] || exit 0; sleep 0.1; done; exit 1")
        counter.finish()


def test_redis_moves_and_its_client_never_notices(kernels: Pair) -> None:
    """The client is on guest a, the server on a, then on b: its connection and every reply survive."""
    a, b = kernels
    a.run(
        "mkdir -p /tmp/redis && migrator run -d --name shop --bridge br0 --ip 10.77.0.50/24 -- /usr/bin/redis-server "
        "--port 6379 --bind 0.0.0.0 --protected-mode no --save '' --appendonly no --dir /tmp --daemonize no"
    )
    a.run("i=0; until redis-cli -h 10.77.0.50 ping; do sleep 0.2; i=$((i+1)); [ $i -lt 100 ] || exit 1; done")
    client = Program(a, "migrator.testing.redisclient", "10.77.0.50", 6379, "--rate", 100)
    with client:
        client.check_progress()
        for here, there in ((a, b), (b, a)):
            result = migrate("shop", here, there, "--copy-files", "--engine", "kernel")
            assert result["engine"] == "kernel"
            (row,) = json.loads(there.run("migrator ps --json").stdout)
            assert (row["name"], row["state"]) == ("shop", "running")
            client.check_progress()
        client.finish()
        a.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(a.run(f"tail -n 1 {client.out}.stdout").stdout)
    assert report["replies"] > 100
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    a.run("migrator stop shop")
