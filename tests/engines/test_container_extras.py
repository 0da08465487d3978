"""What a program sets up in the network of its container beside addresses and plain routes is refused by name."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import migrator
from contained import NAME, own_directories, run  # noqa: F401 (a fixture)
from pyroute2.nftables.main import NFTables

from migrator.linux.namespaces import run_in

pytestmark = pytest.mark.root

QUIET = "import time\nprint('ready', flush=True)\nwhile True: time.sleep(1)"
REFUSED = [
    ("ip rule add from 10.99.0.2 table 77", "the routing rule 32765 (ip rule)"),
    ("ip -6 rule add to fd00::7 table 5", "the routing rule 32765 (ip rule)"),
    ("ip route add blackhole 10.77.0.0/16", "the route to 10.77.0.0/16"),
    ("ip route add 10.78.0.0/16 nexthop via 10.99.0.1 nexthop via 10.99.0.3", "the route to 10.78.0.0/16"),
    ("ip route add 10.79.0.0/16 via 10.99.0.1 table 100", "the route to 10.79.0.0/16"),
    ("ip route add 10.80.0.0/16 via 10.99.0.1 mtu 1000", "the route to 10.80.0.0/16"),
    ("ip nexthop add id 5 via 10.99.0.9 dev eth0", "a next hop of its own (ip nexthop)"),
    ("tc qdisc add dev eth0 root pfifo limit 10", "the queueing discipline pfifo of eth0 (tc)"),
    ("ip addr add 10.6.0.1 peer 10.6.0.2 dev eth0", "the address 10.6.0.1/32 of eth0, with a peer or scope"),
    ("ip -6 addr add fe80::77/64 dev eth0", "the address fe80::77/64 of eth0, with a peer or scope"),
    ("ip neigh add 10.99.0.8 lladdr 02:00:00:00:00:08 dev eth0 nud permanent", "the permanent neighbour 10.99.0.8"),
    ("ip xfrm policy add src 10.99.0.2 dst 10.99.0.7 dir out", "an IPsec state or policy (ip xfrm)"),
]


@pytest.fixture
def bridge() -> Iterator[str]:
    name = f"mgx{os.getpid()}"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    yield name
    subprocess.run(["ip", "link", "del", name], check=True)


def obstacles(folder: Path) -> str:
    return migrator("checkpoint", NAME, "-o", folder / "image", code=3).stderr


def test_it_is_refused_and_what_is_plain_goes_along(tmp_path: Path, bridge: str) -> None:
    pid = run(tmp_path, QUIET, "--bridge", bridge, "--ip", "10.99.0.2/24", "--gateway", "10.99.0.1")
    inside = ["nsenter", "-t", str(pid), "-n"]
    plain = "ip route add 10.81.0.0/16 via 10.99.0.1 metric 7 proto 186"  # as a routing daemon does
    subprocess.run([*inside, *plain.split()], check=True)
    migrator("checkpoint", NAME, "-o", tmp_path / "image")
    for command, reason in REFUSED:
        subprocess.run([*inside, *command.split()], check=True)
        assert f"pid {pid}: {reason}" in obstacles(tmp_path), command
    run_in(pid, {"net"}, lambda: _add_table())
    assert "a table of nftables in the container is not carried" in obstacles(tmp_path)
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"


@pytest.mark.parametrize(
    ("command", "reason"),
    [("mount -o remount,bind,ro,noexec PLACE", "was mounted noexec, ro"), ("umount PLACE", "was unmounted")],
)
def test_a_mount_of_the_host_that_was_narrowed_is_refused(command: str, reason: str, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
    try:
        pid = run(tmp_path, QUIET)
        migrator("checkpoint", NAME, "-o", tmp_path / "image")
        inside = ["nsenter", "-t", str(pid), "-m", *command.replace("PLACE", str(place)).split()]
        subprocess.run(inside, check=True)
        assert f"pid {pid}: that {str(place)!r} {reason} in the container is not carried" in obstacles(tmp_path)
        subprocess.run(["umount", place], check=True)  # now it is of the host no more
        if "umount" in command:
            migrator("checkpoint", NAME, "-o", tmp_path / "image")
    finally:
        subprocess.run(["umount", place], check=False, capture_output=True)


def test_what_the_host_has_mounted_anew_was_not_unmounted_inside(tmp_path: Path) -> None:
    """Removing the directory takes the mount from the container too, as when a user logs out and in again."""
    folder, place = tmp_path / "folder", tmp_path / "place"
    folder.mkdir()
    bind = ["mount", "--bind", folder, place]
    place.mkdir()
    subprocess.run(bind, check=True)
    try:
        pid = run(tmp_path, QUIET)
        migrator("checkpoint", NAME, "-o", tmp_path / "image")
        subprocess.run(["umount", place], check=True)
        place.rmdir()
        assert str(place) not in Path(f"/proc/{pid}/mountinfo").read_text()
        place.mkdir()
        subprocess.run(bind, check=True)
        migrator("checkpoint", NAME, "-o", tmp_path / "image")
    finally:
        subprocess.run(["umount", place], check=False, capture_output=True)


def _add_table() -> None:
    with NFTables() as tables:
        tables.table("add", name="test")
