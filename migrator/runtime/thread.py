"""One thread for one object: ptrace requests must come from the thread that seized (ptrace(2)).

    async with OwnThread("source web") as thread:
        source = await thread.run(engine.source, pid, fd, options)
        await thread.run(source.freeze)

Calls are done in order. A call that has begun cannot be interrupted, only waited for: cancelling the waiter
leaves it running, and the next call begins after it.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OwnThread:
    """A thread that lives as long as the block. Leaving it waits for the calls that were begun."""

    def __init__(self, name: str) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call it on the thread. If the waiter is cancelled, the call is still done."""
        done = asyncio.wrap_future(self.submit(call, *args, **kwargs))
        done.add_done_callback(_noted)
        return await asyncio.shield(done)

    def submit(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As `run`, without waiting; from any thread."""
        return self._executor.submit(functools.partial(call, *args, **kwargs))

    async def idle(self) -> None:
        """Wait until all calls so far are done."""
        await asyncio.wrap_future(self._executor.submit(lambda: None))

    async def close(self) -> None:
        await self.idle()
        self._executor.shutdown(wait=False)

    async def __aenter__(self) -> OwnThread:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _noted(done: asyncio.Future[T]) -> None:
    """Whoever was cancelled has stopped listening: what the call raised then concerns nobody."""
    if not done.cancelled():
        done.exception()
