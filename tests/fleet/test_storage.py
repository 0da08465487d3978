"""Checkpoints in a directory that other hosts write to as well."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrator.errors import UsageError
from migrator.fleet.departures import Departures
from migrator.fleet.storage import Storage
from migrator.host import Login
from migrator.protocol.fleet import Depart

GOOD = "shop@20261126T135512.250.image"


def test_what_only_looks_like_an_image_hides_none(tmp_path: Path) -> None:
    for name in (
        GOOD,
        "shop@20261399T000000.000.image",
        "shop@99999999T999999.999.image",
        "shop@20261126T135512.image",
    ):
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "shop@20261126T135513.250.image").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "fifo")
    assert [(one.image, one.workload, one.bytes) for one in Storage(tmp_path).images("shop")] == [(GOOD, "shop", 5)]


@pytest.mark.parametrize("image", [f"../{GOOD}", f"/etc/{GOOD}", "passwd", "", f"{GOOD}\n", "\0"])
async def test_nothing_outside_of_it_is_restarted(tmp_path: Path, image: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / GOOD).write_bytes(b"12345")
    with pytest.raises(UsageError, match="there is no image"):
        await Storage(tmp_path / "saved").revive(image)


async def test_an_order_is_never_about_a_process(tmp_path: Path) -> None:
    ours = str(os.getpid())
    with pytest.raises(UsageError, match="could be a pid"):
        await Storage(tmp_path).save(ours, end=True)
    departures = Departures(Login(), tmp_path)
    with pytest.raises(UsageError, match="could be a pid"):
        await departures.begin(Depart("order-of-a-pid", ours, "root@127.0.0.1:1", "f", 1))
    assert not departures.moving()
    assert not list(tmp_path.glob("*.image"))
