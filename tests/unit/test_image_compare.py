"""Streams compared by what they say in the end."""

from __future__ import annotations

import copy
from collections.abc import Callable
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


def test_a_page_that_is_not_the_same_is_found_and_one_that_was_sent_again_is_not() -> None:
    records = closed(body())
    at, pages = next((i, p) for i, p in enumerate(records) if isinstance(p, r.Pages) and p.data and p.objref == 3)
    other = copy.deepcopy(records)
    other[at] = r.Pages(pages.objref, 0, pages.ranges, pages.data[:-1] + bytes([pages.data[-1] ^ 1]))
    found = differences(contents(records), contents(other))
    assert len(found) == 1 and "page" in found[0].where
    other.insert(at + 1, pages)
    assert differences(contents(records), contents(other)) == []


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
