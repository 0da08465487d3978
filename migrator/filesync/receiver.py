"""The destination's side of all files that are carried along with one workload."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

from migrator.filesync.top import top_of
from migrator.filesync.tree_receiver import TreeReceiver
from migrator.protocol.trees import SyncTree, TreeAnswer, TreeList, TreeOps
from migrator.protocol.wire import MessageError


class FileReceiver:
    """The trees of one proposal, below `root` ("" for the host's). `name` is for the work directories.

    Nothing is written unless `accepted`. What comes after `close()` is refused, and what is being done then is
    finished first: methods may be called from several threads. Raises MessageError, FileError.
    """

    def __init__(self, trees: list[SyncTree], root: str, name: str) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._root = root
        self._name = name
        self._wanted: frozenset[str] = frozenset()
        self.accepted = False
        self._trees: list[TreeReceiver] = []
        self._add(trees)

    def want(self, paths: Iterable[str]) -> None:
        """These single files are asked for. Raises MessageError, FileError for one that could not be written here."""
        self._wanted = frozenset(paths)
        for folder in {os.path.dirname(path) for path in self._wanted}:
            top_of(SyncTree(folder, [b"-"]), self._root)

    def add(self, trees: list[SyncTree]) -> None:
        """These trees follow: of single files that were asked for. Raises MessageError for any other."""
        for tree in trees:
            paths = [os.path.join(tree.path, os.fsdecode(name)) for name in tree.only]
            if not paths or not self._wanted.issuperset(paths):
                raise MessageError(f"files in {tree.path!r} were not asked for")
        with self._lock:
            self._add(trees)

    def _add(self, trees: list[SyncTree]) -> None:
        for tree in trees:
            name = f"{self._name}.{len(self._trees)}"
            self._trees.append(TreeReceiver(top_of(tree, self._root), name))

    def compare(self, listed: TreeList) -> list[TreeAnswer]:
        """See `TreeReceiver.compare`."""
        with self._lock:
            return self._at(listed.tree).compare(listed)

    def apply(self, message: TreeOps) -> None:
        """See `TreeReceiver.apply`."""
        with self._lock:
            tree = self._at(message.tree)
            if not self.accepted:
                raise MessageError("files of a workload that was not accepted")
            tree.apply(message.ops)

    def shared(self) -> list[SyncTree]:
        """Those which are the same directory on both hosts: there is nothing to carry, and much to break."""
        return [receiver.tree for receiver in self._trees if receiver.shared]

    def close(self, kept: bool) -> list[str]:
        """See `TreeReceiver.close`."""
        with self._lock:
            self._closed = True
            return [left for tree in self._trees if (left := tree.close(kept))]

    def _at(self, number: int) -> TreeReceiver:
        if number >= len(self._trees) or self._closed:
            raise MessageError(f"tree {number} was not agreed upon")
        return self._trees[number]
