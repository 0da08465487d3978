"""Links over socket pairs and pipes: messages, stream and packets side by side, and bad peers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import AsyncIterator

import pytest

from migrator.errors import ReaderGone, TransportError
from transport.frame import (
    BLOCK_HEADER,
    MIN_WINDOW,
    Channel,
    encode_block,
    encode_end,
    encode_frame,
    encode_preface,
    encode_u64,
)
from transport.inbox import INBOX
from transport.link import Link
from transport.stream_sender import BLOCK_SECONDS, LARGEST, SMALLEST
from transport.wire import link_pair, link_pipes, link_socket

Pair = tuple[Link, Link]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    links = await link_pair()
    yield links
    for link in links:
        await link.close()


class Reader(threading.Thread):
    """Reads a pipe to its end, as an engine does."""

    def __init__(self) -> None:
        super().__init__()
        self._fd, self.write_end = os.pipe()
        self.data = bytearray()
        self.start()

    def run(self) -> None:
        while piece := os.read(self._fd, 1 << 20):
            self.data += piece
        os.close(self._fd)

    async def all(self) -> bytes:
        await asyncio.to_thread(self.join)
        return bytes(self.data)


class Writer(threading.Thread):
    """Writes pieces to a pipe and closes it."""

    def __init__(self, *pieces: bytes) -> None:
        super().__init__()
        self.read_end, self._fd = os.pipe()
        self._pieces = pieces
        self.broken = False
        self.start()

    def run(self) -> None:
        try:
            for piece in self._pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(self._fd, view) :]
        except BrokenPipeError:
            self.broken = True
        finally:
            os.close(self._fd)


def image(size: int) -> bytes:
    """Something between text and noise."""
    return os.urandom(size // 2) + b"text " * (size // 10)


async def test_messages_arrive_whole_and_in_order_both_ways(pair: Pair) -> None:
    here, there = pair
    messages = [b"", b"a", bytes(1 << 20), os.urandom(70_000)]
    for message in messages:
        await here.send(message)
        await there.send(message)
    assert [await there.receive() for _ in messages] == messages
    assert [await here.receive() for _ in messages] == messages


async def test_packets_arrive_in_order(pair: Pair) -> None:
    here, there = pair
    packets = [os.urandom(size) for size in (60, 1500, 65_000)]
    await here.send_packets(packets)
    assert await there.receive_packets() == packets


@pytest.mark.parametrize("level", [None, 0, 1])
async def test_a_stream_comes_out_as_it_went_in(level: int | None) -> None:
    here, there = await link_pair(level=level)
    sent = image(20 << 20)
    writer, reader = Writer(sent), Reader()
    counts = await asyncio.gather(here.pump_in(writer.read_end), there.pump_out(reader.write_end))
    assert await reader.all() == sent
    assert set(counts) == {len(sent)}
    await here.close()
    await there.close()


async def test_streams_follow_one_another_on_one_link(pair: Pair) -> None:
    here, there = pair
    for sent in (b"one", b"", image(300_000)):
        reader = Reader()
        await asyncio.gather(here.pump_in(Writer(sent).read_end), there.pump_out(reader.write_end))
        assert await reader.all() == sent


async def test_streams_may_flow_both_ways_at_once(pair: Pair) -> None:
    here, there = pair
    left, right = image(3 << 20), image(2 << 20)
    at_left, at_right = Reader(), Reader()
    await asyncio.gather(
        here.pump_in(Writer(left).read_end),
        there.pump_in(Writer(right).read_end),
        here.pump_out(at_left.write_end),
        there.pump_out(at_right.write_end),
    )
    assert await at_left.all() == right
    assert await at_right.all() == left


async def test_what_is_written_goes_out_without_waiting_for_more(pair: Pair) -> None:
    here, there = pair
    source, engine = os.pipe()
    result, sink = os.pipe()
    sending = asyncio.create_task(here.pump_in(source))
    receiving = asyncio.create_task(there.pump_out(sink))
    for flush in (b"x", b"y" * 5000):
        os.write(engine, flush)
        assert await asyncio.to_thread(os.read, result, 1 << 20) == flush
    os.close(engine)
    await asyncio.gather(sending, receiving)
    os.close(result)


async def test_a_stream_may_go_from_file_to_file(pair: Pair, tmp_path: os.PathLike[str]) -> None:
    here, there = pair
    source, result = os.path.join(tmp_path, "source"), os.path.join(tmp_path, "result")
    sent = image(3 << 20)
    with open(source, "wb") as file:
        file.write(sent)
    await asyncio.gather(
        here.pump_in(os.open(source, os.O_RDONLY)),
        there.pump_out(os.open(result, os.O_WRONLY | os.O_CREAT)),
    )
    with open(result, "rb") as file:
        assert file.read() == sent


async def test_messages_pass_a_stream_that_nobody_reads(pair: Pair) -> None:
    here, there = pair
    writer = Writer(os.urandom(40 << 20))
    sending = asyncio.create_task(here.pump_in(writer.read_end))
    for n in range(20):
        await here.send(b"%d" % n)
        assert await there.receive(10) == b"%d" % n
        await there.send(b"%d" % n)
        assert await here.receive(10) == b"%d" % n
    assert there.counters.wire_received < 12 << 20
    assert not sending.done()
    sending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sending
    await asyncio.to_thread(writer.join)
    assert writer.broken  # the descriptor was closed: the engine is not left waiting


async def test_a_reader_that_goes_away_is_an_error_on_its_own_side(pair: Pair) -> None:
    here, there = pair
    read_end, write_end = os.pipe()
    os.close(read_end)
    sending = asyncio.create_task(here.pump_in(Writer(b"data").read_end))
    with pytest.raises(ReaderGone, match="stopped reading"):
        await there.pump_out(write_end)
    await sending


async def test_a_broken_link_ends_every_wait_and_closes_the_descriptors(pair: Pair) -> None:
    here, there = pair
    source, engine = os.pipe()
    reader = Reader()
    waits = [
        asyncio.create_task(here.pump_in(source)),
        asyncio.create_task(here.receive()),
        asyncio.create_task(here.receive_packets()),
        asyncio.create_task(here.pump_out(reader.write_end)),
    ]
    await asyncio.sleep(0)
    await there.close()
    results = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(result) for result in results] == [TransportError] * 4
    with pytest.raises(BrokenPipeError):
        os.write(engine, b"more")
    os.close(engine)
    assert await reader.all() == b""
    with pytest.raises(TransportError, match="closed the connection"):
        await here.send(b"too late")


async def test_what_arrived_before_the_end_can_still_be_received(pair: Pair) -> None:
    here, there = pair
    await here.send(b"last words")
    await here.close()
    await there.wait_closed()
    assert await there.receive() == b"last words"
    with pytest.raises(TransportError):
        await there.receive()


async def test_receive_gives_up_after_its_timeout_and_the_link_lives_on(pair: Pair) -> None:
    here, there = pair
    with pytest.raises(TransportError, match="nothing from"):
        await here.receive(timeout=0.01)
    await there.send(b"now")
    assert await here.receive(timeout=5) == b"now"


async def test_a_cancelled_receive_loses_nothing(pair: Pair) -> None:
    here, there = pair
    waiting = asyncio.create_task(here.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await there.send(b"kept")
    assert await here.receive(5) == b"kept"


async def test_the_round_trip_is_measured_from_the_start(pair: Pair) -> None:
    here, _ = pair
    assert await here.ping() > 0
    assert 0 < here.rtt < 5


async def test_a_cap_is_honoured_until_it_is_lifted(pair: Pair) -> None:
    here, there = pair
    here.set_cap(1000.0)  # at this rate the rest would take a quarter of an hour
    sent = os.urandom(1 << 20)
    writer, reader = Writer(sent), Reader()
    moving = asyncio.gather(here.pump_in(writer.read_end), there.pump_out(reader.write_end))
    await here.ping()
    assert not moving.done()
    assert here.counters.wire_sent < 1 << 19
    here.uncap()
    await moving
    assert await reader.all() == sent


async def test_acquiring_bandwidth_waits_for_the_cap_until_it_is_lifted(pair: Pair) -> None:
    here, _ = pair
    assert await here.acquire_bandwidth(1 << 20) < 1  # nothing is capped yet
    here.set_cap(1000.0)
    await here.acquire_bandwidth(1 << 20)  # more than there was: who comes next pays for it, for a quarter of an hour
    waiting = asyncio.create_task(here.acquire_bandwidth(1))
    await here.ping()
    assert not waiting.done()
    here.uncap()
    assert await waiting > 0
    waiting = asyncio.create_task(here.acquire_bandwidth(1))
    assert await waiting < 1


async def test_acquiring_bandwidth_raises_when_the_link_fails(pair: Pair) -> None:
    here, there = pair
    here.set_cap(1000.0)
    await here.acquire_bandwidth(1 << 20)
    waiting = asyncio.create_task(here.acquire_bandwidth(1))
    await here.ping()
    await there.close()
    with pytest.raises(TransportError):
        await waiting


async def test_the_inbox_stops_the_peer_instead_of_growing(pair: Pair) -> None:
    here, there = pair
    message = bytes(1 << 20)
    flood = asyncio.create_task(_send_many(here, message, 30))
    for _ in range(200):
        await asyncio.sleep(0)
    assert there.counters.messages_received <= INBOX // len(message) + 2
    for _ in range(30):
        assert len(await there.receive(10)) == len(message)
    await flood


async def test_packets_of_nothing_fill_the_inbox_too(pair: Pair) -> None:
    here, there = pair
    empty = [b""] * 100_000
    flood = asyncio.create_task(_send_packets(here, empty, 30))
    for _ in range(200):
        await asyncio.sleep(0)
    assert there.counters.packets_received <= 5 * len(empty)
    for _ in range(30):
        assert await there.receive_packets(10) == empty
    await flood


async def test_a_peer_that_pings_and_does_not_read_costs_no_memory() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(PREFACE)
    pings = encode_u64(Channel.PING, 1) * 100_000

    def flood() -> None:
        for _ in range(3):
            right.sendall(pings)

    await asyncio.to_thread(flood)
    assert link.counters.wire_sent < 4 << 20
    assert link.alive
    right.close()
    await link.close()


async def _send_packets(link: Link, packets: list[bytes], count: int) -> None:
    for _ in range(count):
        await link.send_packets(packets)


async def _send_many(link: Link, message: bytes, count: int) -> None:
    for _ in range(count):
        await link.send(message)


async def test_a_peer_that_never_speaks_is_given_up() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "mute", dead_after=0.2, keepalive=0.05)
    with pytest.raises(TransportError, match="did not introduce itself"):
        await link.established(timeout=0.05)
    await link.close()
    right.close()


async def test_a_peer_that_falls_silent_is_taken_for_dead() -> None:
    left, right = socket.socketpair()
    right.send(encode_preface(MIN_WINDOW))
    link = await link_socket(left, "frozen", dead_after=0.2, keepalive=0.05)
    await link.established()
    with pytest.raises(TransportError, match="no sign of life from frozen"):
        await link.receive()
    await link.close()
    right.close()


PREFACE = encode_preface(MIN_WINDOW)
HUGE = struct.pack("<BBHI", Channel.STREAM, 0, 0, 0xFFFFFFFF)
HOSTILE = {
    "a login banner": (b"Welcome to Debian GNU/Linux\n", "Welcome to Debian"),
    "another version": (struct.pack("<8sHHI", b"migrator", 99, 0, MIN_WINDOW), "version 99"),
    "a frame without end": (PREFACE + HUGE, "allowed are"),
    "a block out of order": (PREFACE + encode_block(5, 1, b"a", compressed=False), "where 0 was due"),
    "a block twice": (PREFACE + encode_block(0, 1, b"a", compressed=False) * 2, "where 1 was due"),
    "credit for nothing": (PREFACE + encode_u64(Channel.CREDIT, 1), "acknowledges 1"),
    "a pong from the future": (PREFACE + encode_u64(Channel.PING, 2**63, 1), "never sent"),
    "packets cut off": (PREFACE + encode_frame(Channel.PACKETS, b"\1\0\0\0"), "cut off"),
    "an early end": (PREFACE, "closed the connection"),
}


@pytest.mark.parametrize(("sent", "why"), HOSTILE.values(), ids=HOSTILE)
async def test_a_hostile_peer_ends_in_a_clean_error(sent: bytes, why: str) -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(sent)
    right.shutdown(socket.SHUT_WR)
    with pytest.raises(TransportError, match=why):
        await link.receive(5)
    await link.close()
    right.close()


async def test_a_peer_that_overruns_its_credit_is_cut_off() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "greedy")
    right.sendall(PREFACE)
    data = bytes(1 << 20)

    def overrun() -> None:
        try:
            for sequence in range(64):
                right.sendall(encode_block(sequence, len(data), data, compressed=False))
        except OSError:
            pass

    flood = asyncio.create_task(asyncio.to_thread(overrun))
    with pytest.raises(TransportError, match="sent more than"):
        await link.receive(10)
    await flood
    await link.close()
    right.close()


@pytest.mark.parametrize(
    "block",
    [
        encode_frame(Channel.STREAM, BLOCK_HEADER.pack(0, 1000) + b"no zstd frame", 1),
        encode_frame(Channel.STREAM, BLOCK_HEADER.pack(0, 1000) + b"short"),
    ],
)
async def test_a_bad_block_never_reaches_the_engine(block: bytes) -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(PREFACE + block + encode_end(1))
    reader = Reader()
    with pytest.raises(TransportError):
        await link.pump_out(reader.write_end)
    assert await reader.all() == b""
    await link.close()
    right.close()


async def test_a_stream_that_breaks_off_is_an_error_and_not_an_end() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(PREFACE + encode_block(0, 4, b"half", compressed=False))
    right.close()
    reader = Reader()
    with pytest.raises(TransportError):
        await link.pump_out(reader.write_end)
    await reader.all()
    await link.close()


async def test_a_link_runs_over_two_pipes() -> None:
    to_left, from_right = os.pipe()
    to_right, from_left = os.pipe()
    left = await link_pipes(to_left, from_left, "right")
    right = await link_pipes(to_right, from_right, "left")
    sent = image(2 << 20)
    reader = Reader()
    await asyncio.gather(left.pump_in(Writer(sent).read_end), right.pump_out(reader.write_end))
    assert await reader.all() == sent
    await left.close()
    with pytest.raises(TransportError):
        await right.receive(5)
    await right.close()


async def test_what_the_peer_said_last_is_heard_though_it_listens_no_more() -> None:
    left, right = socket.socketpair()
    link = await link_socket(left, "peer")
    right.sendall(PREFACE + encode_frame(Channel.CONTROL, b"why I go"))
    right.close()
    with contextlib.suppress(TransportError):
        await link.send(b"to nobody")
    assert await link.receive(5) == b"why I go"
    with pytest.raises(TransportError, match="closed the connection"):
        await link.receive(5)
    await link.close()


CHILD = """
import asyncio
from transport.wire import stdio_link
async def main():
    link = await stdio_link()
    print("this must not get between the frames")
    await link.send(b"echo " + await link.receive())
    await link.close()
asyncio.run(main())
"""


@pytest.mark.parametrize("kind", ["pipes", "socketpair"])
async def test_stdio_speaks_frames_only_whatever_is_printed(kind: str) -> None:
    if kind == "pipes":
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdin and child.stdout
        link = await link_pipes(os.dup(child.stdout.fileno()), os.dup(child.stdin.fileno()), "child")
        child.stdin.close()
        child.stdout.close()
    else:
        ours, theirs = socket.socketpair()
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            stdin=theirs.fileno(),
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
        )
        theirs.close()
        link = await link_socket(ours, "child")
    await link.send(b"hello")
    assert await link.receive(20) == b"echo hello"
    await link.close()
    assert child.stderr
    assert b"must not get between" in await asyncio.to_thread(child.stderr.read)
    child.stderr.close()
    assert await asyncio.to_thread(child.wait) == 0


async def test_stdio_on_something_else_than_pipes_is_explained() -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, errors = await child.communicate()
    assert b"are no pipes" in errors
    assert child.returncode == 1


async def test_a_stream_is_cut_into_large_blocks_once_the_link_is_known_to_be_fast() -> None:
    here, there = await link_pair(level=0)
    sent = os.urandom(16 << 20)
    reader = Reader()
    await asyncio.gather(here.pump_in(Writer(sent).read_end), there.pump_out(reader.write_end))
    assert await reader.all() == sent
    sender = here._sender
    assert sender.block_size == max(SMALLEST, min(LARGEST, int(sender.window.estimate * BLOCK_SECONDS)))
    sender.set_cap(1e6)
    assert sender.block_size == SMALLEST
    await here.close()
    await there.close()


async def test_both_counters_are_of_the_stream_and_of_the_wire() -> None:
    here, there = await link_pair(level=3)
    sent = b"text " * (1 << 20)
    reader = Reader()
    await asyncio.gather(here.pump_in(Writer(sent).read_end), there.pump_out(reader.write_end))
    await reader.all()
    assert here.counters.stream_sent == there.counters.stream_received == len(sent)
    assert here.counters.stream_received == there.counters.stream_sent == 0
    assert len(sent) / here.compression_ratio <= here.counters.wire_sent < len(sent) / 10
    assert here.stream_throughput == here.wire_throughput * here.compression_ratio
    await here.send(b"last")
    assert await there.receive(20) == b"last"
    assert 0 <= here.counters.wire_sent - there.counters.wire_received < 100
    await here.close()
    await there.close()
