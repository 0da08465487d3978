"""epoll instances: what they wait for.

An instance knows its targets as open file descriptions, and by the number that they had when they were
added. /proc shows the number; kcmp(KCMP_EPOLL_TFD) tells whether a description is the one meant, for the
number may be closed or stand for something else by now.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from migrator.engine.user.descriptors import fdinfo
from migrator.engine.user.descriptors.description import Description, DescriptorTable
from migrator.errors import CheckpointFailed, ImageError, RestartFailed
from migrator.image.records_files import Descriptor, EpollItem, EpollItems
from migrator.linux import descriptors
from migrator.linux.x86_64 import NR

EPOLL_CTL_ADD, EPOLL_CTL_MOD = 1, 3
EPOLLONESHOT = 1 << 30
_PRIVATE = 0xF << 28  # EPOLLEXCLUSIVE, EPOLLWAKEUP, EPOLLONESHOT, EPOLLET
_EVERYTHING = 0x20DF  # in, pri, out, err, hup, rdnorm, wrnorm, rdhup
_PER_BATCH = 200
_F_DUPFD = 0
_EPIOCGPARAMS = 0x80088A02


class Stub(Protocol):
    """A process that is being built, stopped: what is needed of it here."""

    pid: int

    @property
    def vpid(self) -> int: ...
    def install_fds(self, items: list[tuple[int, int, bool]]) -> None: ...
    def change_fds(self, gone: Sequence[int], items: Sequence[tuple[int, int, bool]]) -> None: ...
    def call_batch(self, calls: Sequence[tuple[int, ...]]) -> list[int]: ...
    def put(self, data: bytes) -> int: ...


def save(epoll: Description, tables: Sequence[DescriptorTable], everything: Sequence[Description]) -> EpollItems | None:
    """What an instance waits for; None if nothing. Raises CheckpointFailed."""
    process, number = epoll.holders[0]
    if _polls_busily(epoll.fd):
        raise CheckpointFailed(
            f"{epoll}: this epoll instance polls busily (EPIOCSPARAMS), which is not carried",
            hint="the workload runs on",
        )
    targets = fdinfo.read(process.pid, number).targets
    if not targets:
        return None
    owners = [table for table in tables if any(slot.description is epoll for slot in table.slots)]
    numbers = [{slot.number: slot.description for slot in table.slots} for table in owners]
    items = []
    met: dict[int, int] = {}
    found: list[Description] = []
    for target in targets:
        nth = met.get(target.number, 0)
        met[target.number] = nth + 1
        near = (table[target.number] for table in numbers if target.number in table)
        description = _match(epoll, target, nth, [*near]) or _match(epoll, target, nth, everything)
        if description is None:
            raise CheckpointFailed(
                f"{epoll}: this epoll instance waits for a file (once fd {target.number}) that no process of"
                " the tree has open",
                hint="it is held by a process outside of the tree, or on its way through a socket",
            )
        found.append(description)
        items.append(EpollItem(target.data, target.events, target.number, description.objref, 0))
    for table in owners:
        mine = {id(slot.description) for slot in table.slots}
        if all(id(description) in mine for description in found):
            return EpollItems(epoll.objref, table.processes[0].vpid, items)
    raise CheckpointFailed(f"{epoll}: no process has both this epoll instance and everything it waits for")


def _polls_busily(fd: int) -> bool:
    try:
        return any(fcntl.ioctl(fd, _EPIOCGPARAMS, bytes(8)))
    except OSError:  # before Linux 6.9
        return False


def _match(
    epoll: Description, target: fdinfo.EpollTarget, nth: int, candidates: Sequence[Description]
) -> Description | None:
    for candidate in candidates:
        if candidate.stat.st_ino == target.ino and descriptors.is_epoll_target(
            candidate.fd, epoll.fd, target.number, nth
        ):
            return candidate
    return None


@dataclass(slots=True)
class _Step:
    item: EpollItem
    number: int  # under which the target is installed in the stub
    there: Descriptor | None  # what is installed under the number that the target was added as


def restore(stub: Stub, epoll: int, rec: EpollItems, installed: Mapping[int, Descriptor]) -> None:
    """Add everything to instance number `epoll` of the stub; `installed` is its table, by number."""
    by_objref: dict[int, int] = {}
    for number, descriptor in installed.items():
        by_objref.setdefault(descriptor.file_objref, number)
    steps = []
    for item in rec.items:
        if item.file_objref not in by_objref or item.fd < 0:
            raise ImageError(f"pid {stub.vpid} fd {epoll}: waits for a file that this process does not have")
        there = installed.get(item.fd)
        direct = there is not None and there.file_objref == item.file_objref
        steps.append(_Step(item, item.fd if direct else by_objref[item.file_objref], there))
    spent = [s for s in steps if s.item.events & EPOLLONESHOT and not s.item.events & ~_PRIVATE]
    _add_spent(stub, epoll, spent)
    rest = [s for s in steps if s not in spent]
    for first in range(0, len(rest), _PER_BATCH):
        part = rest[first : first + _PER_BATCH]
        _control(stub, epoll, part, [s.item.events for s in part], EPOLL_CTL_ADD)


def _add_spent(stub: Stub, epoll: int, part: list[_Step]) -> None:
    """An event with EPOLLONESHOT that was delivered is silent until renewed, hang-ups included. The only
    way into that state is a delivery: ask for everything and collect it, one after the other."""
    for step in part:
        _control(stub, epoll, [step], [_EVERYTHING | step.item.events], EPOLL_CTL_ADD)
        if stub.call_batch([(NR["epoll_wait"], epoll, stub.put(bytes(16)), 1, 0)])[0] != 1:
            # not ready for anything, so there was nothing to deliver: errors and hang-ups stay armed
            _control(stub, epoll, [step], [step.item.events], EPOLL_CTL_MOD)


def _control(stub: Stub, epoll: int, part: list[_Step], events: list[int], how: int) -> None:
    raw = b"".join(struct.pack("<IQ", e, s.item.data) for e, s in zip(events, part, strict=True))
    address = stub.put(raw)
    batch: list[tuple[int, ...]] = []
    checked = []
    for index, step in enumerate(part):
        place = address + 12 * index
        wanted = step.item.fd
        if step.number == wanted:
            batch.append((NR["epoll_ctl"], epoll, how, wanted, place))
            checked.append(step)
            continue
        _through_another_number(stub, epoll, how, step, place)
    for step, result in zip(checked, stub.call_batch(batch) if batch else [], strict=True):
        if result < 0:
            raise RestartFailed(f"pid {stub.vpid} fd {epoll}: fd {step.item.fd} cannot be waited for (errno {-result})")


def _through_another_number(stub: Stub, epoll: int, how: int, step: _Step, place: int) -> None:
    """The target was added under a number that it does not have any more: it gets it for a moment."""
    wanted = step.item.fd
    saved = -1
    if step.there is not None:
        saved = stub.call_batch([(NR["fcntl"], wanted, _F_DUPFD, wanted + 1)])[0]
    add = (NR["epoll_ctl"], epoll, how, wanted, place)
    results = stub.call_batch([(NR["dup3"], step.number, wanted, 0), add])
    if saved >= 0 and step.there is not None:
        cloexec = os.O_CLOEXEC if step.there.cloexec else 0
        stub.call_batch([(NR["dup3"], saved, wanted, cloexec), (NR["close"], saved)])
    else:
        stub.call_batch([(NR["close"], wanted)])
    if min(results) < 0:
        raise RestartFailed(f"pid {stub.vpid} fd {epoll}: a duplicate cannot be waited for ({results})")
