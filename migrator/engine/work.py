"""How much there is of what a freeze takes time for, counted while the tree runs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from migrator.engine.base import Work
from migrator.linux import procfs

_GONE = (FileNotFoundError, ProcessLookupError)


class Looked(Protocol):
    """A process, and its mappings where somebody has read them already."""

    @property
    def pid(self) -> int: ...
    @property
    def vmas(self) -> Sequence[procfs.Vma]: ...


def count(processes: Iterable[Looked]) -> Work:
    """Of processes that run: by what /proc shows, whoever shares what with whom."""
    kinds: Counter[str] = Counter()
    for process in processes:
        try:
            folder = f"/proc/{process.pid}/fd"
            kinds.update(_kind(f"{folder}/{number}") for number in os.listdir(folder))
            kinds["threads"] += len(os.listdir(f"/proc/{process.pid}/task"))
            kinds["mappings"] += len(process.vmas) or len(procfs.maps(process.pid))
        except _GONE:
            continue  # it has ended
        kinds["processes"] += 1
    kinds.pop("", None)
    return Work(**kinds)


def _kind(link: str) -> str:
    try:
        target = os.readlink(link)
    except OSError:
        return ""  # closed meanwhile
    if target.startswith("/"):
        return "files"
    return _KINDS.get(target.partition(":")[0], "others")


_KINDS = {"pipe": "pipes", "socket": "sockets"}
