"""Bytes in, records out, however the bytes are cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_samples import HEAP, PAGE, body, closed, pages, stream

from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image.codec import HEADER, MAX_RECORD, Record
from migrator.image.decoder import Decoder
from migrator.image.order import Order

RECORDS = closed(body())
STREAM = stream(RECORDS)
DATA, ZERO = r.PageKind.DATA, r.PageKind.ZERO


def without_contents(record: Record) -> Record:
    if isinstance(record, r.Pages):
        return r.Pages(objref=record.objref, crc=record.crc, ranges=record.ranges, data=b"")
    return record


@given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=12), keep=st.booleans())
def test_the_same_records_come_out_however_the_stream_is_cut(cuts: list[int], keep: bool) -> None:
    decoder = Decoder(keep_pages=keep)
    edges = [0, *sorted(cuts), len(STREAM)]
    out = [rec for a, b in itertools.pairwise(edges) for rec in decoder.feed(STREAM[a:b])]
    decoder.close()
    assert out == (RECORDS if keep else [without_contents(record) for record in RECORDS])
    assert decoder.offset == len(STREAM)
    assert decoder.records == len(RECORDS)


@pytest.mark.parametrize("keep", [True, False])
def test_a_stream_cut_short_at_any_byte_is_refused(keep: bool) -> None:
    decoder = Decoder(keep_pages=keep)
    for position in range(len(STREAM)):
        with pytest.raises(ImageError, match="without a trailer"):
            decoder.close()
        decoder.feed(STREAM[position : position + 1])
    decoder.close()


def test_contents_that_are_not_kept_are_never_held() -> None:
    big = r.Pages(objref=3, crc=0, ranges=[r.PageRange(start=0, nr_pages=2048, kind=DATA)], data=PAGE * 2048)
    raw = big.encode()
    decoder = Decoder(keep_pages=False)
    out: list[Record] = []
    for position in range(0, len(raw), 4096):
        out += decoder.feed(raw[position : position + 4096])
        assert len(decoder._buffer) <= 4096
    assert out == [without_contents(big)]


@pytest.mark.parametrize("keep", [True, False])
def test_damaged_contents_are_told_by_their_checksum(keep: bool) -> None:
    raw = bytearray(pages(3, (HEAP, 1, DATA)).encode())
    raw[-100] ^= 1
    with pytest.raises(ImageError, match="checksum"):
        Decoder(keep_pages=keep).feed(raw)


def test_contents_that_do_not_fit_their_ranges_are_refused_even_if_not_kept() -> None:
    record = pages(3, (HEAP, 1, DATA))
    record.ranges[0].nr_pages = 2
    with pytest.raises(ImageError, match="not what its ranges announce"):
        Decoder(keep_pages=False).feed(record.encode())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (HEADER.pack(77, 16), "unknown type 77"),
        (HEADER.pack(-1, 16), "unknown type -1"),
        (HEADER.pack(r.Tree.TYPE, 7), r"\(Tree\) at byte 0: impossible length 7"),
        (HEADER.pack(r.Tree.TYPE, -8), "impossible length -8"),
        (HEADER.pack(r.Tree.TYPE, MAX_RECORD + 1), "impossible length"),
        (HEADER.pack(r.Tree.TYPE, 8), "its fixed part alone has 8"),
    ],
)
def test_a_broken_frame_is_told_with_its_place(raw: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        Decoder().feed(raw)


def test_records_ahead_of_a_broken_one_are_handed_out_first() -> None:
    decoder = Decoder()
    good = stream(RECORDS[:3])
    assert decoder.feed(good + HEADER.pack(77, 16)) == RECORDS[:3]
    for again in (lambda: decoder.feed(b""), decoder.close):
        with pytest.raises(ImageError, match=rf"record 4 at byte {len(good)}: unknown type 77"):
            again()


def test_what_follows_the_trailer_is_refused() -> None:
    decoder = Decoder()
    assert decoder.feed(STREAM + b"\0") == RECORDS
    with pytest.raises(ImageError, match="follows the trailer"):
        decoder.close()


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_stream_only_ever_raises_image_errors(data: st.DataObject) -> None:
    raw = bytearray(stream(r for r in RECORDS if len(r.encode()) < 4096))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    decoder = Decoder(keep_pages=data.draw(st.booleans()))
    order = Order(contents=False)
    try:
        for record in decoder.feed(raw):
            order.check(record)
        decoder.close()
    except ImageError:
        pass


@given(blob=st.binary(max_size=200))
def test_hostile_bytes_only_ever_raise_image_errors(blob: bytes) -> None:
    decoder = Decoder()
    try:
        decoder.feed(blob)
        decoder.close()
    except ImageError:
        pass
