"""Increments of images: put together again they are what was saved, or they are refused."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrator.api.image_file import open_image
from migrator.api.image_info import read_info
from migrator.api.increments import MAGIC, PAGE, Room, read_header, write
from migrator.errors import ImageError

_RECORD = struct.Struct("<ii")


def record(kind: int, payload: bytes) -> bytes:
    return _RECORD.pack(kind, _RECORD.size + len(payload)) + payload


def page(number: int) -> bytes:
    return struct.pack("<Q", number) * (PAGE // 8)


def image(*pages: int, per_record: int = 4, head: bytes = b"head") -> bytes:
    """Records with so many pages each, between two small ones."""
    chunks = [pages[at : at + per_record] for at in range(0, len(pages), per_record)]
    middle = b"".join(record(3, struct.pack("<Q", len(chunk)) + b"".join(map(page, chunk))) for chunk in chunks)
    return record(1, head) + middle + record(9, b"the end!")


def put_together(folder: Path, name: str) -> bytes:
    with Room(folder, name) as room, tempfile.TemporaryFile() as file:
        room.put_together(file)
        file.seek(0)
        return file.read()


def save(folder: Path, number: int, data: bytes, before: str, *, most: float = 1.1) -> str:
    """As an increment to what was before; its name."""
    whole, name = folder / "new", f"w@{number}.increment"
    whole.write_bytes(data)
    with Room(folder, before) as room:
        assert write(whole, room, folder / name, most=most)
    whole.unlink()
    return name


def test_a_file_is_opened_as_the_image_that_it_stands_for(tmp_path: Path) -> None:
    """Whatever opens an image opens an increment: restart, image info, image convert."""
    (tmp_path / "w@0.image").write_bytes(image(*range(1, 41)))
    name = "w@0.image"
    for number in (1, 2):
        name = save(tmp_path, number, image(*range(number, 41 + number)), name)
        with open(open_image(tmp_path / name), "rb") as file:
            assert file.read() == image(*range(number, 41 + number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w@0.image", "w@1.increment", "w@2.increment"]
    (tmp_path / "w@1.increment").unlink()
    with pytest.raises(ImageError, match=r"w@2.increment builds on w@1.increment, which is not beside it"):
        open_image(tmp_path / name)
    with pytest.raises(ImageError, match="builds on"):
        read_info(str(tmp_path / name))


def test_only_what_is_new_is_kept_wherever_the_rest_lies_now(tmp_path: Path) -> None:
    (tmp_path / "w@0.image").write_bytes(image(*range(1, 41)))
    moved = image(99, *range(40, 0, -1), per_record=7, head=b"other head")
    name = save(tmp_path, 1, moved, "w@0.image")
    assert put_together(tmp_path, name) == moved
    assert read_header(tmp_path / name).new < 3 * PAGE


def test_each_of_a_chain_can_be_put_together(tmp_path: Path) -> None:
    (tmp_path / "w@0.image").write_bytes(image(*range(1, 41)))
    before, images = "w@0.image", {}
    for number in range(1, 6):
        data = image(*range(number * 3, number * 3 + 40), 1000 + number)
        before = save(tmp_path, number, data, before)
        images[before] = data
    for name, data in images.items():
        assert put_together(tmp_path, name) == data
    header = read_header(tmp_path / before)
    assert (header.base, len(header.chain)) == ("w@0.image", 4)
    assert header.new < 6 * PAGE, "pages of earlier increments are found as well"


pages = st.lists(st.integers(0, 12), max_size=30)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(pages, st.integers(1, 9), st.binary(max_size=20)), min_size=2, max_size=4))
def test_whatever_changes_the_image_comes_back(saved: list[tuple[list[int], int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, before = Path(name), "w@0.image"
        for number, (contents, per_record, head) in enumerate(saved):
            data = image(*contents, per_record=per_record, head=head)
            if number == 0:
                (folder / before).write_bytes(data)
            else:
                before = save(folder, number, data, before)
                assert put_together(folder, before) == data


@pytest.mark.parametrize("junk", [b"x" * 10000, _RECORD.pack(1, -5) + b"y" * 5000, _RECORD.pack(1, 1 << 30) + b"z"])
def test_what_is_no_stream_of_records_comes_back_too(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "w@0.image").write_bytes(image(1, 2, 3))
    assert put_together(tmp_path, save(tmp_path, 1, junk, "w@0.image")) == junk


def test_an_increment_that_does_not_pay_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "w@0.image").write_bytes(image(*range(40)))
    (tmp_path / "new").write_bytes(image(*range(100, 140)))
    with Room(tmp_path, "w@0.image") as room:
        assert not write(tmp_path / "new", room, tmp_path / "w@1.increment")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "w@0.image"]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    (tmp_path / "w@0.image").write_bytes(image(*range(1, 41)))
    save(tmp_path, 1, image(*range(5, 45)), "w@0.image")
    save(tmp_path, 2, image(*range(9, 49)), "w@1.increment")
    return tmp_path


@pytest.mark.parametrize("file", ["w@0.image", "w@1.increment", "w@2.increment"])
@pytest.mark.parametrize("how", ["flip", "cut", "empty", "other"])
def test_damage_anywhere_in_a_chain_is_noticed(chain: Path, file: str, how: str) -> None:
    whole = (chain / file).read_bytes()
    middle = 2 * len(whole) // 3 if file.endswith("increment") else 9 * PAGE  # what is referred to
    spoilt = {
        "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "cut": whole[:middle],
        "empty": b"",
        "other": image(*range(500, 540)) if file.endswith("image") else whole.replace(b"w@0.image", b"w@9.image"),
    }[how]
    (chain / file).write_bytes(spoilt)
    with pytest.raises((ImageError, FileNotFoundError)):
        put_together(chain, "w@2.increment")


def test_every_truncation_and_every_flipped_byte_is_refused(chain: Path) -> None:
    path = chain / "w@2.increment"
    whole = path.read_bytes()
    good = put_together(chain, "w@2.increment")
    for at in range(0, len(whole), 7):
        for spoilt in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :]):
            path.write_bytes(spoilt)
            try:
                assert put_together(chain, "w@2.increment") == good
            except (ImageError, FileNotFoundError):
                pass


def test_an_increment_names_no_file_elsewhere(chain: Path) -> None:
    path = chain / "w@2.increment"
    path.write_bytes(path.read_bytes().replace(b"w@0.image", b"../.image"))
    with pytest.raises(ImageError, match="elsewhere"):
        put_together(chain, "w@2.increment")
    path.write_bytes(MAGIC + b"\xff\xff\xff\xff" + b"{" * 100)
    with pytest.raises(ImageError, match="damaged"):
        read_header(path)
