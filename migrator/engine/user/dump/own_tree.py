"""Self-checkpoint: saving a tree that the saving program is itself a part of.

A program has itself saved by starting `migrator checkpoint $MY_PID` and waiting for it. The process that
saves cannot stop itself, and must not be in the image: in the copy it has already ended, with status 0.
So whoever waits for it, there as here, learns that the tree was saved. What lies between the root and the
saver, such as a shell, is saved like everything else, and its wait returns in the copy too.

    with OwnTreeSource(pid, fd, options) as source:
        ...                      # as any source; release() is not for it: it would kill the caller

Processes that the saver has started are left out with it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.process import Process
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.source import UserSource
from migrator.errors import UsageError
from migrator.linux import procfs


def holds_us(pid: int) -> bool:
    """Whether this very process is below `pid`, or is it."""
    return os.getpid() in procfs.descendants(pid)


class OwnTreeSource(UserSource):
    """Saves the tree below `pid`, in which the caller appears as a child that has ended with status 0.

    Raises UsageError if the caller is the root itself: then nothing would be left to save."""

    def __init__(self, pid: int, fd: int, options: SourceOptions) -> None:
        if pid == os.getpid():
            raise UsageError("a program cannot save the process that saves", hint="start it as a child")
        super().__init__(pid, fd, options)
        self.tree = _TreeWithoutUs(pid, self._list_pids)

    def _list_pids(self) -> list[int]:
        below = self._adoption.pids() if self._instrumented else procfs.descendants(self.pid)
        ours = set(procfs.descendants(os.getpid())) - {os.getpid()}
        return [pid for pid in below if pid not in ours]

    def _adopt(self) -> None:
        super()._adopt()
        # We stay where we were: whoever freezes or ends the tree by its cgroup must not mean us.
        for pid in procfs.descendants(os.getpid()):
            origin = self._adoption.came_from.get(pid)
            if origin:
                try:
                    with open(f"{origin}/cgroup.procs", "w") as procs:
                        procs.write(str(pid))
                except OSError:
                    if pid == os.getpid():
                        raise


class _TreeWithoutUs(ProcessTree):
    def __init__(self, root: int, list_pids: Callable[[], list[int]]) -> None:
        super().__init__(root, list_pids)
        self._us = os.getpid()

    def refresh(self) -> tuple[list[Process], list[Process]]:
        born, gone = super().refresh()
        us = self.processes.get(self._us)
        if us is not None and not us.zombie:
            self._to_zombie(us, 0)
        return born, gone
