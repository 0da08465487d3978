"""State files of containers hold their environments: nobody but root reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from migrator.container.spec import ContainerSpec
from migrator.container.state import Container


def test_a_state_file_is_its_owners_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "state"))
    before = os.umask(0)
    try:
        container = Container(
            spec=ContainerSpec(name="shop", env={"PASSWORD": "secret"}), init_pid=1, start_time=0, cgroup="", ifindex=0,
            created=0.0,
        )  # fmt: skip
        container.save()
        container.settled()
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert [path.name for path in files] == ["shop.json"]
    assert "secret" in files[0].read_text()
    assert files[0].stat().st_mode & 0o077 == 0
    assert files[0].parent.stat().st_mode & 0o077 == 0
