"""The selftests of the series, in a guest: each program of tools/testing/selftests/checkpoint."""

from __future__ import annotations

import re

import pytest

from tests.vm import image
from tests.vm.lab import drives
from tests.vm.machine import Machine


def test_every_selftest_passes_and_none_is_skipped(guest: Machine) -> None:
    drives()
    folder = image.ROOT / "build" / "guest" / "selftests"
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    assert names, "the series has no selftests"
    failed = []
    for name in names:
        done = guest.run(
            f"mkdir -p /tmp/self/{name} && cd /tmp/self/{name} && {folder}/{name}", seconds=300, status=None
        )
        skipped = re.findall(r"^ok .*# SKIP.*$", done.stdout, re.MULTILINE)
        if done.status or skipped or not re.search(r"^ok ", done.stdout, re.MULTILINE):
            failed.append(f"{name}: status {done.status}\n{done.stdout}{done.stderr}")
    if failed:
        pytest.fail("\n".join(failed))
