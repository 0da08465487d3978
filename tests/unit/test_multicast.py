"""Multicast groups of a network namespace, on kernels that have none."""

from __future__ import annotations

import subprocess
import sys

import pytest

from migrator.engine.user.descriptors.multicast import joined
from migrator.linux import procfs


@pytest.fixture
def no_multicast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel without CONFIG_IP_MULTICAST and IPv6 has neither file."""

    def missing(path: str) -> str:
        raise FileNotFoundError(2, "No such file or directory", path)

    monkeypatch.setattr(procfs, "read_text", missing)


@pytest.mark.usefixtures("no_multicast")
def test_a_kernel_without_multicast_has_no_groups() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as child:
        try:
            assert joined(child.pid) == []
        finally:
            child.kill()


@pytest.mark.usefixtures("no_multicast")
def test_a_process_that_has_ended_is_not_taken_for_that() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    with pytest.raises(FileNotFoundError):
        joined(child.pid)
