"""Records as bytes: both ways, and nothing but ImageError from bytes that nobody vouches for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_samples import body, closed, vmas

from migrator.errors import ImageError
from migrator.image import records as r
from migrator.image.codec import HEADER, MAX_RECORD, REGISTRY, Record, Struct, fixed, record, s32, u32, u64

SAMPLES = [*closed(body()), r.Error("pid 7: no\0 space left")]
SMALL = [sample for sample in SAMPLES if len(sample.encode()) < 4096]
NAMES = [type(sample).__name__ for sample in SAMPLES]


def payload(sample: Record) -> bytes:
    return sample.encode()[HEADER.size :]


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_a_record_decodes_to_what_was_encoded(sample: Record) -> None:
    raw = sample.encode()
    kind, length = HEADER.unpack_from(raw)
    assert kind == sample.TYPE
    assert length == len(raw)
    assert length % 8 == 0
    again = REGISTRY[kind].decode(memoryview(raw)[HEADER.size :])
    assert again == sample
    assert again.encode() == raw


@pytest.mark.parametrize("sample", SMALL, ids=[type(sample).__name__ for sample in SMALL])
def test_a_record_cut_short_anywhere_is_refused(sample: Record) -> None:
    whole = payload(sample)
    if isinstance(sample, r.Error):  # a text ends where it is cut
        whole = whole[:1]
    for cut in range(len(whole)):
        with pytest.raises(ImageError):
            type(sample).decode(whole[:cut])


@pytest.mark.parametrize("sample", SMALL, ids=[type(sample).__name__ for sample in SMALL])
def test_bytes_behind_the_last_tail_are_refused(sample: Record) -> None:
    if isinstance(sample, r.Error):
        return
    with pytest.raises(ImageError, match="too many"):
        type(sample).decode(payload(sample) + bytes(8))


@given(number=st.sampled_from(sorted(REGISTRY)), blob=st.binary(max_size=400))
def test_hostile_bytes_only_ever_raise_image_errors(number: int, blob: bytes) -> None:
    try:
        REGISTRY[number].decode(blob)
    except ImageError:
        pass


@given(data=st.data(), index=st.integers(0, len(SMALL) - 1))
def test_a_damaged_record_is_refused_or_encodes_to_the_same_bytes(data: st.DataObject, index: int) -> None:
    """Decoding is canonical: no two payloads mean the same record."""
    raw = bytearray(payload(SMALL[index]))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        again = type(SMALL[index]).decode(bytes(raw))
    except ImageError:
        return
    if not isinstance(again, r.Error):
        assert payload(again) == raw


@given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")))
def test_any_text_comes_back(text: str) -> None:
    name = r.Name(objref=1, reserved=0, text=text)
    assert r.Name.decode(payload(name)) == name


@given(raw=st.binary().filter(lambda raw: 0 not in raw))
def test_file_names_that_are_no_utf8_come_back(raw: bytes) -> None:
    name = r.Name(objref=1, reserved=0, text=raw.decode("utf-8", "surrogateescape"))
    assert r.Name.decode(payload(name)).text.encode("utf-8", "surrogateescape") == raw


def test_a_count_that_claims_more_than_is_there_is_refused() -> None:
    raw = bytearray(payload(vmas()))
    raw[8:12] = (0xFFFFFFFF).to_bytes(4, "little")
    with pytest.raises(ImageError, match=r"Vmas\.vmas: claims \d+ bytes, \d+ are left"):
        r.Vmas.decode(raw)


def test_padding_must_be_zero_in_the_fixed_part_and_behind_tails() -> None:
    name = bytearray(payload(r.Name(objref=1, reserved=0, text="abc")))
    name[-1] = 1
    with pytest.raises(ImageError, match="padding"):
        r.Name.decode(name)
    gap = bytearray(payload(r.Name(objref=1, reserved=0, text="abc")))
    gap[12] = 1
    with pytest.raises(ImageError, match="padding"):
        r.Name.decode(gap)


def test_a_nul_in_a_text_is_refused_both_ways() -> None:
    with pytest.raises(ImageError, match="NUL"):
        r.Name(objref=1, reserved=0, text="a\0b").encode()
    raw = payload(r.Name(objref=1, reserved=0, text="a-b")).replace(b"-", b"\0")
    with pytest.raises(ImageError, match="NUL"):
        r.Name.decode(raw)


@pytest.mark.parametrize(("value", "name"), [(1 << 32, "umask"), (-1, "umask"), (1 << 31, "objref")])
def test_a_value_that_does_not_fit_its_field_is_refused(value: int, name: str) -> None:
    with pytest.raises(ImageError, match="Fs"):
        r.Fs(**{"objref": 1, "umask": 0, "cwd": "/", "root": "/", name: value}).encode()


def test_a_record_longer_than_the_limit_is_not_written() -> None:
    with pytest.raises(ImageError, match="more than a record may have"):
        r.Pages(objref=1, crc=0, ranges=[], data=bytes(MAX_RECORD)).encode()


def test_an_error_must_be_led_by_a_nul() -> None:
    with pytest.raises(ImageError, match="NUL"):
        r.Error.decode(b"text\0\0\0\0")


def test_a_type_number_is_given_out_once() -> None:
    with pytest.raises(TypeError, match="is Tree already"):

        @record(r.Tree.TYPE)
        class Twice(Record):
            objref: s32


def test_an_item_with_a_gap_is_refused_when_it_is_declared() -> None:
    with pytest.raises(TypeError, match="gaps"):

        @fixed
        class Gappy(Struct):
            small: u32
            big: u64
