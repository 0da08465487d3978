"""Connections whose packets come while they are saved: what is saved was so at one moment."""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from collections.abc import Iterator, Sequence

import pytest

from migrator.engine.user.descriptors import tcp
from migrator.errors import CheckpointFailed
from migrator.image.records_files import SocketTcp
from migrator.linux import repair
from migrator.linux.sockets import Peeked

pytestmark = pytest.mark.root

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
DATA = b"on its way" * 150
Pair = tuple[socket.socket, socket.socket]


def deaf(sock: socket.socket) -> None:
    """Every packet for it is dropped, by the filter `ret 0`, and its peer sends it again and again."""
    program = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0))
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HxxxxxxP", 1, ctypes.addressof(program)))


def hears(sock: socket.socket, peer: socket.socket) -> None:
    """From here on it hears, and has acknowledged what the peer had sent."""
    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    until = time.monotonic() + 20
    while tcp.in_flight(peer)[0]:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(receiver, sender) under repair, DATA between them."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        with receiver:
            deaf(receiver)
            sender.sendall(DATA)
            for sock in (receiver, sender):
                repair.repair(sock)
            yield receiver, sender


def items(*socks: socket.socket) -> list[tuple[int, int, str]]:
    return [(sock.fileno(), number, f"fd {number}") for number, sock in enumerate(socks)]


def test_bytes_in_flight_are_the_senders(pair: Pair) -> None:
    receiver, sender = tcp.save_all(items(*pair))
    assert (receiver.received, sender.sent) == (b"", DATA)
    assert (sender.snd_seq - receiver.rcv_seq) & 0xFFFFFFFF == len(DATA)


@pytest.mark.parametrize("first", ["receiver", "sender"])
@pytest.mark.parametrize("saved", [False, True])
def test_bytes_that_arrive_meanwhile_are_saved_once(
    monkeypatch: pytest.MonkeyPatch, pair: Pair, first: str, saved: bool
) -> None:
    """saved: they arrive after the first of the two was saved, else after its amounts were read."""
    real, calls = tcp.save, []

    def save(connections: Sequence[tuple[int, int, tcp.Amounts]]) -> list[SocketTcp]:
        out = []
        for connection in connections:  # packets come between two of them, as they can
            calls.append(connection[1])
            if len(calls) == 1 and not saved:
                hears(*pair)
            out += real([connection])
            if len(calls) == 1 and saved:
                hears(*pair)
        return out

    monkeypatch.setattr(tcp, "save", save)
    order = pair if first == "receiver" else pair[::-1]
    records = tcp.save_all(items(*order))
    receiver, sender = records if first == "receiver" else records[::-1]
    assert (receiver.received, sender.sent) == (DATA, b"")
    assert receiver.rcv_seq == sender.snd_seq
    assert calls == [0, 1, 0, 1]


def test_packets_without_end_are_refused(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    count = iter(range(10**6))

    class Reading(tcp._Reading):
        def differs(self) -> bool:
            super().differs()
            return True

        def amounts(self) -> list[tcp.Amounts]:
            return [found._replace(rcv_seq=next(count)) for found in super().amounts()]

    monkeypatch.setattr(tcp, "_Reading", Reading)
    with pytest.raises(CheckpointFailed, match="fd 0, fd 1: packets keep coming in"):
        tcp.save_all(items(*pair))


def test_bytes_that_cannot_be_read_are_refused(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    monkeypatch.setattr(Peeked, "raw", lambda answers, index: b"")
    with pytest.raises(CheckpointFailed, match="1500 are not acknowledged, but 0 and 0 could be read"):
        tcp.save_all(items(*pair))


def test_a_queue_that_cannot_be_filled_is_said_of_its_own_connection(pair: Pair) -> None:
    gone = socket.socket()
    gone.close()
    with pytest.raises(tcp.Unmade, match="TCP_REPAIR_QUEUE") as failed:
        tcp._fill_all([*pair, gone], repair.RECV_QUEUE, [b"", b"", b"what it had received"])
    assert failed.value.at == 2
