"""Attacks on a daemon's places: crowds that never log in, while a peer wants to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from transport.daemon import ConnectionSlots, Daemon, serve
from transport.keys import ensure_key, pin, public_line
from transport.link import Link
from transport.slots import Slots
from transport.ssh import connect

CROWD = 300
SPEECHES = {"silent": b"", "babbling": b"\0" * 300, "half a version": b"SSH-2.0-x", "stuck": b"SSH-2.0-stuck\r\n"}


class Crowd:
    """Connections of many addresses of this host that are opened and kept, and opened again where they were cut."""

    def __init__(self, port: int, address: Callable[[int], str], speech: bytes) -> None:
        self._port = port
        self._address = address
        self._speech = speech
        self._sockets: dict[int, socket.socket] = {}
        self.opened = 0

    async def fill(self, count: int) -> None:
        for number in range(count):
            await self._open(number)

    async def go_on(self) -> None:
        """Come back at once, for ever."""
        number = 0
        while True:
            number += 1
            self._close(number % CROWD)
            await self._open(number % CROWD)
            await asyncio.sleep(0)

    async def _open(self, number: int) -> None:
        sock = socket.socket()
        self._sockets[number] = sock
        sock.setblocking(False)
        sock.bind((self._address(number), 0))
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
            sock.send(self._speech)
            self.opened += 1

    def _close(self, number: int) -> None:
        if sock := self._sockets.pop(number, None):
            sock.close()

    def close(self) -> None:
        for number in list(self._sockets):
            self._close(number)


def one_address(number: int) -> str:
    return "127.0.0.1"  # also that of the peer


def some_addresses(number: int) -> str:
    return f"127.0.1.{1 + number % 7}"


def many_addresses(number: int) -> str:
    return f"127.0.2.{1 + number % 250}"


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[tuple[Daemon, ConnectionSlots]]:
    async def echo(link: Link, peer: str, rights: frozenset[str]) -> None:
        while True:
            await link.send(await link.receive())

    (tmp_path / "authorized_keys").write_text(public_line(ensure_key(tmp_path / "id")) + "\n")
    slots: ConnectionSlots = Slots()
    async with await serve(
        "127.0.0.1",
        0,
        host_keys=[tmp_path / "host_key"],
        authorized_keys=tmp_path / "authorized_keys",
        handler=echo,
        slots=slots,
    ) as it:
        pin(tmp_path / "known_hosts", "127.0.0.1", it.port, ensure_key(tmp_path / "host_key"))
        yield it, slots


async def _link(tmp_path: Path, daemon: Daemon, **options: Any) -> Link:
    return await connect(
        f"127.0.0.1:{daemon.port}",
        identity=tmp_path / "id",
        known_hosts=tmp_path / "known_hosts",
        config=False,
        timeout=60,
        **options,
    )


async def _echoes(link: Link, text: bytes) -> bool:
    await link.send(text)
    return await link.receive(60) == text


@pytest.mark.parametrize("speech", SPEECHES)
@pytest.mark.parametrize("address", [one_address, some_addresses, many_addresses])
async def test_a_peer_gets_in_past_a_crowd_that_only_waits(
    tmp_path: Path, daemon: tuple[Daemon, ConnectionSlots], address: Callable[[int], str], speech: str
) -> None:
    it, slots = daemon
    crowd = Crowd(it.port, address, SPEECHES[speech])
    async with await _link(tmp_path, it) as before:
        try:
            await crowd.fill(CROWD)
            assert crowd.opened == CROWD
            async with await _link(tmp_path, it) as link:
                assert await _echoes(link, b"in")
                assert await _echoes(before, b"still there")
            assert slots.before_login <= slots.logins
        finally:
            crowd.close()


@pytest.mark.parametrize("address", [some_addresses, many_addresses])
async def test_a_peer_gets_in_while_a_silent_crowd_comes_and_comes(
    tmp_path: Path, daemon: tuple[Daemon, ConnectionSlots], address: Callable[[int], str]
) -> None:
    it, slots = daemon
    crowd = Crowd(it.port, address, b"")
    await crowd.fill(CROWD)
    storm = asyncio.create_task(crowd.go_on())
    try:
        for _ in range(3):
            async with await _link(tmp_path, it) as link:
                assert await _echoes(link, b"in")
        assert slots.before_login <= slots.logins
        assert not storm.done()
    finally:
        storm.cancel()
        await asyncio.gather(storm, return_exceptions=True)
        crowd.close()


async def test_who_does_not_log_in_is_ended(
    tmp_path: Path, daemon: tuple[Daemon, ConnectionSlots], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transport.daemon.LOGIN_SECONDS", 0.2)
    async with await serve(
        "127.0.0.1",
        0,
        host_keys=[tmp_path / "host_key"],
        authorized_keys=tmp_path / "authorized_keys",
        handler=daemon[0]._sessions.handler,
    ) as it:
        reader, writer = await asyncio.open_connection("127.0.0.1", it.port)
        async with asyncio.timeout(60):
            while await reader.read(1000):
                pass
        writer.close()
