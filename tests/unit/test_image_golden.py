"""Images of released revisions, which must decode to the same for ever.

`python tests/unit/test_image_golden.py` writes the image of the current revision, once, when it is new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
from image_samples import body, closed, drafted, full, guarded, latest, owned, queued, stream

from migrator.image import records as r
from migrator.image.codec import REGISTRY, Record
from migrator.image.decoder import Decoder
from migrator.image.order import Order

GOLDEN = Path(__file__).parents[1] / "golden"
DIGESTS = {
    "rev1.img": "1fa2b3ef0771ff19ef98d79714683491757ccdf3435e9b0a4d70bc7ff8ceadc5",
    "rev2.img": "9c7811abcc3529839dfb034bd9f890e02b5bc4b6dd25440e09a62e06146e9797",
    "rev3.img": "16c8556f3e740293f9c7327c15859d299befb0c83d986f223ce34c988cba4761",
    "rev4.img": "18449167b9e2714eddf0fbc1d9496580c8d2a920e4362f17160578a7c4fe6a69",
    "rev5.img": "8f345dfa0d04a60c234c6dc3be6c9ea435d96d499bf830aaeb747f2f5eac3e54",
    "rev6.img": "08c2a3bedc13c0bde49d0b8450cd64a42b0457439be9f073c17c24e74a6e134d",
    "rev7.img": "fca01b011f33f5bc3e31b32562b7d9a6a89de026dc597601d80963635fdd6361",
}


def test_the_golden_images_are_the_files_that_were_released() -> None:
    for name, digest in DIGESTS.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("rev1.img", body),
        ("rev2.img", drafted),
        ("rev3.img", full),
        ("rev4.img", guarded),
        ("rev5.img", queued),
        ("rev6.img", owned),
        ("rev7.img", latest),
    ],
)
def test_a_revision_decodes_to_the_same_for_ever(name: str, made: Callable[[], list[Record]]) -> None:
    decoder, order = Decoder(), Order()
    records = decoder.feed((GOLDEN / name).read_bytes())
    decoder.close()
    for record in records:
        order.check(record)
    assert order.done
    assert records == closed(made())


def test_revision_7_is_what_we_write() -> None:
    assert r.REV == 7
    assert stream(closed(latest())) == (GOLDEN / "rev7.img").read_bytes()


def test_the_golden_image_has_every_kind_of_record() -> None:
    kinds = {type(record) for record in closed(latest())}
    assert {cls.__name__ for cls in REGISTRY.values()} - {cls.__name__ for cls in kinds} == {"Error"}


if __name__ == "__main__":
    raw = stream(closed(latest()))
    (GOLDEN / f"rev{r.REV}.img").write_bytes(raw)
    print(hashlib.sha256(raw).hexdigest())
