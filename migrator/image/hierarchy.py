"""The task hierarchy of a stream: is it a tree, in an order in which it can be built?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from migrator.image.records import TaskFlag, TaskPids

MAX_TASKS = 1 << 17
MAX_PID = 1 << 22  # PID_MAX_LIMIT on 64-bit machines, include/linux/threads.h

_TASK_FLAGS = sum(TaskFlag)


def check_tasks(tasks: Sequence[TaskPids], fail: Callable[[str], NoReturn]) -> dict[int, TaskPids]:
    """The tasks by pid, in their order: parents before children, leaders before their threads.

    Calls `fail`, which raises, with the first thing that is wrong."""
    if not 0 < len(tasks) <= MAX_TASKS:
        fail(f"{len(tasks)} tasks (1 to {MAX_TASKS} can be)")
    known: dict[int, TaskPids] = {}
    for task in tasks:
        pid = task.pid
        if not 0 < pid <= MAX_PID:
            fail(f"impossible pid {pid}")
        if pid in known:
            fail(f"pid {pid} comes twice")
        if task.flags & ~_TASK_FLAGS:
            fail(f"pid {pid}: unknown flags {task.flags:#x}")
        if min(task.ppid, task.pgid, task.sid) < 0 or max(task.ppid, task.pgid, task.sid) > MAX_PID:
            fail(f"pid {pid}: impossible parent, group or session")
        if task.flags & TaskFlag.THREAD:
            leader = known.get(task.tgid)
            if leader is None or leader.flags & TaskFlag.THREAD:
                fail(f"thread {pid} comes ahead of its leader {task.tgid}")
        elif task.tgid != pid:
            fail(f"pid {pid} belongs to {task.tgid}, but is not marked as a thread")
        elif known and not task.flags & TaskFlag.ORPHAN:
            parent = known.get(task.ppid)
            if parent is None or parent.flags & TaskFlag.THREAD:
                fail(f"pid {pid} comes ahead of its parent {task.ppid}")
        known[pid] = task
    return known
