"""A stream between the kernel and the project: a container's record put in and left out, however it arrives."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.kernel.passage import Passage
from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image.decoder import Decoder
from migrator.image.order import Order
from migrator.image.records_shared import TmpfsEntry
from tests.unit import image_samples

CONTAINER = r.Container(1, "web", "{}")
SPEC = CONTAINER.encode()


def stream(*, container: bool, rounds: int = 0) -> bytes:
    """Some records in their order, which is all that matters here."""
    records = [image_samples.header(), image_samples.header_x86(), *([CONTAINER] if container else [])]
    records += [image_samples.tree(), image_samples.mm()]
    for number in range(1, rounds + 1):
        records += [r.RoundMark(number, 0, 5), r.RoundMark(number, r.RoundFlag.END, 6)]
    records += [image_samples.pages(3, (0x1000000, 2, r.PageKind.DATA))]
    body = b"".join(record.encode() for record in records)
    return body + r.Trailer(r.TRAILER_MAGIC, len(records) + 1).encode()


def through(passage: Passage, data: bytes, cuts: list[int]) -> bytes:
    out = b""
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for begin, end in itertools.pairwise(edges):
        if not passage.done:
            out += b"".join(bytes(part) for part in passage.feed(data[begin:end]))
    return out


CUTS = st.lists(st.integers(0, 10_000), max_size=30)


@given(CUTS)
def test_a_stream_passes_as_it_is(cuts: list[int]) -> None:
    passage = Passage()
    assert through(passage, stream(container=True), cuts) == stream(container=True)
    assert passage.done


@given(CUTS)
def test_the_record_of_a_container_is_put_in_ahead_of_the_tree_and_counted(cuts: list[int]) -> None:
    assert through(Passage(insert=SPEC), stream(container=False), cuts) == stream(container=True)


@given(CUTS)
def test_the_record_of_a_container_is_left_out_and_not_counted(cuts: list[int]) -> None:
    assert through(Passage(leave_out=True), stream(container=True), cuts) == stream(container=False)


@given(CUTS)
def test_the_ends_of_rounds_are_noticed_when_they_have_passed(cuts: list[int]) -> None:
    passage = Passage()
    assert through(passage, stream(container=False, rounds=3), cuts) == stream(container=False, rounds=3)
    assert passage.rounds == [1, 2, 3]


@given(CUTS)
def test_bytes_and_pages_without_contents_are_counted_as_they_pass(cuts: list[int]) -> None:
    holes = image_samples.pages(3, (0x2000000, 5, r.PageKind.ABSENT), (0x3000000, 2, r.PageKind.ZERO))
    data = image_samples.header().encode() + holes.encode() + stream(container=False)
    passage = Passage()
    assert through(passage, data, cuts) == data
    assert (passage.bytes, passage.absent) == (len(data), 7)


def test_nothing_that_follows_the_trailer_passes() -> None:
    assert through(Passage(), stream(container=False) + b"more", []) == stream(container=False)


def test_an_error_record_passes_and_is_the_end() -> None:
    data = image_samples.header().encode() + r.Error("it failed").encode()
    passage = Passage(insert=SPEC)
    assert (through(passage, data, [40]), passage.done) == (data, True)


@pytest.mark.parametrize("length", [0, 7, -8, 1 << 30])
def test_a_record_of_an_impossible_length_is_refused(length: int) -> None:
    with pytest.raises(ImageError, match=f"impossible length, {length}"):
        Passage().feed(image_samples.header().encode() + struct.pack("<ii", 401, length))


@given(st.binary(max_size=300))
def test_hostile_bytes_only_ever_raise_image_errors(blob: bytes) -> None:
    try:
        Passage(leave_out=True, insert=SPEC).feed(blob)
    except ImageError:
        pass


def test_what_comes_out_is_an_image_with_the_container_in_it() -> None:
    made = through(Passage(insert=SPEC), stream(container=False), [])
    decoder, order, kinds = Decoder(), Order(), []
    for record in decoder.feed(made):
        kinds.append(type(record))
        if isinstance(record, r.Tree):
            break
        order.check(record)
    assert kinds == [r.Header, r.HeaderX86, r.Container, r.Tree]


@given(CUTS)
def test_what_is_in_a_tmpfs_is_left_out_and_told(cuts: list[int]) -> None:
    entry = TmpfsEntry(0, 0o41777, 0, 0, 0, 0, "/dev/shm", ".", "")
    whole = stream(container=False)
    end = len(r.Trailer(r.TRAILER_MAGIC, 0).encode())
    count = r.Trailer.decode(whole[-end + 8 :]).nr_records
    longer = whole[:-end] + entry.encode() + r.Trailer(r.TRAILER_MAGIC, count + 1).encode()
    passage = Passage(leave_out=True)
    assert through(passage, longer, cuts) == whole
    assert passage.tmpfs == [entry]
