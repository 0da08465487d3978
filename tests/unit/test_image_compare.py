"""Streams compared by what they say in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from image_samples import body, closed, drafted

from migrator.image import records as r
from migrator.image import records_files as f
from migrator.image.codec import REGISTRY, Record
from migrator.image.compare import SKIPPED, Contents, differences

COMPARED = (r.Task, r.Cred, r.Mm, r.Fs, r.Shm, f.Socket, f.File, f.Pipe, f.EventFd, f.SignalFd, f.DeletedFile)


def contents(records: list[Record]) -> Contents:
    out = Contents()
    for record in records:
        out.add(record)
    return out


def renumbered(records: list[Record]) -> list[Record]:
    """The same stream as another writer would have numbered its objects."""
    out = copy.deepcopy(records)
    for record in out:
        if not record._members:
            continue
        arrays = [getattr(record, name) for name, kind in record._tails if kind not in (str, bytes)]
        for thing in (record, *(item for array in arrays for item in array)):
            for name in thing._plain:
                if name == "objref" or name.endswith("_objref"):
                    value = getattr(thing, name)
                    setattr(thing, name, 5000 - value if value else 0)
    return out


@pytest.mark.parametrize("made", [body, drafted])
def test_a_stream_is_the_same_as_itself_whatever_its_objrefs_are(made: Callable[[], list[Record]]) -> None:
    records = closed(made())
    assert differences(contents(records), contents(renumbered(records))) == []


def fields_of(record: Record) -> list[str]:
    return [name for name in record._plain if name not in ("objref", "reserved") and not name.endswith("_objref")]


def changed(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value


CASES = [
    (index, type(record).__name__, name)
    for index, record in enumerate(closed(body()))
    if isinstance(record, COMPARED)
    for name in fields_of(record)
    if f"{type(record).__name__}.{name}" not in SKIPPED and name not in ("pid", "kind", "state")
]


@pytest.mark.parametrize(("index", "kind", "name"), CASES)
def test_a_field_that_is_not_the_same_is_found(index: int, kind: str, name: str) -> None:
    records = closed(body())
    other = copy.deepcopy(records)
    setattr(other[index], name, changed(getattr(other[index], name)))
    found = differences(contents(records), contents(other))
    assert found, f"{kind}.{name}"
    assert all(name in difference.where for difference in found)


@pytest.mark.parametrize(
    ("saved", "copied", "same"),
    [
        (60_000_000, 59_000_000, True),
        (5_100_000, 4_900_000, True),
        (4_000_000, 1_000_000, True),
        (4_000_000, 0, True),
        (0, 0, True),
        (60_000_000, 0, False),
        (0, 60_000_000, False),
        (0, 4_000_000, False),
    ],
)
def test_a_timer_may_have_less_left_in_the_copy_and_be_over_if_it_was_soon(saved: int, copied: int, same: bool) -> None:
    def with_timer(left: int) -> Contents:
        records = closed(body())
        signal = next(record for record in records if isinstance(record, r.Signal))
        signal.itimers[0] = r.Itimer(value=left, interval=0)
        return contents(records)

    found = differences(with_timer(saved), with_timer(copied))
    assert [d.where.endswith("itimers 0.value") for d in found] == [True] * (not same)


def test_a_page_that_is_not_the_same_is_found_and_one_that_was_sent_again_is_not() -> None:
    records = closed(body())
    at, pages = next((i, p) for i, p in enumerate(records) if isinstance(p, r.Pages) and p.data and p.objref == 3)
    other = copy.deepcopy(records)
    other[at] = r.Pages(pages.objref, 0, pages.ranges, pages.data[:-1] + bytes([pages.data[-1] ^ 1]))
    found = differences(contents(records), contents(other))
    assert len(found) == 1 and "page" in found[0].where
    other.insert(at + 1, pages)
    assert differences(contents(records), contents(other)) == []


def test_what_was_private_in_an_earlier_round_is_no_content_of_what_is_shared_there_now() -> None:
    records = closed(body())
    at, vmas = next((i, v) for i, v in enumerate(records) if isinstance(v, r.Vmas))
    item = next(item for item in vmas.vmas if not item.flags & r.VmaFlag.SHARED)
    sent = r.Pages(vmas.mm_objref, 0, [r.PageRange(item.start, 1, r.PageKind.DATA)], bytes([1]) * r.PAGE_SIZE)
    earlier = [*records[: at + 1], sent, *records[at + 1 :]]
    assert differences(contents(earlier), contents(records))
    item.flags |= r.VmaFlag.SHARED
    assert differences(contents(earlier), contents(records)) == []


def test_what_waits_in_a_pipe_is_the_same_however_it_was_cut() -> None:
    records = closed(body())
    at, whole = next((i, p) for i, p in enumerate(records) if isinstance(p, f.PipeBuffer) and not p.flags)
    other = copy.deepcopy(records)
    other[at : at + 1] = [
        f.PipeBuffer(whole.pipe_objref, 0, whole.data[:1]),
        f.PipeBuffer(whole.pipe_objref, 0, whole.data[1:]),
    ]
    assert differences(contents(records), contents(other)) == []
    other[at] = f.PipeBuffer(whole.pipe_objref, 0, b"")
    assert differences(contents(records), contents(other))


def test_every_exception_has_a_reason_and_is_about_something_that_there_is() -> None:
    names = {cls.__name__: {*cls._plain, *(n for n, _ in cls._tails)} for cls in REGISTRY.values() if cls._members}
    names |= {cls.__name__: set(cls._plain) for cls in (r.Itimer, r.PosixTimer)}
    names["Cpu"] |= {"rax", "orig_rax", "r10", "rdx"}
    for key, reason in SKIPPED.items():
        assert reason
        kind, _, name = key.split(" ")[0].partition(".")
        if kind in names and name:
            assert name in names[kind], key


HERE, THERE = (bytes([2, 0, 0, port, 127, 0, 0, 1]) + bytes(8) for port in (1, 2))
MAPPED = bytes([10, 0, 0, 2]) + bytes(4) + bytes(10) + b"\xff\xff\x7f\0\0\1" + bytes(4)


def connection(received: bytes, on_the_way: bytes, *, rcvbuf: int = 1000, lock: int = 0) -> list[Record]:
    """A tree with both ends of a connection. `received`: what one end has not read yet; `on_the_way`: what it must."""
    records = closed(body())
    sample = next(record for record in records if isinstance(record, f.Socket))
    state = next(record for record in records if isinstance(record, f.SocketTcp))
    table = next(record for record in records if isinstance(record, f.FileTable))
    file = next(record for record in records if isinstance(record, f.File))
    whole, out = len(received) + len(on_the_way), []
    for at, (local, peer) in enumerate([(HERE, THERE), (MAPPED if lock else THERE, HERE)]):
        kind = {"family": local[0], "type": 1, "protocol": 6, "state": f.SocketState.CONNECTED, "peer_objref": 0}
        sizes = {"local": local, "peer": peer, "rcvbuf": rcvbuf, "sndbuf": 1000, "buf_lock": lock}
        out.append(replace(sample, objref=900 + at, **kind, **sizes))
        numbers = {"rcv_seq": 50, "snd_seq": 100 + whole, "received": b"", "sent": on_the_way}
        if at:
            numbers = {"rcv_seq": 100 + len(received), "snd_seq": 50, "received": received, "sent": b""}
        out.append(replace(state, socket_objref=900 + at, unsent=len(numbers["sent"]), **numbers))
        how = {"kind": f.FileKind.SOCKET, "inode_objref": 900 + at}
        out.append(replace(file, objref=910 + at, **how))
        table.descriptors.append(replace(table.descriptors[-1], fd=900 + at, file_objref=910 + at))
    records[records.index(table) : records.index(table)] = out
    return records


def test_bytes_between_two_ends_of_the_tree_may_arrive_but_not_change() -> None:
    before = contents(connection(b"abc", b"defg"))
    assert differences(before, contents(connection(b"abcde", b"fg", rcvbuf=2000))) == []
    assert differences(before, contents(connection(b"abcdefg", b""))) == []
    (found,) = differences(before, contents(connection(b"abcdeF", b"g")))
    assert "to be read" in found.where
    assert differences(before, contents(connection(b"abcd", b"fg")))


def test_the_size_that_a_program_gave_a_buffer_is_compared() -> None:
    found = differences(contents(connection(b"", b"", lock=2)), contents(connection(b"", b"", lock=2, rcvbuf=2000)))
    assert found and all("rcvbuf" in difference.where for difference in found)
