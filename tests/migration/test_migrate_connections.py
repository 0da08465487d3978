"""Connections in states that are not just "established and quiet", moved with their container."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time

import pytest

from migrator.runtime.fault_points import EXIT_CODE
from migrator.testing.stage import AGENT_PORT, MIGRATOR, Stage

pytestmark = pytest.mark.root

HALF_CLOSED = """
import socket, time
l = socket.socket(); l.setsockopt(1, 2, 1); l.bind(('0.0.0.0', 7777)); l.listen(50)
a, _ = l.accept(); b, _ = l.accept()
data = b''
while part := a.recv(100): data += part
b.sendall(b'first'); b.shutdown(1)
rest = b''
while part := b.recv(100): rest += part
a.sendall(data + b' late'); a.close()
c, _ = l.accept(); c.sendall(rest); c.close()
time.sleep(60)
"""

STREAM = """
import socket
l = socket.socket(); l.bind(('0.0.0.0', 7778)); l.listen(50)
c, _ = l.accept()
n = 0
while True:
    c.sendall(b''.join(i.to_bytes(4, 'big') for i in range(n, n + 4096)))
    n += 4096
"""


COUNT = """
import socket, sys
l = socket.socket(); l.setsockopt(1, 2, 1); l.bind(('0.0.0.0', 7779)); l.listen(50)
c, _ = l.accept()
n, left = 0, b''
while part := c.recv(1 << 16):
    left += part
    for at in range(0, len(left) // 4 * 4, 4):
        assert left[at:at + 4] == n.to_bytes(4, 'big'), (n, left[at:at + 4])
        n += 1
    left = left[len(left) // 4 * 4:]
c.sendall(n.to_bytes(4, 'big'))
"""


def test_half_closed_connections_go_on_from_where_they_were(stage: Stage) -> None:
    stage.start_container("half", [sys.executable, "-c", HALF_CLOSED], address="10.77.0.60")
    a, b = connect(stage, "10.77.0.60", 7777), connect(stage, "10.77.0.60", 7777)
    a.sendall(b"hello")
    a.shutdown(socket.SHUT_WR)
    assert b.recv(100) == b"first"
    assert b.recv(100) == b""
    stage.migrate("half", stage.a, stage.b)
    b.sendall(b"to the half closed")
    b.close()
    assert a.recv(100) == b"hello late"
    assert connect(stage, "10.77.0.60", 7777).recv(100) == b"to the half closed"
    stage.b.run(["migrator", "stop", "half"])


def test_a_stream_at_full_speed_arrives_whole(stage: Stage) -> None:
    stage.start_container("stream", [sys.executable, "-c", STREAM], address="10.77.0.61")
    sock = connect(stage, "10.77.0.61", 7778)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)
    wrong: list[int] = []
    done = threading.Event()

    def read() -> None:
        expected, left = 0, b""
        while not done.is_set():
            data = left + sock.recv(1 << 16)
            whole = len(data) // 4 * 4
            if data[:whole] != b"".join(i.to_bytes(4, "big") for i in range(expected, expected + whole // 4)):
                wrong.append(expected)
                return
            expected, left = expected + whole // 4, data[whole:]

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.3)
    stage.migrate("stream", stage.a, stage.b)
    time.sleep(0.3)
    done.set()
    reader.join()
    stage.b.run(["migrator", "stop", "stream"])
    assert not wrong


def test_not_a_byte_is_lost_with_an_agent_that_dies_before_the_copy_runs(stage: Stage) -> None:
    stage.start_container("full", [sys.executable, "-c", STREAM], address="10.77.0.62")
    sock = connect(stage, "10.77.0.62", 7778)
    time.sleep(0.3)  # both buffers are full: much of it was never sent
    stage.stop_agent(stage.b)
    stage.start_agent(stage.b, env={"MIGRATOR_FAULT": "destination.decided:exit"})
    argv = [*MIGRATOR, "migrate", "full", f"root@{stage.b.address}:{AGENT_PORT}"]
    with stage.a.popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as command:
        assert stage.await_death(stage.b) == EXIT_CODE
        stage.start_agent(stage.b)
        text, _ = command.communicate(timeout=60)
    assert command.returncode == 0, text
    for expected in range(0, 2 << 20, 4096):
        data = receive(sock, 4 * 4096)
        assert data == b"".join(i.to_bytes(4, "big") for i in range(expected, expected + 4096)), expected
    stage.b.run(["migrator", "stop", "full"])


def test_nothing_is_acknowledged_that_an_image_does_not_have(stage: Stage) -> None:
    image = stage.folder / "count.image"
    stage.start_container("count", [sys.executable, "-c", COUNT], address="10.77.0.63")
    sock = connect(stage, "10.77.0.63", 7779)
    saved = threading.Event()
    sent = 0

    def send() -> None:
        nonlocal sent
        while not saved.is_set():
            sock.sendall(b"".join(i.to_bytes(4, "big") for i in range(sent, sent + 256)))
            sent += 256

    sender = threading.Thread(target=send)
    sender.start()
    stage.a.run([*MIGRATOR, "checkpoint", "count", "--kill", "-o", str(image)])
    stage.a.run([*MIGRATOR, "restart", "-d", "-i", str(image)])
    saved.set()
    sender.join()
    sock.shutdown(socket.SHUT_WR)
    assert receive(sock, 4) == sent.to_bytes(4, "big")


def receive(sock: socket.socket, count: int) -> bytes:
    out = b""
    while len(out) < count and (part := sock.recv(count - len(out))):
        out += part
    return out


def connect(stage: Stage, address: str, port: int) -> socket.socket:
    """From the client's host; the server may still be starting."""
    end = time.monotonic() + 10
    while True:
        try:
            with stage.client.inside():
                return socket.create_connection((address, port), timeout=10)
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.05)
