"""What of a running tree's descriptors cannot be carried."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from migrator.engine.user.descriptors import fdinfo, inotify
from migrator.engine.user.descriptors.classify import Obstacle, Root, classify
from migrator.engine.user.descriptors.description import Holder
from migrator.engine.user.descriptors.fdinfo import FdInfo
from migrator.engine.user.descriptors.files import own_attributes
from migrator.engine.user.descriptors.found import GONE, Found, MessageQueue, open_elsewhere
from migrator.engine.user.descriptors.survey_links import epolls_apart, owners_outside
from migrator.engine.user.descriptors.survey_sockets import survey_sockets
from migrator.image.records_files import FileKind
from migrator.linux import procfs

_GONE = (FileNotFoundError, ProcessLookupError)


def survey(
    processes: Sequence[Holder],
    *,
    own_netns: bool,
    congestion: set[str] | None = None,
    queues: dict[tuple[int, int], MessageQueue] | None = None,
    watched: set[str] | None = None,
) -> list[str]:
    """One sentence per obstacle, each naming pid, descriptor and reason; the tasks run on all the while.

    congestion: is given the congestion controls of its sockets, if somebody wants to know.
    watched: is given the paths that it watches (inotify), likewise.
    queues: is given the POSIX message queues that it has open, likewise.
    own_netns: the tree has a network namespace of its own, so that its addresses move with it. Descriptors
    and processes that vanish meanwhile are no obstacles: the freeze looks again."""
    reasons: list[str] = []
    found: list[Found] = []
    if not processes:
        return reasons
    try:
        root = Root(processes[0].pid)
    except OSError:
        return reasons  # it ended
    try:
        for process in processes:
            found += look(process, root, reasons)
        reasons += _outside(found, processes)
        reasons += _pidfds(found, processes)
        reasons += _attributes(found)
        reasons += owners_outside(found, processes)
        reasons += epolls_apart(found)
        paths: dict[inotify.Key, str] = {}
        for item in found:
            if item.verdict.kind == FileKind.INOTIFY:
                try:
                    inotify.resolve(root, inotify.watches(item.info.watches), paths)
                except Obstacle as obstacle:
                    reasons.append(f"{item}: {obstacle}")
        if watched is not None:
            watched.update(paths.values())
        if queues is not None:
            queues.update((queue.key, queue) for queue in _queues(found))
        sockets = [item for item in found if item.verdict.kind == FileKind.SOCKET]
        reasons += survey_sockets(
            sockets, processes[0].pid, root, set() if congestion is None else congestion, own_netns=own_netns
        )
    finally:
        root.close()
    return reasons


def look(process: Holder, root: Root, reasons: list[str]) -> Iterator[Found]:
    """The descriptors of a running process in a tree with this root; a reason for each that cannot be carried."""
    pid = process.pid
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
        numbers = fdinfo.numbers(pid)
    except _GONE:
        return
    for number in numbers:
        try:
            link = os.readlink(f"/proc/{pid}/fd/{number}")
            status = os.stat(f"/proc/{pid}/fd/{number}")
            info = fdinfo.read(pid, number)
            if not _is_one(link, status, info):
                continue  # it was closed meanwhile, and another has its number
            yield Found(process, name, number, link, status, info, classify(link, status, info, root))
        except Obstacle as obstacle:
            reasons.append(f"pid {pid} ({name}) fd {number}: {obstacle}")
        except OSError:
            continue  # it was closed meanwhile


def _is_one(link: str, status: os.stat_result, info: FdInfo) -> bool:
    """Whether all of this was read of the same pipe or socket: the process runs."""
    kind, brackets, _ = link.partition(":[")
    if kind not in ("pipe", "socket") or not brackets:
        return True
    return link == f"{kind}:[{status.st_ino}]" and info.ino in (0, status.st_ino)  # 0: Linux before 5.14


def _outside(found: list[Found], processes: Sequence[Holder]) -> Iterator[str]:
    """Pipes that processes outside of the tree have open too."""
    links: dict[str, Found] = {}
    for item in found:
        if item.verdict.kind in (FileKind.PIPE, FileKind.FIFO):
            links.setdefault(item.link, item)
    if not links:
        return
    inside = {process.pid for process in processes}
    for pid, link in open_elsewhere(inside):
        if link in links:
            item = links.pop(link)
            yield (
                f"{item}: {link} is shared with pid {pid}, outside of the tree; start it with its input and"
                " output in files"
            )
        if not links:
            return


def _attributes(found: list[Found]) -> Iterator[str]:
    for item in found:
        if item.verdict.kind in (FileKind.DELETED, FileKind.MEMFD) and (
            reason := own_attributes(f"/proc/{item.process.pid}/fd/{item.number}")
        ):
            yield f"{item}: {reason}"


def _queues(found: list[Found]) -> Iterator[MessageQueue]:
    for item in found:
        if item.verdict.kind == FileKind.MQUEUE:
            key = item.status.st_dev, item.status.st_ino
            path = f"/proc/{item.process.pid}/fd/{item.number}"
            yield MessageQueue(key, item.verdict.path, path, item.status.st_nlink == 0)


def _has_ended(pid: int) -> bool:
    """Whether a process waits for its parent to wait for it, or is gone by now."""
    try:
        return procfs.stat(pid)[3] in "ZX"
    except _GONE:
        return True


def _pidfds(found: list[Found], processes: Sequence[Holder]) -> Iterator[str]:
    inside = {process.pid for process in processes}
    for item in found:
        if item.verdict.kind != FileKind.PIDFD:
            continue
        pid = int(item.info.fields.get("Pid", GONE))  # there is none if another file has the number by now
        if pid in {*inside, GONE}:
            continue
        if not _has_ended(pid):  # which is waited for in a moment: the freeze looks again
            yield f"{item}: a pidfd of pid {pid}, which is not in the tree"
