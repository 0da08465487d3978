"""The system calls alone, by the tools: workloads frozen, saved, killed and restarted in a guest."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.vm import image
from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program, numbers

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
    ("many", ("files", 50)),
    ("many", ("pipes", 20)),
    ("many", ("mappings", 200)),
    ("many", ("connections", 10)),
    ("arena", (1,)),
    ("openings", (1, 0)),
    ("selves", (1,)),
]
TERMINALS = [("terminals", ()), ("shell.py", ())]
# Those that go on until they are killed.
ENDLESS = [("ledger.py", ("/tmp/ledger.db",)), ("locker.py", ("/tmp",))]

WATCHER = """
import ctypes, time
ctypes.CDLL(None).inotify_init()
while True:
    open("/tmp/watching", "w").close()
    time.sleep(0.1)
"""

LONG = 240.0  # seconds that a command may take where guests share a processor with much else
TREE = "tree() {{ echo $1; for child in $(cat /proc/$1/task/*/children 2> /dev/null); do tree $child; done; }}\n"
# The tasks of a tree in a cgroup of their own, frozen; then saved. Whoever is born meanwhile is born in it.
SAVE = """
group=/sys/fs/cgroup/saved-{pid}
mkdir -p $group
for pass in 1 2; do for pid in $(tree {pid}); do echo $pid > $group/cgroup.procs; done 2> /dev/null; done
echo 1 > $group/cgroup.freeze
until grep -q 'frozen 1' $group/cgroup.events; do sleep 0.02; done
ckpt {pid} > {image} || {{ tail -c 300 {image} | strings | tail -n 1 >&2; exit 1; }}
"""
THAW = "echo 0 > /sys/fs/cgroup/saved-{pid}/cgroup.freeze"
# Their pids are free again then.
KILL = """
group=/sys/fs/cgroup/saved-{pid}
pids=$(tree {pid})
echo 1 > $group/cgroup.kill
until grep -q 'populated 0' $group/cgroup.events; do sleep 0.02; done
rmdir $group
for pid in $pids; do for i in {{1..600}}; do [ -e /proc/$pid ] || continue 2; sleep 0.1; done; exit 1; done
"""


def save(guest: Machine, pid: int, image: str = "/tmp/image") -> None:
    """Save a tree, which stays frozen; again a moment later where a connection was just being made or ended, as fds
    does it all the time."""
    for attempt in range(5):
        try:
            guest.run((TREE + SAVE).format(pid=pid, image=image))
            return
        except CommandFailed as error:
            if attempt == 4 or "a TCP connection" not in str(error):
                raise
            guest.run(THAW.format(pid=pid))
            time.sleep(0.2)


def kill(guest: Machine, pid: int) -> None:
    guest.run((TREE + KILL).format(pid=pid), seconds=LONG)


def mute(guest: Machine, pid: int) -> int:
    """Let the connections of a saved tree end unheard of, as a migration does: otherwise one end would wait for an
    answer of the other's, and the copy could not have its address. How many there were."""
    return int(guest.python(f"from migrator.engine.kernel import calls; print(calls.mute({pid}, calls.SUBTREE))"))


@contextmanager
def held_network(guest: Machine, port: int) -> Iterator[None]:
    """What a migration does from before the tasks are saved: what arrives afterwards, the kernel would confirm and
    nobody would have, and nobody hears of the end of a connection while it has no owner."""
    guest.run(
        "nft add table inet held && nft add chain inet held out '{ type filter hook output priority 0; }' && "
        f"nft add rule inet held out tcp sport {port} drop && nft add rule inet held out tcp dport {port} drop"
    )
    try:
        yield
    finally:
        guest.run("nft delete table inet held")


@pytest.mark.parametrize(
    ("name", "arguments"), [*WORKLOADS, *TERMINALS], ids=[name for name, _ in [*WORKLOADS, *TERMINALS]]
)
def test_a_workload_goes_on_from_its_image(guest: Machine, name: str, arguments: tuple[object, ...]) -> None:
    with Program(guest, name, *arguments) as program:
        program.check_progress()
        save(guest, program.pid)
        if name == "fds" or "connections" in arguments:
            assert mute(guest, program.pid)
        kill(guest, program.pid)
        guest.run("mktree -d < /tmp/image")
        program.check_progress()
        lines = program.finish()
        if name == "counter":
            assert numbers(lines) == list(range(1, len(numbers(lines)) + 1)), "no step is lost or made twice"


def test_redis_goes_on_with_its_client_connected(guest: Machine) -> None:
    server = guest.spawn(
        "redis-server --port 6390 --bind 127.0.0.1 --save '' --appendonly no --dir /tmp < /dev/null "
        "> /tmp/redis.log 2>&1"
    )
    guest.run("for i in {1..100}; do redis-cli -p 6390 ping && exit; sleep 0.1; done; exit 1")
    client = Program(guest, "migrator.testing.redisclient", "127.0.0.1", 6390, "--rate", 50)
    with client:
        client.check_progress()
        with held_network(guest, 6390):
            save(guest, server)
            assert mute(guest, server) == 1
            kill(guest, server)
            guest.run("mktree -d < /tmp/image")
        client.check_progress()
        client.finish()
        guest.run(f"for i in {{1..100}}; do grep -q replies {client.out}.stdout && exit; sleep 0.1; done; exit 1")
        report = json.loads(guest.run(f"tail -n 1 {client.out}.stdout").stdout)
    guest.run(f"kill -KILL {server}", status=None)
    assert report["replies"] > 10
    assert (report["lost_replies"], report["wrong_replies"], report["reconnects"]) == (0, 0, 0)


def test_what_is_not_carried_is_refused_by_name_and_runs_on(guest: Machine) -> None:
    guest.put("/tmp/watch.py", WATCHER.encode())
    pid = guest.spawn("$PYTHON /tmp/watch.py")
    guest.run("until [ -e /tmp/watching ]; do sleep 0.05; done")
    with pytest.raises(CommandFailed, match=rf"task {pid}, descriptor \d+: inotify"):
        save(guest, pid)
    guest.run(THAW.format(pid=pid))
    guest.run("rm /tmp/watching; until [ -e /tmp/watching ]; do sleep 0.05; done")
    kill(guest, pid)


def test_an_image_of_the_first_revision_is_converted_and_goes_on(guest: Machine) -> None:
    with Program(guest, "counter") as program:
        program.check_progress()
        save(guest, program.pid)
        kill(guest, program.pid)
        old = bytearray(guest.get("/tmp/image"))
        struct.pack_into("<H", old, 18, 1)  # the revision, in the first record
        guest.put("/tmp/old", bytes(old))
        guest.run("migrator image convert /tmp/old -o /tmp/new && cmp /tmp/new /tmp/image && mktree -d < /tmp/new")
        program.check_progress()
        program.finish()


def test_a_released_image_of_every_revision_is_understood_and_refused_for_its_processor(guest: Machine) -> None:
    for path in sorted((image.ROOT / "tests" / "golden").glob("rev*.img")):
        refused = guest.run(f"rstr < {path}", status=None)
        assert refused.status == 1
        assert "No such device" in refused.stderr, f"{path.name}: {refused.stderr}"
