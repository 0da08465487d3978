"""Telling the service manager how we are (sd_notify(3), sd_watchdog_enabled(3)). Elsewhere it does nothing.

    async with watchdog():
        notify("READY=1")
        ...

The watchdog is fed from the event loop: a loop that stands still is what it is there to notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator

_SHARE = 3  # of the time that the service manager gives us


def notify(text: str) -> None:
    """Send one message, such as "READY=1" or "STATUS=…". A manager that does not listen is no error."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as peer:
        peer.connect("\0" + path[1:] if path[0] == "@" else path)
        peer.send(text.encode())


def watchdog_interval() -> float:
    """Seconds between two signs of life that the service manager wants of this process; 0 for none."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    try:
        return max(int(os.environ.get("WATCHDOG_USEC", "0")), 0) / 1e6 / _SHARE
    except ValueError:
        return 0.0


@contextlib.asynccontextmanager
async def watchdog() -> AsyncIterator[None]:
    """Give signs of life for the block, if they are wanted."""
    interval = watchdog_interval()
    if not interval:
        yield
        return
    feeding = asyncio.create_task(_feed(interval))
    try:
        yield
    finally:
        feeding.cancel()


async def _feed(interval: float) -> None:
    while True:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval)
