"""A container's port is shut and opened, or its address moves, and clients lose nothing."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.container import Container, ContainerSpec, Sandbox, describe, run, stop
from migrator.container.state import state_dir
from migrator.container.switchover import NetworkArrival, NetworkLock, reopen
from migrator.errors import ImageError
from migrator.linux.namespaces import entered
from migrator.testing.hosts import Host, TwoHosts

pytestmark = pytest.mark.root

ADDRESS = "10.77.0.50"
PORT = 7000

# Answers each datagram with what it got and its own label, and logs nothing.
ECHO = """
import socket, sys
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
s.bind(("::", 7000))
while True:
    data, peer = s.recvfrom(65536)
    s.sendto(sys.argv[1].encode() + b" " + data, peer)
"""

# A TCP sink that says at the end how much came, and with what sum.
SINK = """
import socket, zlib
s = socket.create_server(("0.0.0.0", 7000))
while True:
    c, _ = s.accept()
    size = crc = 0
    while data := c.recv(1 << 16):
        size += len(data)
        crc = zlib.crc32(data, crc)
    c.sendall(f"{size} {crc}".encode())
    c.close()
"""


def spec(code: str, *arguments: str) -> ContainerSpec:
    return ContainerSpec(
        name="nl-echo",
        argv=(sys.executable, "-c", code, *arguments),
        bridge="br0",
        addresses=(f"{ADDRESS}/24", "fd77::50/64"),
    )


def start(host: Host, code: str, *arguments: str) -> Container:
    with host.inside():
        return run(spec(code, *arguments))


@pytest.fixture
def client(two_hosts: TwoHosts) -> Iterator[socket.socket]:
    two_hosts.client.run(["ip", "addr", "add", "fd77::100/64", "dev", "uplink", "nodad"])
    with entered(two_hosts.client.netns_path):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    with sock:
        yield sock


def wait_for_echo(client: socket.socket) -> None:
    client.settimeout(0.05)
    for _ in range(200):
        client.sendto(b"hello", (ADDRESS, PORT))
        try:
            client.recv(100)
            break
        except (TimeoutError, ConnectionRefusedError):
            continue
    else:
        raise AssertionError("the container does not answer")
    drain(client, 0.3)


def drain(client: socket.socket, seconds: float = 0.2) -> list[bytes]:
    client.settimeout(seconds)
    out = []
    while True:
        try:
            out.append(client.recv(65536))
        except TimeoutError:
            return out


def send(client: socket.socket, numbers: range) -> None:
    for number in numbers:
        client.sendto(f"{number}".encode(), (ADDRESS, PORT))
        time.sleep(0.0005)


def about_to_move(two_hosts: TwoHosts, client: socket.socket) -> tuple[NetworkLock, Container]:
    """The lock of an echo on a that answers, and its copy on b."""
    source = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    arrived = prepare_elsewhere(two_hosts.b, ECHO, "b")
    with two_hosts.a.inside():
        lock = NetworkLock(source)
        lock.prepare()
    return lock, arrived


def test_an_aborted_lock_loses_and_repeats_no_datagram(two_hosts: TwoHosts, client: socket.socket) -> None:
    container = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    with two_hosts.a.inside():
        lock = NetworkLock(container)
        lock.prepare()
        send(client, range(0, 100))
        # all are answered before the lock: an answer that comes after it is cut off, as is the container
        assert drain(client) == [f"a {n}".encode() for n in range(100)]
        lock.lock()
        send(client, range(100, 200))
        assert drain(client) == []
        lock.captured()
        send(client, range(200, 250))
        lock.unlock()
        send(client, range(250, 300))
    answers = drain(client)
    assert answers == [f"a {n}".encode() for n in range(100, 300)]


def test_locking_under_fire_counts_every_frame_once(two_hosts: TwoHosts, client: socket.socket) -> None:
    container = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    # A sender that does not pause: frames pass at the very moment at which the port shuts and opens.
    code = f"""
import socket, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for n in range(20000):
    s.sendto(b"%d" % n, ("{ADDRESS}", 9000))
    if n % 20 == 0: time.sleep(0.0005)
"""
    counter = start_counter(two_hosts.a, container)
    sender = two_hosts.client.popen([sys.executable, "-c", code])
    with two_hosts.a.inside():
        for _ in range(5):
            time.sleep(0.05)
            lock = NetworkLock(container)
            lock.prepare()
            lock.lock()
            time.sleep(0.02)
            lock.unlock()
    assert sender.wait(30) == 0
    time.sleep(0.3)
    counter.terminate()
    numbers = [int(n) for n in counter.communicate(timeout=10)[0].split()]
    missing = set(range(20000)) - set(numbers)
    assert not missing, f"{len(missing)} datagrams were lost"
    assert len(numbers) == 20000, f"{len(numbers) - 20000} datagrams came twice"


def start_counter(host: Host, container: Container) -> subprocess.Popen[str]:
    code = """
import signal, socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
s.bind(("0.0.0.0", 9000))
got = []
def end(*_):
    sys.stdout.write(" ".join(got)); sys.stdout.flush(); sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
while True:
    got.append(s.recv(100).decode())
"""
    argv = ["nsenter", f"--net=/proc/{container.init_pid}/ns/net", sys.executable, "-c", code]
    child = host.popen(argv, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    return child


def test_tcp_segments_of_any_size_survive_a_lock_intact(two_hosts: TwoHosts) -> None:
    container = start(two_hosts.a, SINK)
    code = f"""
import socket, time, zlib
for _ in range(100):
    try:
        s = socket.create_connection(("{ADDRESS}", 7000)); break
    except OSError:
        time.sleep(0.05)
print("connected", flush=True)
crc = size = 0
end = time.monotonic() + 0.6
block = bytes(range(256)) * 1024
while time.monotonic() < end:
    s.sendall(block); crc = zlib.crc32(block, crc); size += len(block)
s.shutdown(socket.SHUT_WR)
said = s.makefile().read()
info = s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
assert said == f"{{size}} {{crc}}", (said, size, crc)
print(size)
"""
    sender = two_hosts.client.popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    sizes = []
    with two_hosts.a.inside():
        assert sender.stdout is not None and sender.stdout.readline() == "connected\n"
        for _ in range(6):
            with NetworkLock(container) as lock:
                lock.lock()
                time.sleep(0.01)
                sizes += [len(frame) for frame in lock.captured()]
    out, _ = sender.communicate(timeout=60)
    assert sender.returncode == 0
    assert int(out) > 1 << 20
    # Segments that no network card has cut are kept whole, with a header that says how to cut them.
    assert any(size > 3000 for size in sizes)


def test_an_announced_address_is_reached_at_its_new_place_at_once(two_hosts: TwoHosts, client: socket.socket) -> None:
    lock, arrived = about_to_move(two_hosts, client)
    with two_hosts.b.inside():
        arrival = NetworkArrival(arrived)
        arrival.prepare()
    lock.lock()
    send(client, range(0, 50))
    first = lock.captured()
    assert len(first) == 50
    send(client, range(50, 60))
    arrival.unlock()
    arrival.inject(first)
    arrival.inject(lock.captured())
    send(client, range(60, 70))  # some may still go to the source, as not every switch has learned
    arrival.announce()
    arrival.inject(lock.captured())
    send(client, range(70, 100))
    answers = drain(client)
    assert sorted(answers) == sorted(f"b {n}".encode() for n in range(100))
    assert lock.captured() == [] and lock.moved
    lock.release()
    arrival.close()
    with two_hosts.a.inside():
        stop("nl-echo")
    send(client, range(100, 110))
    assert drain(client) == [f"b {n}".encode() for n in range(100, 110)]


def test_ipv6_neighbours_follow_the_announcement_too(two_hosts: TwoHosts, client: socket.socket) -> None:
    source = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    with entered(two_hosts.client.netns_path):
        six = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with six:
        six.settimeout(5)
        six.sendto(b"1", ("fd77::50", PORT))
        assert six.recv(100) == b"a 1"
        arrived = prepare_elsewhere(two_hosts.b, ECHO, "b")
        with two_hosts.a.inside():
            lock = NetworkLock(source)
            lock.prepare()
        with two_hosts.b.inside(), NetworkArrival(arrived) as arrival:
            lock.lock()
            arrival.unlock()
            arrival.announce()
        six.sendto(b"2", ("fd77::50", PORT))
        assert six.recv(100) == b"b 2"
        lock.release()


def test_a_copy_knows_its_neighbours_without_asking(two_hosts: TwoHosts, client: socket.socket) -> None:
    source = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    with two_hosts.a.inside():
        now = describe(source)
    assert "10.77.0.100" in {n.address for n in now.neighbours}
    with pytest.MonkeyPatch.context() as patch, two_hosts.b.inside():
        patch.setattr(Sandbox, "open_port", lambda self: None)
        copy = run(now)
        assert "10.77.0.100" in {n.address for n in describe(copy).neighbours}


def test_a_port_left_shut_by_a_crash_can_be_opened_again(two_hosts: TwoHosts, client: socket.socket) -> None:
    container = start(two_hosts.a, ECHO, "a")
    wait_for_echo(client)
    with two_hosts.a.inside():
        lock = NetworkLock(container)
        lock.lock()
        lock.close()  # as when the agent dies
        send(client, range(3))
        assert drain(client) == []
        reopen(container)
    send(client, range(3))
    assert drain(client) == [b"a 0", b"a 1", b"a 2"]


def test_a_copy_is_heard_when_its_program_answers_and_not_before(two_hosts: TwoHosts, client: socket.socket) -> None:
    lock, arrived = about_to_move(two_hosts, client)
    with two_hosts.b.inside(), NetworkArrival(arrived) as arrival:
        lock.lock()
        send(client, range(1))
        asked = lock.captured()
        began = time.monotonic_ns()
        arrival.unlock()
        arrival.announce()
        assert (arrival.heard(began), arrival.asked) == (0, False)
        arrival.inject(asked)
        assert drain(client) == [b"b 0"]
        assert began < arrival.heard(began) < time.monotonic_ns()
        assert arrival.asked
        assert arrival.heard(began) == 0  # that was the first
        send(client, range(1, 2))
        assert drain(client) == [b"b 1"]
        assert arrival.heard(time.monotonic_ns()) == 0  # it was earlier
        lock.release()


def test_a_frame_for_somebody_else_is_not_injected(two_hosts: TwoHosts) -> None:
    arrived = prepare_elsewhere(two_hosts.b, ECHO, "b")
    with two_hosts.b.inside(), NetworkArrival(arrived) as arrival:
        for hostile in (b"", b"\0" * 24, b"\0" * 10 + b"\x02" * 60, b"\0" * (1 << 18)):
            with pytest.raises(ImageError):
                arrival.inject([hostile])


def prepare_elsewhere(host: Host, code: str, *arguments: str) -> Container:
    """A container that has been restored, as far as the network can tell: everything runs, port shut."""
    with pytest.MonkeyPatch.context() as patch, host.inside():
        patch.setattr(Sandbox, "open_port", lambda self: None)
        container = run(spec(code, *arguments))
        assert Path(state_dir(), "containers", "nl-echo.json").exists()
    time.sleep(0.3)  # until the echo server is bound
    return container
