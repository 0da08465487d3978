"""The destination side of the kernel engine: restart() builds the tree from the stream that is handed on to it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import ExitStack

from migrator.engine import clocks, spawn
from migrator.engine.base import DestinationOptions, LateLock, Move
from migrator.engine.kernel.caller import Caller
from migrator.engine.kernel.passage import Passage
from migrator.engine.stream import RecordReader
from migrator.engine.unfinished_copy import UnfinishedCopy
from migrator.errors import RestartFailed
from migrator.image.order import Order
from migrator.image.records import Container, Header, Tree
from migrator.image.records_shared import TmpfsEntry
from migrator.linux import repair
from migrator.linux.cgroup import Cgroup, CgroupError, unique_name

log = logging.getLogger("migrator.engine")

_CONTAINER_NAMESPACES = (
    spawn.CLONE_NEWNS | spawn.CLONE_NEWUTS | spawn.CLONE_NEWIPC | spawn.CLONE_NEWPID | spawn.CLONE_NEWNET
)
_CHUNK = 1 << 20


class KernelDestination(UnfinishedCopy):
    """Restarts a tree from the stream `fd`. The kernel trusts nothing of it, and changes nothing before the trailer."""

    def __init__(self, fd: int, options: DestinationOptions) -> None:
        super().__init__()
        self.options = options
        self.on_round: Callable[[int], None] = lambda _number: None
        self.moves: list[Move] = []  # restart() gives sockets their names, and takes locks, itself
        self.late_locks: list[LateLock] = []
        self._fd = fd
        self._caller: Caller | None = None

    @property
    def root_pid(self) -> int:
        return self._caller.pid if self._caller is not None else 0

    def build(self) -> int:
        """Hand the stream on to its trailer. After that the kernel has made all tasks, none of which has run: they
        wait for their freezer. Raises ImageError or RestartFailed, and nothing of the copy is left."""
        self._refuse()
        try:
            begin, passage = self._begin()
            self._pass_on(begin, passage)
            with self._phases.step("restart"):
                assert self._caller is not None
                self._caller.complete()
        except OSError as error:
            raise RestartFailed(f"{error.strerror or error} ({error.filename or 'no object named'})") from error
        return self.root_pid

    def hold(self) -> None:
        """Freeze the copy by its cgroup. Raises RestartFailed."""
        assert self._cgroup is not None
        with self._phases.step("hold"):
            try:
                self._cgroup.freeze()
            except CgroupError as error:
                raise RestartFailed(error.message, hint=error.hint) from error
            self._held = True

    def resume(self) -> None:
        """Let the copy run. Its connections, which have said nothing so far, ask their peers for what they missed."""
        assert self._cgroup is not None
        with self._phases.step("resume"):
            repair.revive(self._cgroup.pids())
            self._cgroup.thaw()
            self._done = True

    def tidy(self) -> None:
        if self._sandbox is not None:
            self._sandbox.settled()
        self._close()

    def leave_frozen(self) -> None:
        assert self._cgroup is not None
        repair.revive(self._cgroup.pids())
        self._done = True
        self._close()

    def discard(self) -> None:
        """Kill the copy; nothing of it is left. Can be called at any time before resume(), twice too."""
        if self._done:
            return
        self._done = True
        with ExitStack() as stack:  # each of these, whatever becomes of the others; the last one first
            stack.callback(self._close)
            if self._sandbox is not None:
                stack.callback(self._sandbox.remove)
            elif self._cgroup is not None:
                stack.callback(self._cgroup.remove)
            if self._caller is not None:
                stack.callback(self._caller.kill)
            if self._cgroup is not None:
                stack.callback(self._cgroup.kill)

    # ------------------------------------------------------------------ inside

    def _refuse(self) -> None:
        if self.options.verify:
            raise RestartFailed("the kernel engine takes no second look at a copy (--verify)", hint="--engine user")
        if self.options.root:
            raise RestartFailed(
                f"the kernel engine restarts below the host's root directory, not {self.options.root}",
                hint="--engine user",
            )

    def _begin(self) -> tuple[bytes, Passage]:
        """Read up to the tree, and make the process that becomes its root. What has been read of the stream."""
        reader, order = RecordReader(self._fd), Order()
        header: Header | None = None
        container: Container | None = None
        begin = b""
        while True:
            record = reader.next()
            order.check(record)
            begin += record.encode()
            if isinstance(record, Header):
                header = record
            elif isinstance(record, Container):
                container = record
            elif isinstance(record, Tree):
                break
        assert header is not None
        with self._phases.step("stubs"):
            self._start(record, header, container, reader)
        return begin + reader.read_ahead(), Passage(leave_out=True)

    def _start(self, tree: Tree, header: Header, container: Container | None, reader: RecordReader) -> None:
        pid = tree.tasks[0].pid
        given = clocks.offsets(header, reader)
        if container is None:
            self._caller = clocks.within(given, lambda: Caller.start(pid))
            self._cgroup = Cgroup.create(self.options.cgroup_name or unique_name("restart", self._caller.pid))
            self._cgroup.attach(self._caller.pid)
        else:
            if self.options.sandbox is None:
                raise RestartFailed("this is the image of a container, and only plain trees are taken here")
            unshare = spawn.CLONE_NEWCGROUP
            self._caller = clocks.within(given, lambda: Caller.start(pid, _CONTAINER_NAMESPACES, unshare=unshare))
            self._sandbox = self.options.sandbox(container.spec, self._caller.pid)
            self._cgroup = self._sandbox.cgroup
        self._caller.go()

    def _pass_on(self, data: bytes, passage: Passage) -> None:
        assert self._caller is not None
        told = 0
        while True:
            parts = passage.feed(data)
            self._check_tmpfs(passage.tmpfs)
            for part in parts:
                if not self._caller.write(part):
                    return
            for number in passage.rounds[told:]:
                self.on_round(number)
            told = len(passage.rounds)
            if passage.done:
                return
            following = self._caller.read(self._fd, _CHUNK)
            if not following:
                return  # the end of the stream, or of the call: which says why
            data = following

    def _check_tmpfs(self, entries: list[TmpfsEntry]) -> None:
        """Raises RestartFailed for what a container has in a tmpfs of its own; that each is there, and empty, is said
        by an entry as well."""
        assert self._caller is not None
        while entries:
            entry = entries.pop()
            there = os.stat(f"/proc/{self._caller.pid}/root{entry.mount}") if entry.path == "." else None
            if there is None or (there.st_mode, there.st_uid, there.st_gid) != (entry.mode, entry.uid, entry.gid):
                raise RestartFailed(
                    f"{os.path.normpath(os.path.join(entry.mount, entry.path))}, on a tmpfs of the container's own, is"
                    " not carried by the kernel engine",
                    hint="--engine user",
                )

    def _close(self) -> None:
        if self._caller is not None:
            self._caller.close()
        if self._cgroup is not None:
            self._cgroup.close()
