"""What settling acts on besides the journal: cgroups, and whatever belongs to held tasks. As protocols, for tests."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from migrator.linux.cgroup import Cgroup
from migrator.recovery.journal import JournalHeader


class HoldGroup(Protocol):
    """A freezer cgroup: `migrator.linux.cgroup.Cgroup`."""

    def thaw(self) -> None: ...
    def pids(self) -> list[int]: ...
    def kill(self) -> None: ...
    def remove(self) -> None: ...
    def move_back(self, origins: Mapping[int, str]) -> None: ...


Groups = Callable[[str], HoldGroup | None]  # path or name of a cgroup -> it, None if there is none


class RecoveryHooks(Protocol):
    """What a decision asks for besides thawing and killing. All do nothing where nothing is left to do, and may be
    called twice."""

    def take_locks(self, header: JournalHeader, seconds: float) -> list[str]:
        """Take the locks of a copy that is to run, waiting at most so long; what is not had yet, one text each."""

    def reopen(self, header: JournalHeader) -> None:
        """Its tasks are about to run here: restore their network, connections and files."""

    def remove(self, header: JournalHeader) -> None:
        """Its tasks are gone: remove their container's namespaces, mounts and network."""


class NoHooks:
    """For tasks that have nothing besides their cgroup."""

    def take_locks(self, header: JournalHeader, seconds: float) -> list[str]:
        return []

    def reopen(self, header: JournalHeader) -> None:
        pass

    def remove(self, header: JournalHeader) -> None:
        pass


def open_group(reference: str) -> HoldGroup | None:
    """The cgroup of a journal, by its path or its name; None if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        if reference:
            return Cgroup.at(reference) if reference.startswith("/") else Cgroup.open(reference)
    return None


@dataclass(frozen=True)
class Tools:
    """What settling acts with."""

    groups: Groups = open_group
    hooks: RecoveryHooks = field(default_factory=NoHooks)
