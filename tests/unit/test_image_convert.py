"""Images of every released revision become images of the current one; anything else is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from image_samples import body, closed, stream

import migrator
from migrator.errors import ImageError, UsageError
from migrator.image import records as r
from migrator.image.convert import UPGRADES, Converter
from migrator.image.decoder import Decoder

GOLDEN = Path(__file__).parents[1] / "golden"


def converted(data: bytes, size: int = 1 << 20) -> bytes:
    converter, out = Converter(), b""
    for start in range(0, len(data), size):
        out += converter.feed(data[start : start + size])
    converter.close()
    return out


def test_there_is_an_upgrade_from_every_revision_to_the_next() -> None:
    assert sorted(UPGRADES) == list(range(1, r.REV))
    assert sorted(path.name for path in GOLDEN.glob("rev*.img")) == [f"rev{n}.img" for n in range(1, r.REV + 1)]


@pytest.mark.parametrize("rev", range(1, r.REV + 1))
@pytest.mark.parametrize("size", [7, 1 << 20])
def test_a_golden_image_becomes_one_of_the_current_revision(rev: int, size: int) -> None:
    old = (GOLDEN / f"rev{rev}.img").read_bytes()
    new = converted(old, size)
    before, after = Decoder().feed(old), Decoder().feed(new)
    assert after[0] == replace(before[0], rev=r.REV)  # type: ignore[type-var]
    assert after[1:] == before[1:]
    assert converted(new) == new


def test_a_stream_that_is_cut_short_is_refused() -> None:
    data = (GOLDEN / "rev1.img").read_bytes()
    for cut in range(0, len(data), 997):
        with pytest.raises(ImageError):
            converted(data[:cut])


def test_a_newer_revision_is_refused() -> None:
    records = closed(body())
    records[0] = replace(records[0], rev=r.REV + 1)  # type: ignore[type-var]
    with pytest.raises(ImageError, match="revision"):
        converted(stream(records))


def test_a_checkpoint_that_failed_is_no_image() -> None:
    with pytest.raises(ImageError, match="gave up: pid 7: no"):
        converted(stream([*body()[:3], r.Error("pid 7: no")]))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    made = migrator.convert_image(GOLDEN / "rev1.img", tmp_path / "new.img")
    assert (made.from_rev, made.to_rev) == (1, r.REV)
    assert made.bytes == (tmp_path / "new.img").stat().st_size
    assert migrator.read_info(str(tmp_path / "new.img")).whole
    broken = tmp_path / "cut.img"
    broken.write_bytes((GOLDEN / "rev1.img").read_bytes()[:-1])
    with pytest.raises(ImageError):
        migrator.convert_image(broken, tmp_path / "never.img")
    with pytest.raises(UsageError, match="no-such"):
        migrator.convert_image(tmp_path / "no-such", tmp_path / "never.img")
    with pytest.raises(UsageError, match="directory"):
        migrator.convert_image(tmp_path, tmp_path / "never.img")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.img", "new.img"]
