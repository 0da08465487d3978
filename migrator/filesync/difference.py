"""What a preflight finds out about files that are carried along."""

from __future__ import annotations

from dataclasses import dataclass, field

from migrator.protocol.messages import Reason
from migrator.text import size

FEW = 5  # paths that are named where there are many


@dataclass
class Difference:
    """How much is to be carried along, what of the destination's will be set aside, and what is not carried.

    names, surplus_names, skipped_names: paths of the first few of each
    walked: trees of which the kernel does not tell what changes in them, and why
    """

    files: int = 0
    bytes: int = 0
    names: list[str] = field(default_factory=list)
    surplus: int = 0
    surplus_names: list[str] = field(default_factory=list)
    skipped: int = 0
    skipped_names: list[str] = field(default_factory=list)
    walked: list[str] = field(default_factory=list)

    def __add__(self, other: Difference) -> Difference:
        return Difference(
            self.files + other.files,
            self.bytes + other.bytes,
            (self.names + other.names)[:FEW],
            self.surplus + other.surplus,
            (self.surplus_names + other.surplus_names)[:FEW],
            self.skipped + other.skipped,
            (self.skipped_names + other.skipped_names)[:FEW],
            self.walked + other.walked,
        )

    def reasons(self, here: str) -> list[Reason]:
        """What to know before it is done; nothing of it is in the way. `here` is the destination's name."""
        found = []
        if self.files:
            what = f"{self.files} ({size(self.bytes)}) differ or are missing on {here} and will be copied"
            found.append(Reason("files", f"{what}: {_some(self.names, self.files)}", "", False))
        if self.surplus:
            what = f"{self.surplus} are on {here} only and will be set aside there"
            found.append(Reason("files", f"{what}: {_some(self.surplus_names, self.surplus)}", "", False))
        if self.skipped:
            what = f"{self.skipped} sockets and devices are not copied"
            found.append(Reason("files", f"{what}: {_some(self.skipped_names, self.skipped)}", "", False))
        for tree in self.walked:
            what = f"the kernel does not tell what changes below {tree}: every file is looked at again in the freeze"
            found.append(Reason("files", what, "", False))
        return found


def _some(names: list[str], count: int) -> str:
    some = ", ".join(name[:200] for name in names[:FEW])
    return some + (", …" if count > FEW else "")
