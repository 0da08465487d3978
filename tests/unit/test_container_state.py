"""What is kept about containers is for root alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from migrator.container import state
from migrator.container.spec import ContainerSpec


def test_the_file_of_a_container_is_for_root_alone_whatever_the_umask_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path))
    folder = tmp_path / "containers"
    folder.mkdir()
    folder.chmod(0o755)  # as an earlier release has made it
    container = state.Container(ContainerSpec(name="web"), 1, 0, "ct-web", 0, 0.0)
    before = os.umask(0)
    try:
        container.save()
        container.save()
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == ["web.json"]
    assert stat.S_IMODE((folder / "web.json").stat().st_mode) == 0o600
    assert state.get("web") == container
