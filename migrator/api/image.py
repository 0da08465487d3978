"""checkpoint and restart for asyncio: `migrator.api.local` on a thread of its own, and cancelled in order."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

from migrator.api import local
from migrator.api.image_file import open_image
from migrator.api.output_file import open_output
from migrator.api.results import exit_status
from migrator.api.stream import Stream
from migrator.api.tasks import to_the_end
from migrator.api.workloads import find_workload
from migrator.engine.base import AfterCheckpoint
from migrator.runtime.thread import OwnThread

T = TypeVar("T")

_CUT_EVERY = 0.01  # seconds


async def checkpoint(
    target: str | int,
    output: Path | int,
    *,
    after: AfterCheckpoint = AfterCheckpoint.RUN,
    engine: str = "",
) -> local.Saved:
    """Save a workload to a stream. Its tasks stand still meanwhile; `after` says what becomes of them then.

    target:  a container's name, or the pid of the root of a process tree. The caller may be in the tree: it is
             left out, and in the copy has ended with status 0
    output:  a file, which appears when the image is whole and on the disk, replacing one of that name; or a
             descriptor, which stays open. With KILL into a pipe nobody knows what becomes of the image
    engine:  its name; "" for the first that refuses nothing of it

    On every error, and if the task is cancelled before the image is whole, the tasks run on as if nothing had
    been asked. Cancelling later changes nothing, and what was done is returned. Raises UsageError, Refused,
    CheckpointFailed or JournalError.
    """
    workload = await asyncio.to_thread(find_workload, str(target))
    with await open_output(output) as out, Stream(out.fd, writing=True) as stream:

        def whole() -> None:
            stream.check()
            out.check()
            out.whole()

        return await _unless_cut(
            lambda: local.save(workload, stream.fd, out.name, after=after, engine=engine, whole=whole), stream
        )


async def restart(
    image: Path | int,
    *,
    frozen: bool = False,
    bridge: str = "",
    verify: bool = False,
    engine: str = "",
    built: Callable[[int], None] = lambda pid: None,
    waiting: Callable[[], None] = lambda: None,
) -> local.Restarted:
    """Restart what was saved. Returns once it runs, or is frozen if that was asked.

    image:    a file, or a descriptor, which is read to the trailer and stays open
    frozen:   leave the tasks complete and frozen, for `containers.thaw()`
    bridge:   for a container: the bridge of this host, if it is called otherwise than where it was saved
    verify:   save the copy again before it runs and compare: RestartFailed if it is not what was saved
    engine:   its name; "" for the one that has saved it, where it works
    built:    called, on another thread, with the root's pid when the copy is complete and does not run yet; what
              it raises discards the copy
    waiting:  called, on another thread, when the original is still in the way: the image is read to its end first

    The copy has the pids that were saved, and is a child of this process: see `wait()`. On every error, and if
    the task is cancelled before the copy runs, nothing is left of it. Cancelling later changes nothing, and the
    copy is returned. Raises UsageError, ImageError or RestartFailed.
    """
    with ExitStack() as stack:
        fd = image if isinstance(image, int) else await _open_image(image, stack)
        stream = stack.enter_context(Stream(fd, writing=False))

        def complete(root: int) -> None:
            stream.check()
            built(root)

        return await _unless_cut(
            lambda: local.restart(
                stream.fd,
                frozen=frozen,
                bridge=bridge,
                verify=verify,
                engine=engine,
                built=complete,
                waiting=waiting,
                given_up=lambda: stream.was_cut,
            ),
            stream,
        )


async def wait(made: local.Restarted) -> int:
    """Wait for the root of a copy to end, and take down what stood around it. Its exit status as a shell counts
    it: 128 + N if signal N ended it. Cancelling only stops waiting."""
    status = await exit_status(made.pid)
    await asyncio.to_thread(made.take_down)
    return status


async def _open_image(path: Path, stack: ExitStack) -> int:
    if not path.is_fifo():
        fd = await asyncio.to_thread(open_image, path)
        stack.callback(os.close, fd)
        return fd
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    stack.callback(os.close, fd)
    if stat.S_ISFIFO(os.fstat(fd).st_mode):
        await _readable(fd)  # once somebody writes
    os.set_blocking(fd, True)
    return fd


async def _readable(fd: int) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(fd, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)


async def _unless_cut(work: Callable[[], T], stream: Stream) -> T:
    """Do it on a thread of its own. Cancelling cuts the stream, and waits until the thread has undone what it
    had begun; where it was too late for that, the result is returned."""
    cancelled = False
    thread = OwnThread("image")
    task = asyncio.ensure_future(thread.run(work))
    while not task.done():
        try:
            await asyncio.wait([task], timeout=_CUT_EVERY if cancelled else None)
        except asyncio.CancelledError:
            cancelled = True
        if cancelled and not task.done():
            stream.cut()
    await to_the_end(thread.close())
    failed = task.exception()
    if cancelled and failed is not None:
        raise asyncio.CancelledError from failed
    return task.result()
