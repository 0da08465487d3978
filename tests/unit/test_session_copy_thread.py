"""Of two errors that come of one failure, the first is the one that is told."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from migrator.errors import ImageError, MigratorError, ReaderGone, RestartFailed, TransportError
from migrator.recovery.hooks import Tools
from migrator.session.copy_thread import CopyThread
from migrator.testing.fakeengine import FakeWorld


class Cable:
    """A link whose stream ends as `pump_out` is told to."""

    def __init__(self, error: MigratorError, cut: asyncio.Event) -> None:
        self._error, self._cut = error, cut

    async def pump_out(self, fd: int) -> int:
        await self._cut.wait()
        os.close(fd)
        raise self._error


async def build(world: FakeWorld, error: MigratorError, engine_fails: Any) -> None:
    """Build with a stream that ends with `error`, and an engine that fails after that."""
    cut, loop = asyncio.Event(), asyncio.get_running_loop()
    copy = CopyThread(Cable(error, cut), Tools(world.groups("destination")))  # type: ignore[arg-type]

    def engine_build(fd: int) -> int:
        loop.call_soon_threadsafe(cut.set)
        assert os.read(fd, 1) == b""  # the pump has ended
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), loop).result()
        raise engine_fails

    copy.prepared = SimpleNamespace(  # type: ignore[assignment]
        factory=lambda fd: SimpleNamespace(build=lambda: engine_build(fd), phases=[]), network=None
    )
    try:
        await copy.build(lambda _number: None, lambda: None)
    finally:
        await copy.close()


@pytest.fixture
def world(tmp_path: Any) -> FakeWorld:
    return FakeWorld(tmp_path)


async def test_an_engine_that_fails_is_not_hidden_by_the_pump_that_finds_it_gone(world: FakeWorld) -> None:
    with pytest.raises(RestartFailed, match="no such thing here"):
        await build(world, ReaderGone("stopped reading"), RestartFailed("no such thing here"))


async def test_a_link_that_breaks_is_not_hidden_by_the_stream_that_ends_early(world: FakeWorld) -> None:
    with pytest.raises(TransportError, match="cable cut"):
        await build(world, TransportError("cable cut"), ImageError("the stream ends without a trailer"))
