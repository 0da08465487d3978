"""New connections wait while the switchover is near, and closed ones are served to their end from the old place."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import Iterator

import pytest

import migrator
from migrator.container import Container, ContainerSpec, Sandbox, connection_filter, run, stop
from migrator.container.switchover import NetworkArrival, NetworkLock
from migrator.errors import Refused
from migrator.linux.namespaces import entered
from migrator.testing.hosts import Host, TwoHosts

pytestmark = pytest.mark.root

ADDRESSES = ("10.77.0.60", "fd77::60")
PORT = 7100
SIZE = 3_000_000

# Says who it is to each line; at the line "end" sends much and closes at once.
SERVER = f"""
import socket, sys, threading
s = socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
def serve(c):
    file = c.makefile("rb")
    while line := file.readline():
        if line == b"end\\n":
            c.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, {2 * SIZE})
            c.sendall(b"x" * {SIZE}); file.close(); c.close(); return
        c.sendall(sys.argv[1].encode() + b"\\n")
while True:
    threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()
"""


def start(host: Host, label: str, *, shut: bool = False) -> Container:
    spec = ContainerSpec(
        name="orphaned",
        argv=(sys.executable, "-c", SERVER, label),
        bridge="br0",
        addresses=(f"{ADDRESSES[0]}/24", f"{ADDRESSES[1]}/64"),
    )
    with pytest.MonkeyPatch.context() as patch, host.inside():
        if shut:
            patch.setattr(Sandbox, "open_port", lambda self: None)
        return run(spec)


def connect(hosts: TwoHosts, address: str) -> socket.socket:
    for _ in range(100):
        with entered(hosts.client.netns_path):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.settimeout(10)
        try:
            sock.connect((address, PORT))
            return sock
        except ConnectionRefusedError:
            sock.close()
            time.sleep(0.05)
    raise AssertionError("nobody listens")


@pytest.fixture(params=ADDRESSES)
def address(request: pytest.FixtureRequest, two_hosts: TwoHosts) -> Iterator[str]:
    two_hosts.client.run(["ip", "addr", "add", "fd77::100/64", "dev", "uplink", "nodad"])
    yield request.param


def test_a_kernel_without_bpf_is_told_before_anything_is_done(
    two_hosts: TwoHosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    container = start(two_hosts.a, "a")
    monkeypatch.setattr(connection_filter, "dropping_beginnings", no_bpf)
    with two_hosts.a.inside():
        with pytest.raises(Refused, match="orphaned: its connections cannot be moved: bpf"):
            asyncio.run(migrator.check("orphaned", "root@10.77.0.2:7022"))
        assert container.alive


def no_bpf() -> None:
    raise OSError(38, "Function not implemented")


def test_a_new_connection_waits_while_an_old_one_goes_on(two_hosts: TwoHosts, address: str) -> None:
    container = start(two_hosts.a, "a")
    old = connect(two_hosts, address)
    with entered(two_hosts.client.netns_path):
        new = socket.socket(old.family)
    new.settimeout(10)
    with two_hosts.a.inside(), NetworkLock(container) as lock:
        lock.prepare()
        lock.hold()
        new.setblocking(False)
        assert new.connect_ex((address, PORT)) == 115  # EINPROGRESS
        old.sendall(b"hello\n")
        assert old.recv(100) == b"a\n"
        assert new.connect_ex((address, PORT)) == 114  # EALREADY: not even refused
        assert lock.handshakes() == 0
    new.settimeout(10)
    new.sendall(b"hello\n")
    assert new.recv(100) == b"a\n"
    # What was held was delivered: the client had no need to say it again.
    assert new.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[2] == 0
    old.close()
    new.close()


def test_a_connection_that_was_closed_before_the_move_ends_as_if_nothing_were(
    two_hosts: TwoHosts, address: str
) -> None:
    source = start(two_hosts.a, "a")
    ending, other = connect(two_hosts, address), connect(two_hosts, address)
    # The client reads nothing yet, so that most of it is still with the server when the port shuts.
    ending.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    copy = start(two_hosts.b, "b", shut=True)
    with two_hosts.a.inside():
        lock = NetworkLock(source)
        lock.prepare()
    with two_hosts.b.inside():
        arrival = NetworkArrival(copy)
        arrival.prepare()
    ending.sendall(b"end\n")
    other.sendall(b"hello\n")
    assert other.recv(100) == b"a\n"
    time.sleep(0.3)
    lock.hold()
    lock.lock()
    found = lock.orphans()
    assert [(one.local, one.local_port, one.peer_port) for one in found] == [(address, PORT, ending.getsockname()[1])]
    arrival.divert(found)
    arrival.unlock()
    arrival.announce()
    with two_hosts.a.inside():
        lock.set_aside()
        stop("orphaned")  # all its tasks are gone; what it has sent is not

    over = threading.Event()

    def carry() -> None:
        while not over.is_set():
            for frame in lock.outgoing():
                (arrival.emit if arrival.is_outgoing(frame) else arrival.inject)([frame])
            lock.deliver(arrival.diverted())
            time.sleep(0.001)

    carrier = threading.Thread(target=carry)
    carrier.start()
    try:
        got = 0
        while data := ending.recv(1 << 16):
            got += len(data)
        assert got == SIZE
        ending.close()
        for _ in range(200):
            if lock.orphans_living() == 0:
                break
            time.sleep(0.05)
        assert lock.orphans_living() == 0
        # New connections go to the copy.
        new = connect(two_hosts, address)
        new.sendall(b"hello\n")
        assert new.recv(100) == b"b\n"
        new.close()
    finally:
        over.set()
        carrier.join()
        lock.release()
        arrival.close()
        other.close()
