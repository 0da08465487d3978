"""The files that a workload takes along: those that it has open or mapped, and whole trees.

Most go before the freeze; in it goes only what has changed since.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence

from migrator.engine.base import FileFact
from migrator.filesync.files import FileSender
from migrator.filesync.tree_sender import TreeSenders
from migrator.protocol.messages import AnyMessage, FilesSync, MessageError, SyncTree, TreeAnswer
from migrator.session.preflight import Difference


class FileSync:
    """What goes along with one workload whose root is `root` (/proc/PID/root).

    files: those that it has open or mapped
    trees: directories that go as a whole
    send:  sends a message in its turn; the seconds that it waited for that
    tell:  called with the bytes of files in each message sent
    pids:  the processes of the workload, as they are now
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
        self._files = FileSender(files, send, root, tell)
        self._trees = TreeSenders(trees, root, send=send, sync=self._files.sync, tell=tell, pids=pids)
        self._any_trees = bool(trees)

    def proposed(self) -> list[SyncTree]:
        """The trees, with what tells them from others."""
        return self._trees.proposed()

    @property
    def known(self) -> set[str]:
        """The files that may be asked for."""
        return self._files.known

    @property
    def seconds(self) -> float:
        """What the freeze will need for it, about."""
        return self._trees.seconds

    @property
    def goes(self) -> bool:
        """Whether there is anything to send in the freeze."""
        return bool(self._files.sent) or self._any_trees

    async def compare(self, wanted: Sequence[str]) -> Difference:
        """What differs there in the trees; `wanted` are files that go in any case. From now on changes are noted.
        Raises FileError, MessageError."""
        found, left = await self._trees.compare(wanted)
        self._files.want(left)
        return found

    async def send(self) -> None:
        """Send all that differs, while the workload runs."""
        await self._files.send_wanted()
        await self._trees.copy()

    async def step(self) -> None:
        """Send what has changed in the trees since; the workload runs."""
        await self._trees.step()

    async def send_last(self) -> None:
        """Send what has changed since; the workload stands still."""
        await self._files.send_changes()
        await self._trees.step()

    def heard(self, message: FilesSync | TreeAnswer) -> None:
        """An answer of the destination. Raises MessageError for one to nothing."""
        if isinstance(message, FilesSync):
            self._files.synced(message.number)
        else:
            self._trees.answered(message)

    async def close(self) -> None:
        await self._trees.close()


def check_wanted(wanted: Iterable[str], baggage: FileSync | None) -> None:
    """Raises MessageError if the destination asks for what is not the workload's."""
    if set(wanted) - (baggage.known if baggage is not None else set()):
        raise MessageError("the destination wants files that are not the workload's")
