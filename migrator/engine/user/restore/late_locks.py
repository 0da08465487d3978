"""Locks that a copy gets once the source's tasks are gone, before it runs: see safety.md.

A lock of a description can be taken from outside, by a duplicate of the descriptor. One of a process only that process
can take: all tasks are stopped by ptrace inside their frozen cgroup, which is thawed while they stand so, and frozen
again before they are let go.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence

from migrator.engine.base import LateLock, LockKind
from migrator.engine.user.descriptors import locks
from migrator.engine.user.dump.process_tree import ProcessTree
from migrator.engine.user.dump.tracing import interrupt
from migrator.errors import CheckpointFailed, RestartFailed
from migrator.linux import sys
from migrator.linux.cgroup import Cgroup
from migrator.linux.remote import Remote, RemoteError
from migrator.linux.x86_64 import NR

_EVERY = 0.0005  # seconds between two attempts
_SCRATCH = 65536


def take(group: Cgroup, wanted: Sequence[LateLock], seconds: float) -> list[LateLock]:
    """See `migrator.engine.base.Engine.take_locks`."""
    there = set(group.pids())
    left = [lock for lock in wanted if lock.pid in there]  # who has ended needs none
    with contextlib.ExitStack() as stack:
        fds = {(lock.pid, lock.fd): stack.enter_context(_duplicate(lock)) for lock in left}
        end = time.monotonic() + seconds
        while True:
            left = [lock for lock in left if lock.kind == LockKind.PROCESS or not _taken(fds[lock.pid, lock.fd], lock)]
            inside = [lock for lock in left if lock.kind == LockKind.PROCESS]
            if inside and all(_is_free(fds[lock.pid, lock.fd], lock) for lock in inside):
                refused = _take_inside(group, inside)
                left = [lock for lock in left if lock not in inside or lock in refused]
            if not left or time.monotonic() > end:
                return left
            time.sleep(_EVERY)


@contextlib.contextmanager
def _duplicate(lock: LateLock) -> Iterator[int]:
    pidfd = os.pidfd_open(lock.pid)
    try:
        fd = sys.pidfd_getfd(pidfd, lock.fd)
    finally:
        os.close(pidfd)
    try:
        yield fd
    finally:
        os.close(fd)


def _taken(fd: int, lock: LateLock) -> bool:
    try:
        if lock.kind == LockKind.FLOCK:
            locks.take_flock(fd, lock.mode, lock.path)
        else:
            locks.take_range(fd, lock.mode, lock.start, lock.length, lock.path)
    except locks.Locked:
        return False
    return True


def _is_free(fd: int, lock: LateLock) -> bool:
    """Whether it could be had; a process that has it already is not asked again."""
    return _has(lock) or locks.is_free(fd, lock.mode, lock.start, lock.length)


def _has(lock: LateLock) -> bool:
    """Whether the process has this very lock."""
    end = "EOF" if not lock.length else str(lock.start + lock.length - 1)
    mode = "WRITE" if lock.mode == locks.EXCLUSIVE else "READ"
    with open(f"/proc/{lock.pid}/fdinfo/{lock.fd}") as file:
        for line in file:
            words = line.split()
            if words[0] == "lock:" and (words[2], words[4], *words[7:9]) == ("POSIX", mode, str(lock.start), end):
                return True
    return False


def _take_inside(group: Cgroup, wanted: Sequence[LateLock]) -> list[LateLock]:
    """Let processes lock for themselves; those that were refused. None of their own code runs for it."""
    owners = list(dict.fromkeys(lock.pid for lock in wanted))
    tree = ProcessTree(owners[0], group.pids)
    refused: list[LateLock] = []
    try:
        tree.seize()
        for process in tree.living:
            for tid in process.threads:
                interrupt(tid)
        group.thaw()  # what was interrupted stops on its way out of the kernel
        tree.stop()
        for pid in owners:
            process = tree.processes[pid]
            remote = Remote(pid)
            remote.prepare()
            with remote.borrowed(regs=process.leader.regs, mask=process.leader.mask, xstate=process.leader.xstate):
                remote.map_scratch(_SCRATCH)
                for lock in wanted:
                    if lock.pid == pid:
                        address = remote.put(locks.request(lock.mode, lock.start, lock.length))
                        if remote.batch([(NR["fcntl"], lock.fd, locks.F_SETLK, address)])[0] < 0:
                            refused.append(lock)
                remote.unmap_scratch()
    except (CheckpointFailed, RemoteError, ProcessLookupError, KeyError) as error:
        raise RestartFailed(f"locks cannot be taken in the copy: {error}", hint="it stays frozen") from error
    finally:
        group.freeze(wait=False)
        tree.detach()
        tree.close()
    return refused
