"""A thread for one call, for what a thread can do to itself and never undo: enter a namespace, leave a shared root."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def in_fresh_thread(name: str, function: Callable[[], T]) -> T:
    """Call `function` in a thread of its own, which has ended when this returns; what it raises is raised here."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix=name) as pool:
        return pool.submit(function).result()
