"""Trees of files on their way: the source's `TreeSource`s, driven over a link.

Most is sent while the workload runs, in passes: one that carries all that differs, then as many as make what
is left less, then one beside each round of memory. What is left for the freeze is what has changed since.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence

from msgspec import structs

from migrator.errors import UsageError
from migrator.filesync.source import TreeSource
from migrator.filesync.view import Mapped
from migrator.linux import procfs
from migrator.linux.openat2 import open_in_root
from migrator.protocol.messages import AnyMessage, MessageError, SyncTree, TreeAnswer
from migrator.runtime.thread import OwnThread
from migrator.session.preflight import Difference, below

_WINDOW = 8  # lists without an answer
_ANSWER_SECONDS = 60.0
_MOST_PASSES = 8
_INODE = (1 << 63) - 1
_SHORT = 0.05  # seconds of a pass that need not be made shorter


class TreeSenders:
    """The trees of one workload whose root is `root` (/proc/PID/root).

    send:  sends a message in its turn; the seconds that it waited for that
    sync:  waits until the destination has done all that was sent
    tell:  called with the bytes of files in each message sent
    pids:  the processes of the workload, as they are now
    """

    def __init__(
        self,
        trees: Sequence[SyncTree],
        root: str,
        *,
        send: Callable[[AnyMessage], Awaitable[float]],
        sync: Callable[[], Awaitable[None]],
        tell: Callable[[int], None],
        pids: Callable[[], Sequence[int]],
    ) -> None:
        self._chosen = list(trees)
        self._root = root
        self._send, self._sync, self._tell, self._pids = send, sync, tell, pids
        self._thread = OwnThread("files")
        self._trees: list[TreeSource] = []
        self._waiting: set[int] = set()
        self._answers: list[TreeAnswer] = []
        self._answered = asyncio.Event()
        self._count = 0  # bytes since that was told
        self.seconds = 0.0  # of the last pass, without what it waited for its turn: what the freeze will need, about

    def proposed(self) -> list[SyncTree]:
        """The trees, with what tells them from others."""
        found = []
        for tree in self._chosen:
            status = os.stat(below(self._root, tree.path))
            found.append(structs.replace(tree, inode=status.st_ino & _INODE, changed_ns=status.st_ctime_ns))
        return found

    async def compare(self, forced: Sequence[str]) -> tuple[Difference, list[str]]:
        """What differs there; and those of `forced` that are in no tree. From now on changes are noted. Raises
        FileError, MessageError."""
        await self._thread.run(self._open)
        for tree in self._trees:
            lists = tree.listing()
            while (listed := await self._thread.run(next, lists, None)) is not None:
                self._waiting.add(listed.number)
                await self._send(listed)
                await self._hear(tree, _WINDOW)
            await self._hear(tree, 0)
        left = [path for path in forced if not any(tree.force(path) for tree in self._trees)]
        return sum((tree.difference for tree in self._trees), Difference()), left

    def answered(self, answer: TreeAnswer) -> None:
        """The destination has compared a list. Raises MessageError for an answer to nothing."""
        if answer.number not in self._waiting:
            raise MessageError("an answer to a list that was not sent")
        if answer.last:
            self._waiting.discard(answer.number)
        self._answers.append(answer)
        self._answered.set()

    async def _hear(self, tree: TreeSource, most: int) -> None:
        """Take what has been answered, until no more than `most` lists wait for an answer."""
        while self._answers or len(self._waiting) > most:
            answers, self._answers = self._answers, []
            for answer in answers:
                await self._thread.run(tree.answered, answer)
            if len(self._waiting) > most and not self._answers:
                self._answered.clear()
                async with asyncio.timeout(_ANSWER_SECONDS):
                    await self._answered.wait()

    async def copy(self) -> None:
        """Send all that differs, and again what has changed meanwhile, as long as that makes it less."""
        before = float("inf")
        for number in range(_MOST_PASSES):
            await self.step(first=number == 0)
            if self.seconds < _SHORT or self.seconds > before * 0.7:
                return
            before = self.seconds

    async def step(self, *, first: bool = False) -> None:
        """One pass while the workload runs: all that has changed since the last one."""
        if not self._trees:
            return
        began, sent, waited = time.monotonic(), 0, 0.0
        mapped = Mapped() if first else await self._thread.run(mapped_files, self._pids())
        for tree in self._trees:
            changes = tree.changes(mapped)
            while (message := await self._thread.run(next, changes, None)) is not None:
                waited += await self._send(message)
                sent += 1
                count, self._count = self._count, 0
                self._tell(count)
        if sent:
            await self._sync()
        self.seconds = time.monotonic() - began - waited

    async def close(self) -> None:
        await self._thread.idle()
        for tree in self._trees:
            tree.close()
        await self._thread.close()

    def _open(self) -> None:
        root = os.open(self._root or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for number, tree in enumerate(self._chosen):
                try:
                    top = open_in_root(root, tree.path, os.O_RDONLY | os.O_DIRECTORY, links=False)
                except OSError as error:
                    raise UsageError(f"{tree.path}: {os.strerror(error.errno or 0)}") from error
                self._trees.append(TreeSource(number, tree, top, tell=self._note))
        finally:
            os.close(root)

    def _note(self, count: int) -> None:
        self._count += count


def mapped_files(pids: Sequence[int]) -> Mapped:
    """What these processes have mapped."""
    mapped, written = set[int](), set[int]()
    for pid in pids:
        try:
            text = procfs.read_text(f"/proc/{pid}/maps")
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in text.splitlines():
            words = line.split(None, 5)
            if len(words) > 5 and words[4] != "0":
                mapped.add(int(words[4]))
                if words[1][3] == "s" and words[1][1] == "w":
                    written.add(int(words[4]))
    return Mapped(frozenset(mapped), frozenset(written))
