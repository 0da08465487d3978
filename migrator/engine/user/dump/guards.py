"""Guard regions (MADV_GUARD_INSTALL) of address spaces: pages that are there, and whose touch is a fault.

PAGEMAP_SCAN tells them (Linux 6.16). A walk through all page tables is not for the freeze: it is made there only of
a process that has some, or where something was met that could be one.
"""

from __future__ import annotations

from collections.abc import Sequence

from migrator.engine.user.dump.pages import PageSender
from migrator.engine.user.dump.process import Process
from migrator.engine.user.ranges import Span, merge, subtract
from migrator.image.records import PageKind
from migrator.linux.pagemap import IS_GUARD, Scanner, guards_known
from migrator.linux.procfs import Vma


def guards_of(scanner: Scanner, vmas: Sequence[Vma]) -> list[Span]:
    """The guard regions within these mappings, of one process; none where the kernel does not tell."""
    inside = [vma for vma in vmas if vma.path != "[vsyscall]"]
    if not inside or not guards_known():
        return []
    regions = scanner.scan(inside[0].start, inside[-1].end, mask=IS_GUARD, returned=IS_GUARD)
    return merge((start, end) for start, end, _ in regions)


def send(process: Process, sender: PageSender, sent: Sequence[Span], *, met: bool) -> None:
    """Say what is new of the guard regions of a process and what is no more, once its pages were sent.

    `sent`: spans of which something was sent since the last time, by which the destination takes them for what they
    are said to be. `met`: there may be new ones."""
    before = process.guards
    if before is not None and not before and not met:
        return
    assert process.scanner is not None
    now = guards_of(process.scanner, process.vmas)
    there = subtract(before or [], merge(sent))
    sender.announce(process.mm_objref, subtract(there, now), PageKind.ABSENT)
    sender.announce(process.mm_objref, subtract(now, there), PageKind.GUARD)
    process.guards = now
