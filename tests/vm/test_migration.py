"""Live migrations between two guests with patched kernels, over SSH, by the engine that is chosen and by the other."""

from __future__ import annotations

import json

import pytest

from tests.vm.lab import AGENT_PORT, migrate
from tests.vm.machine import Machine
from tests.vm.program import Program, numbers

Pair = tuple[Machine, Machine]

UNREAD = """
import socket, sys, time
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 0))
sock.sendto(b"waits", sock.getsockname())
out = open(sys.argv[1], "w", buffering=1)
while True:
    print(sock.recv(10, socket.MSG_PEEK), file=out)
    time.sleep(0.1)
"""
OWNED = """
import fcntl, os, sys, time
reads, writes = os.pipe()
fcntl.fcntl(reads, fcntl.F_SETOWN, os.getpid())
out = open(sys.argv[1], "w", buffering=1)
while True:
    print(fcntl.fcntl(reads, fcntl.F_GETOWN) == os.getpid(), file=out)
    time.sleep(0.1)
"""


@pytest.mark.parametrize(
    ("name", "arguments", "engine"),
    [
        ("counter", (20,), ""),
        ("heap.py", (4,), ""),
        ("threads", (6,), ""),
        ("tree", (4,), ""),
        ("arena", (1,), ""),
        ("tree", (4,), "user"),
    ],
)
def test_a_program_moves_there_and_back(pair: Pair, name: str, arguments: tuple[object, ...], engine: str) -> None:
    here, there = pair
    with Program(here, name, *arguments) as program:
        program.check_progress()
        for _ in range(2):
            result = migrate(program.pid, here, there, "--copy-files", *(["--engine", engine] if engine else []))
            assert result["engine"] == (engine or "kernel"), result["engine_reason"]
            assert not [note for note in result["warnings"] if note.startswith("engine")], "the same one restarts it"
            assert result["rounds"], "its memory went ahead"
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
    client = Program(a, "migrator.testing.redisclient", "10.77.0.50", 6379, "--rate", 100)
    with client:
        client.check_progress()
        for here, there in ((a, b), (b, a)):
            result = migrate("shop", here, there, "--copy-files")
            assert result["engine"] == "kernel", result["engine_reason"]
            assert result["rounds"], "its memory went ahead"
            (row,) = json.loads(there.run("migrator ps --json").stdout)
            assert (row["name"], row["state"]) == ("shop", "running")
            client.check_progress()
        client.finish()
        a.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(a.run(f"tail -n 1 {client.out}.stdout").stdout)
    assert report["replies"] > 100
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)
    a.run("migrator stop shop")


@pytest.mark.parametrize(
    ("program", "reason", "says"),
    [(UNREAD, "datagram", "b'waits'"), (OWNED, "sends signals to an owner", "True")],
    ids=["refused at once", "refused over there"],
)
def test_what_the_kernel_engine_does_not_carry_moves_by_the_other_one(
    pair: Pair, program: str, reason: str, says: str
) -> None:
    here, there = pair
    here.put("/tmp/carried.py", program.encode())
    pid = here.spawn("$PYTHON /tmp/carried.py /tmp/carried.out < /dev/null")
    here.run("until [ -s /tmp/carried.out ]; do sleep 0.05; done")
    result = migrate(pid, here, there, "--copy-files")
    assert result["engine"] == "user"
    assert "engine kernel: " in result["engine_reason"] and reason in result["engine_reason"]
    lines = int(there.run("wc -l < /tmp/carried.out").stdout)
    there.run(f"until [ $(wc -l < /tmp/carried.out) -gt {lines + 3} ]; do sleep 0.05; done")
    assert set(there.run("cat /tmp/carried.out").stdout.splitlines()) == {says}
    there.run(f"kill -KILL {pid}")


def test_a_source_that_dies_before_the_decision_leaves_its_tasks_frozen_and_settles_them_here(pair: Pair) -> None:
    here, there = pair
    with Program(here, "counter", 20) as counter:
        counter.check_progress()
        here.run(
            f"MIGRATOR_FAULT=source.saved:exit migrator migrate {counter.pid} root@b:{AGENT_PORT} --copy-files "
            "--engine kernel --identity /var/root/.ssh/id_ed25519",
            seconds=240,
            status=None,
        )
        frozen = here.run("cat /sys/fs/cgroup/migrator/*/cgroup.freeze").stdout
        assert "1" in frozen.split()
        here.run("migrator settle --identity /var/root/.ssh/id_ed25519", seconds=240)
        counter.check_progress()
        there.run(f"for i in {{1..300}}; do [ -e /proc/{counter.pid} ] || exit 0; sleep 0.1; done; exit 1")
        counter.finish()
