"""Hostile SSH clients: what reaches the agent's port before anybody has logged in, and what is sent in a login.

Plain bytes are an honest opening (version, KEXINIT, key exchange), cut, spoilt, repeated, or going on with packets that
have no place there. Below the encryption a real client sends its packets with bytes changed. Some clients have a key
that may log in. After each batch all places must be free and no task be left; nothing may be logged as an error; memory
must not grow; and in the end a peer logs in as ever.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import random
import socket
import struct
import tempfile
import time
import traceback
import tracemalloc
from pathlib import Path
from typing import Any

import asyncssh

from migrator.errors import MigratorError
from tests.fuzz.counts import Counts
from tests.fuzz.mutation import WIDE
from transport.daemon import ConnectionSlots, serve
from transport.keys import ensure_key, pin, public_line
from transport.link import Link
from transport.slots import Slots
from transport.ssh import connect

AT_A_TIME = 32
FREE_WITHIN = 30.0  # seconds after the last client has gone
MOST_LEFT = 2 << 20  # bytes that are kept once all are gone
MOST_HELD = 64 << 20  # bytes at any time, with AT_A_TIME clients that send up to 1 MiB each
FLOOD = 1 << 20
_WARM = 4  # batches: what is made once is made
_VERSION = b"SSH-2.0-fuzz\r\n"
_LISTS = (
    b"curve25519-sha256", b"ssh-ed25519", b"aes128-gcm@openssh.com", b"aes128-gcm@openssh.com", b"hmac-sha2-256",
    b"hmac-sha2-256", b"none", b"none", b"", b"",
)  # fmt: skip


def fuzz(seconds: float, seed: int) -> Counts:
    """Be hostile clients of one daemon for a while."""
    return asyncio.run(_fuzz(seconds, seed))


class _Errors(logging.Handler):
    """Whatever is logged as an error, or with a traceback."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            self.texts.append(self.format(record))


async def _fuzz(seconds: float, seed: int) -> Counts:
    counts, errors, slots = Counts(), _Errors(), ConnectionSlots(share=64)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: errors.texts.append(f"loop: {context}"))
    logging.getLogger().addHandler(errors)
    tracemalloc.start()
    try:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
            folder = Path(name)
            known, keys = folder / "known", folder / "authorized_keys"
            keys.write_text(public_line(ensure_key(folder / "good")) + "\n")
            ensure_key(folder / "bad")

            async def idle(link: Link, peer: str, rights: frozenset[str]) -> None:
                with contextlib.suppress(MigratorError):
                    await link.receive()

            async with await serve(
                "127.0.0.1", 0, host_keys=[folder / "host"], authorized_keys=keys, handler=idle, slots=slots
            ) as server:
                pin(known, "127.0.0.1", server.port, ensure_key(folder / "host"))
                await _batches(seconds, seed, server.port, folder, slots, counts, errors)
                link = await connect(
                    f"fuzz@127.0.0.1:{server.port}", identity=folder / "good", known_hosts=known, config=False
                )
                await link.close()
    finally:
        tracemalloc.stop()
        logging.getLogger().removeHandler(errors)
    return counts


async def _batches(
    seconds: float, seed: int, port: int, folder: Path, slots: Slots[Any], counts: Counts, errors: _Errors
) -> None:
    base, own, end, batch = 0, asyncio.all_tasks(), time.monotonic() + seconds, 0
    while time.monotonic() < end or batch < _WARM + 1:
        seeds = range(seed, seed + AT_A_TIME)
        tracemalloc.reset_peak()
        ends = await asyncio.gather(*(_client(one, port, folder) for one in seeds))
        for how in ends:
            counts.note(how)
        if left := await _leftovers(slots, own):
            counts.found.append(f"ssh {seeds}: {left}")
        counts.found += [f"ssh {seeds}: {text}" for text in errors.texts]
        errors.texts.clear()
        held = tracemalloc.get_traced_memory()[1]
        if held > MOST_HELD:
            counts.found.append(f"ssh {seeds}: {held >> 20} MiB at a time")
        seed, batch = seed + AT_A_TIME, batch + 1
        if batch == _WARM:
            gc.collect()
            base = tracemalloc.get_traced_memory()[0]
    gc.collect()
    if (more := tracemalloc.get_traced_memory()[0] - base) > MOST_LEFT:
        counts.found.append(f"ssh: {more >> 10} KiB are left of {counts.inputs} clients")


async def _leftovers(slots: Slots[Any], own: set[asyncio.Task[Any]]) -> str:
    """What is still there of clients that have gone; "" if nothing is."""
    end = time.monotonic() + FREE_WITHIN
    while True:
        tasks = [task for task in asyncio.all_tasks() - own if not task.done()]
        if not (slots.before_login or slots.after_login or tasks):
            return ""
        if time.monotonic() > end:
            return f"{slots.before_login} places before and {slots.after_login} after the login, tasks {tasks}"
        await asyncio.sleep(0.01)


async def _client(seed: int, port: int, folder: Path) -> str:
    """One client from its connection to its end; how that went."""
    rng = random.Random(seed)
    if rng.random() < 0.3:
        return await _encrypted(rng, port, folder)
    sock = socket.socket()
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    said = b""
    try:
        await loop.sock_connect(sock, ("127.0.0.1", port))
        for piece in _opening(rng):
            await asyncio.wait_for(loop.sock_sendall(sock, piece), 2.0)
            with contextlib.suppress(TimeoutError):
                said += await asyncio.wait_for(loop.sock_recv(sock, 65536), rng.choice((0.0, 0.02)))
        if rng.random() < 0.3:
            sock.shutdown(socket.SHUT_WR)
            with contextlib.suppress(TimeoutError):
                said += await asyncio.wait_for(loop.sock_recv(sock, 65536), 0.05)
        if rng.random() < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset and no end
    except (OSError, TimeoutError):
        return "ended by the agent"
    finally:
        sock.close()
    return "answered" if len(said) > 64 else "greeted" if said else "silence"


def _opening(rng: random.Random) -> list[bytes]:
    """What is sent, in pieces."""
    way = rng.random()
    if way < 0.1:
        return [rng.randbytes(rng.choice((1, 16, 300, 70_000)))]
    if way < 0.2:
        line = rng.choice((b"SSH-1.5-x\r\n", b"SSH-2.0-" + b"x" * 70_000, b"\0\r\n" * 5000, b"GET / HTTP/1.1\r\n\r\n"))
        return [line, _kexinit(rng)]
    if way < 0.3:
        packet = rng.choice((_packet(b"\x02" + _string(bytes(100))), _packet(b"\x04" + bytes(9)), _kexinit(rng)))
        return [_VERSION, *[packet * 200] * (FLOOD // (200 * len(packet)))]
    exchange = _packet(b"\x1e" + _string(rng.randbytes(rng.choice((0, 31, 32, 32, 32, 33, 5000)))))
    login = _packet(b"\x32" + _string(b"root") + _string(b"ssh-connection") + _string(b"none"))
    packets = [_kexinit(rng), exchange, _packet(b"\x15")]
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at = rng.randrange(len(packets))
        spoil = rng.randrange(6)
        if spoil == 0:
            packets[at] = packets[at][: rng.randrange(len(packets[at]))]
        elif spoil == 1:
            changed = bytearray(packets[at])
            for _ in range(rng.randint(1, 4)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            packets[at] = bytes(changed)
        elif spoil == 2:
            packets[at] = struct.pack(">I", rng.choice(WIDE) & 0xFFFFFFFF) + packets[at][4:]
        elif spoil == 3:
            packets.insert(at, rng.choice((login, _packet(rng.randbytes(rng.choice((1, 20, 30_000)))))))
        elif spoil == 4:
            packets.insert(at, packets[rng.randrange(len(packets))])
        else:
            packets[at] = rng.randbytes(len(packets[at]))
    return [_VERSION, *packets]


def _kexinit(rng: random.Random) -> bytes:
    lists = list(_LISTS)
    if rng.random() < 0.5:
        lists[rng.randrange(len(lists))] = rng.choice((b"", b"," * 1000, b"\xff" * 9, b"a" * 30_000, b"none"))
    payload = b"\x14" + rng.randbytes(16) + b"".join(_string(one) for one in lists) + bytes([rng.random() < 0.2])
    return _packet(payload + bytes(4))


def _string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


def _packet(payload: bytes) -> bytes:
    padding = 8 - (len(payload) + 5) % 8 + 8
    return struct.pack(">IB", len(payload) + padding + 1, padding) + payload + bytes(padding)


class _Spoiling(asyncssh.SSHClient):
    """A client whose packets after the key exchange have bytes changed, or come twice."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def connection_made(self, conn: Any) -> None:
        rng, send = self._rng, conn.send_packet
        rate = rng.choice((0.0, 0.2, 0.5))

        def send_packet(kind: int, *parts: bytes, **options: Any) -> None:
            if kind < 50 or rng.random() >= rate:
                send(kind, *parts, **options)
                return
            data = bytearray(b"".join(parts))
            for _ in range(rng.randint(0, 3)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            cut = rng.choice((len(data), len(data), rng.randrange(len(data) + 1)))
            for _ in range(rng.choice((1, 1, 2, 50))):
                send(rng.choice((kind, kind, kind, rng.randrange(50, 110))), bytes(data[:cut]))

        conn.send_packet = send_packet


async def _encrypted(rng: random.Random, port: int, folder: Path) -> str:
    users = ("root", "a" * 1000, "..", "\u00e9")
    try:
        async with asyncio.timeout(3):
            connection, _ = await asyncssh.create_connection(
                lambda: _Spoiling(rng), "127.0.0.1", port, known_hosts=None, config=None, agent_path=None,
                username=rng.choice(users), client_keys=[str(folder / rng.choice(("good", "bad")))],
            )  # fmt: skip
            try:
                for command in rng.choices(("migrator agent --stdio", "sh", None), k=rng.randint(1, 3)):
                    await connection.create_process(command, encoding=None)
            finally:
                connection.abort()
    except (OSError, asyncssh.Error, TimeoutError) as error:
        return type(error).__name__
    except Exception:
        return f"the client itself: {traceback.format_exc().splitlines()[-1]}"  # its state is spoilt too
    return "logged in"
