"""However a pump ends, whoever is on the other end of its descriptor learns of it."""

from __future__ import annotations

import asyncio
import os

import pytest

from migrator.errors import TransportError
from migrator.runtime.pump import Pump


async def forever(fd: int) -> int:
    try:
        await asyncio.sleep(3600)
    finally:
        os.close(fd)
    return 0


async def failing(fd: int) -> int:
    os.close(fd)
    raise TransportError("cable cut")


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_pump_that_is_stopped_at_any_time_closes_its_descriptor(turns: int) -> None:
    read_fd, write_fd = os.pipe()
    pump = Pump(forever, write_fd)
    for _ in range(turns):
        await asyncio.sleep(0)
    await pump.stop()
    await pump.stop()
    assert os.read(read_fd, 1) == b""  # would block if somebody still held the other end
    os.close(read_fd)


async def test_a_pump_that_fails_says_why() -> None:
    read_fd, write_fd = os.pipe()
    pump = Pump(failing, write_fd)
    assert pump.error is None
    await asyncio.wait([pump.task])
    assert pump.done and str(pump.error) == "cable cut"
    await pump.stop()
    os.close(read_fd)
