"""Images of released revisions, which must decode to the same for ever.

`python tests/unit/test_image_golden.py` writes the image of the current revision, once, when it is new.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from image_samples import body, closed, stream

from migrator.image import records as r
from migrator.image.codec import REGISTRY
from migrator.image.decoder import Decoder
from migrator.image.order import Order

GOLDEN = Path(__file__).parents[1] / "golden"
DIGESTS = {"rev1.img": "1fa2b3ef0771ff19ef98d79714683491757ccdf3435e9b0a4d70bc7ff8ceadc5"}


def test_the_golden_images_are_the_files_that_were_released() -> None:
    for name, digest in DIGESTS.items():
        assert hashlib.sha256((GOLDEN / name).read_bytes()).hexdigest() == digest


def test_revision_1_decodes_to_the_same_for_ever() -> None:
    decoder, order = Decoder(), Order()
    records = decoder.feed((GOLDEN / "rev1.img").read_bytes())
    decoder.close()
    for record in records:
        order.check(record)
    assert order.done
    assert records == closed(body())


def test_revision_1_is_what_we_write() -> None:
    assert r.REV == 1
    assert stream(closed(body())) == (GOLDEN / "rev1.img").read_bytes()


def test_the_golden_image_has_every_kind_of_record() -> None:
    kinds = {type(record) for record in closed(body())}
    assert {cls.__name__ for cls in REGISTRY.values()} - {cls.__name__ for cls in kinds} == {"Error"}


if __name__ == "__main__":
    raw = stream(closed(body()))
    (GOLDEN / f"rev{r.REV}.img").write_bytes(raw)
    print(hashlib.sha256(raw).hexdigest())
