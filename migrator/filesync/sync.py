"""The files that a workload takes along: whole trees, and single files that it has open or mapped.

Most goes while the workload runs, in passes: one that carries all that differs, then as many as make what is left
less, then one beside each round of memory. What is left for the freeze is what has changed since.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence

from msgspec import structs

from migrator.engine.base import FileFact
from migrator.errors import UsageError
from migrator.filesync.changes import Mapped
from migrator.filesync.difference import Difference
from migrator.filesync.paths import FileError, below
from migrator.filesync.tree_sender import TreeSender, trees_of
from migrator.linux import procfs
from migrator.linux.openat2 import open_in_root
from migrator.protocol.messages import AnyMessage, FilesSync
from migrator.protocol.trees import SyncTree, TreeAnswer
from migrator.protocol.wire import MessageError
from migrator.runtime.thread import OwnThread

_WINDOW = 8  # lists without an answer
_ANSWER_SECONDS = 60.0
_MOST_PASSES = 8
_INODE = (1 << 63) - 1
_SHORT = 0.05  # seconds of a pass that need not be made shorter


class FileSync:
    """What goes along with one workload whose root is `root` (/proc/PID/root).

    files:   those that it has open or mapped, any of which the destination may ask for
    trees:   directories that go as a whole
    send:    sends a message when the cap of the link lets it; returns the seconds that it waited for that
    tell:    called with the bytes of files in each message sent
    pids:    the processes of the workload, as they are now
    single:  the trees of those files that were asked for and are in none of `trees`; set by `compare()`
    seconds: of the last pass, without what it waited for bandwidth: what the freeze will need, about
    """

    def __init__(
        self,
        files: Iterable[FileFact],
        trees: Sequence[SyncTree],
        root: str,
        *,
        send: Callable[[AnyMessage], Awaitable[float]],
        tell: Callable[[int], None],
        pids: Callable[[], Sequence[int]],
    ) -> None:
        self._chosen = list(trees)
        self._known = {fact.path for fact in files}
        self._root = root
        self._send, self._tell, self._pids = send, tell, pids
        self._thread = OwnThread("files")
        self._trees: list[TreeSender] = []
        self._waiting: set[int] = set()
        self._answers: list[TreeAnswer] = []
        self._answered = asyncio.Event()
        self._synced = 0, 0  # asked for, answered
        self._count = 0  # bytes since that was told
        self._written: frozenset[int] = frozenset()
        self.single: list[SyncTree] = []
        self.seconds = 0.0

    def proposed(self) -> list[SyncTree]:
        """The trees, with what tells them from others. Raises OSError."""
        found = []
        for tree in self._chosen:
            status = os.stat(below(self._root, tree.path))
            found.append(structs.replace(tree, inode=status.st_ino & _INODE, changed_ns=status.st_ctime_ns))
        return found

    def check_wanted(self, wanted: Iterable[str]) -> None:
        """Raises MessageError if the destination asks for what is not the workload's."""
        if set(wanted) - self._known:
            raise MessageError("the destination wants files that are not the workload's")

    @property
    def goes(self) -> bool:
        """Whether there is anything to send in the freeze."""
        return bool(self._trees)

    async def compare(self, wanted: Sequence[str]) -> Difference:
        """What differs there in the trees; `wanted` are files that go in any case. From now on changes are noted.
        Raises FileError, MessageError."""
        await self._thread.run(self._open, self._chosen)
        for tree in self._trees:
            lists = tree.lists()
            while (listed := await self._thread.run(next, lists, None)) is not None:
                self._waiting.add(listed.number)
                await self._send(listed)
                await self._take_answers(tree, _WINDOW)
            await self._take_answers(tree, 0)
        self.single = trees_of([path for path in wanted if not any(tree.force(path) for tree in self._trees)])
        return sum((tree.difference for tree in self._trees), Difference())

    async def send(self) -> None:
        """Send all that differs, and again what has changed meanwhile, as long as that makes it less. The workload
        runs. Raises FileError for a file that was asked for and is gone."""
        await self._thread.run(self._open_single)
        before = float("inf")
        for number in range(_MOST_PASSES):
            await self.step(first=number == 0)
            if self.seconds < _SHORT or self.seconds > before * 0.7:
                break
            before = self.seconds
        for tree in self._trees[len(self._chosen) :]:
            if gone := tree.lacks():
                raise FileError(f"{gone[0]} cannot be copied: it is gone")

    async def step(self, *, first: bool = False) -> None:
        """One pass: all that has changed since the last one, whether the workload runs or is frozen."""
        if not self._trees:
            return
        began, sent, waited = time.monotonic(), 0, 0.0
        mapped = await self._thread.run(self._mapped, first)
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

    def heard(self, message: FilesSync | TreeAnswer) -> None:
        """An answer of the destination. Raises MessageError for one to nothing."""
        if isinstance(message, FilesSync):
            self._synced = self._synced[0], message.number
        else:
            if message.number not in self._waiting:
                raise MessageError("an answer to a list that was not sent")
            if message.last:
                self._waiting.discard(message.number)
            self._answers.append(message)
        self._answered.set()

    async def close(self) -> None:
        await self._thread.idle()
        for tree in self._trees:
            tree.close()
        await self._thread.close()

    async def _take_answers(self, tree: TreeSender, most: int) -> None:
        """Take what has been answered, until no more than `most` lists wait for an answer."""
        while self._answers or len(self._waiting) > most:
            answers, self._answers = self._answers, []
            for answer in answers:
                await self._thread.run(tree.answered, answer)
            if len(self._waiting) > most and not self._answers:
                await self._answer()

    async def _sync(self) -> None:
        """Wait until the destination has done all that was sent."""
        number = self._synced[0] + 1
        self._synced = number, self._synced[1]
        await self._send(FilesSync(number))
        while self._synced[1] < number:
            await self._answer()

    async def _answer(self) -> None:
        self._answered.clear()
        async with asyncio.timeout(_ANSWER_SECONDS):
            await self._answered.wait()

    def _open(self, trees: Sequence[SyncTree]) -> None:
        for tree in trees:
            try:
                self._add(tree, self._open_top(tree))
            except OSError as error:
                raise UsageError(f"{tree.path}: {os.strerror(error.errno or 0)}") from error

    def _open_single(self) -> None:
        for tree in self.single:
            try:
                self._add(tree, self._open_top(tree), watched=False)  # of one file the kernel tells no more than stat
            except OSError as error:
                path = os.path.join(tree.path, os.fsdecode(tree.only[0]))
                raise FileError(f"{path} cannot be copied: {os.strerror(error.errno or 0)}") from error

    def _open_top(self, tree: SyncTree) -> int:
        root = os.open(self._root or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return open_in_root(root, tree.path, os.O_RDONLY | os.O_DIRECTORY, links=False)
        finally:
            os.close(root)

    def _add(self, tree: SyncTree, top_fd: int, *, watched: bool = True) -> None:
        self._trees.append(TreeSender(len(self._trees), tree, top_fd, watched=watched, tell=self._note))

    def _note(self, count: int) -> None:
        self._count += count

    def _mapped(self, first: bool) -> Mapped:
        """What the workload has mapped. What was mapped for writing at the end of the pass before may have been
        written to since, without a new time: the file had that from the first write after it was mapped."""
        found = mapped_files(self._pids())
        written, self._written = self._written | frozenset(found.written), frozenset(found.written)
        # In the first pass nothing of it stands mapped on the destination.
        return Mapped(frozenset() if first else found.any, written)


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
