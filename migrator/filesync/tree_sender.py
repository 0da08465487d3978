"""The source's side of a tree that is carried along: what the destination has to do to have the same.

    with TreeSender(number, tree, top_fd) as sender:
        for listed in sender.lists():                # everything, once: the destination says what differs
            sender.answered(answer)
        for ops in sender.changes(mapped): ...       # a pass: all that has changed since the last one
        for ops in sender.changes(mapped): ...       # with the workload frozen: then both sides are the same

What changed is told by the kernel (`migrator.linux.fanotify`), so that a pass takes as long as there is change;
where that cannot be had, by looking at everything. The workload may do to its files what it likes meanwhile: the
model is always what the destination has after the operations so far, and whatever a pass saw too early or too
late is in the next one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from migrator.filesync.changes import Changes, Mapped
from migrator.filesync.difference import Difference
from migrator.filesync.listing import Listing
from migrator.filesync.operations import Operations
from migrator.filesync.tree_pass import TreePass
from migrator.filesync.view import TreeView
from migrator.protocol.trees import Remove, SyncTree, TreeAnswer, TreeList, TreeOps


class TreeSender:
    """One tree. `top_fd` is its directory, opened for reading, and closed with this object.

    watched:  whether to have the kernel tell what changes from now on
    tell:     called with bytes of files as they are put into messages

    Not thread-safe. A tree that is not listed is taken to be empty on the destination.
    """

    def __init__(
        self,
        number: int,
        tree: SyncTree,
        top_fd: int,
        *,
        watched: bool = True,
        tell: Callable[[int], None] = lambda count: None,
    ) -> None:
        self.tree = tree
        self._view = TreeView(tree, top_fd, watched=watched)
        self._changes = Changes(self._view)
        self._listing = Listing(number, self._view, self._changes)
        self._operations = Operations(number, tell)

    @property
    def watching(self) -> bool:
        """Whether the kernel tells what changes."""
        return self._view.watch is not None

    @property
    def difference(self) -> Difference:
        """What the lists that were answered have shown."""
        return self._listing.difference

    def lists(self) -> Iterator[TreeList]:
        """All that is here, directory by directory. Each must be `answered`. Raises FileError."""
        return self._listing.lists()

    def answered(self, answer: TreeAnswer) -> None:
        """What the destination says to a list. Raises MessageError for what was not asked."""
        self._listing.answered(answer)

    def force(self, path: str) -> bool:
        """The file at `path`, of the workload's root, has to be sent although it looks the same. False if this tree
        does not have it."""
        return self._listing.force(path)

    def lacks(self) -> list[str]:
        """Which of the files of a tree of single files are not on the destination, as the workload sees them."""
        top = self._view.model.top
        return [self._view.shown(name) for name in self.tree.only if top.child(name) is None]

    def changes(self, mapped: Mapped) -> Iterator[TreeOps]:
        """What to do now: in as many steps as something has changed where the kernel tells it, else in as many as
        there are files. Raises FileError for what cannot be read; this object is of no use then.
        """
        for path in self._listing.surplus:
            yield from self._operations.do(Remove(path, keep=True))
        self._listing.surplus = []
        self._changes.find(mapped)
        yield from TreePass(self._view, self._changes, self._operations, mapped).run()

    def close(self) -> None:
        self._view.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def trees_of(paths: list[str]) -> list[SyncTree]:
    """Single files as trees: one for each directory that has any, with nothing of it but these files."""
    found: dict[str, list[bytes]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        found.setdefault(folder, []).append(os.fsencode(name))
    return [SyncTree(folder, sorted(names)) for folder, names in sorted(found.items())]
