"""What has arrived and was not received yet: control messages and captured packets.

If more than `INBOX` bytes wait, the connection is not read any more until half of them are
received. So the peer waits, and memory stays bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

from migrator.errors import TransportError
from transport.connection import Connection
from transport.frame import CHARGE

INBOX = 4 << 20  # bytes

T = TypeVar("T")


class Inbox:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._size = 0
        self._messages: _Queue[bytes] = _Queue(connection)
        self._packets: _Queue[list[bytes]] = _Queue(connection)

    def put_message(self, message: bytes) -> None:
        self._connection.counters.messages_received += 1
        self._messages.put(message)
        self._grow(len(message))

    def put_packets(self, packets: list[bytes]) -> None:
        self._connection.counters.packets_received += len(packets)
        self._packets.put(packets)
        self._grow(_weight(packets))

    async def message(self, timeout: float | None) -> bytes:
        message = await self._messages.take(timeout)
        self._shrink(len(message))
        return message

    async def packets(self, timeout: float | None) -> list[bytes]:
        packets = await self._packets.take(timeout)
        self._shrink(_weight(packets))
        return packets

    def _grow(self, size: int) -> None:
        self._size += size + CHARGE
        if self._size > INBOX:
            self._connection.pause_reading()

    def _shrink(self, size: int) -> None:
        self._size -= size + CHARGE
        if self._size < INBOX // 2:
            self._connection.resume_reading()


class _Queue(Generic[T]):
    """What arrived before the connection failed can still be taken after it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._items: deque[T] = deque()
        self._arrived = connection.event()

    def put(self, item: T) -> None:
        self._items.append(item)
        self._arrived.set()

    async def take(self, timeout: float | None) -> T:
        """Raises `TransportError` at the end of the connection, or after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not self._items:
                    self._connection.check()
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise TransportError(f"nothing from {self._connection.peer} for {timeout:g} s") from None
        return self._items.popleft()


def _weight(packets: list[bytes]) -> int:
    return sum(map(len, packets)) + CHARGE * len(packets)
