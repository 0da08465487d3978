"""What of a running tree's descriptors leads to somebody else who does not come along: seen from both ends only."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from migrator.engine.user.descriptors.description import Holder
from migrator.engine.user.descriptors.found import Found
from migrator.image.records_files import FileKind
from migrator.linux import descriptors, sys


def owners_outside(found: Sequence[Found], processes: Sequence[Holder]) -> Iterator[str]:
    """Files whose signals (F_SETOWN) somebody outside of the tree gets."""
    inside = {process.pid for process in processes}
    for item in found:
        try:
            fd = sys.pidfd_getfd(item.process.pidfd, item.number)
        except OSError:
            continue  # it was closed meanwhile
        try:
            kind, pid, _ = descriptors.owner(fd)
        except OSError:
            continue  # opened with O_PATH
        finally:
            os.close(fd)
        if kind and pid not in inside:
            yield f"{item}: its owner for signals (F_SETOWN) is pid {pid}, which is not in the tree"


def epolls_apart(found: Sequence[Found]) -> Iterator[str]:
    """epoll instances that wait for what no process has beside them, told by inode: the freeze looks more closely."""
    everything = {item.status.st_ino for item in found}
    of_process: dict[int, set[int]] = {}
    for item in found:
        of_process.setdefault(item.process.pid, set()).add(item.status.st_ino)
    apart: dict[tuple[object, ...], Found] = {}
    whole: set[tuple[object, ...]] = set()
    for item in found:
        targets = item.info.targets
        if item.verdict.kind != FileKind.EPOLL or not targets:
            continue
        gone = next((target.number for target in targets if target.ino not in everything), None)
        if gone is not None:
            yield (
                f"{item}: this epoll instance waits for a file (once fd {gone}) that no process of the tree has open;"
                " it must be closed by whoever has it, or come along"
            )
            continue
        key: tuple[object, ...] = tuple((target.number, target.ino, target.data) for target in targets)
        if {target.ino for target in targets} <= of_process[item.process.pid]:
            whole.add(key)
        else:
            apart.setdefault(key, item)
    for waits_for, item in apart.items():
        if waits_for not in whole:
            yield f"{item}: no process has both this epoll instance and everything it waits for"
