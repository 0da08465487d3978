"""The program of docs/api.md that moves a workload, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from migrator.testing.examples import example
from migrator.testing.hosts import Host
from migrator.testing.stage import AGENT_PORT, Stage
from migrator.testing.workloads import build

pytestmark = pytest.mark.root


def move(stage: Stage, source: Host, destination: Host, folder: Path) -> str:
    done = source.run(
        [
            sys.executable, str(example("api.md", "move.py", folder)), "shop",
            f"root@{destination.address}:{AGENT_PORT}",
            str(source.folder / "client_key"), source.env["MIGRATOR_KNOWN_HOSTS"],
        ],
        check=False, stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=120,
    )  # fmt: skip
    assert not done.stderr, done.stderr
    return f"{done.stdout}exit {done.returncode}"


def test_a_container_is_moved_there_and_back_and_what_cannot_be_done_is_told(tmp_path: Path) -> None:
    with Stage(tag="ap") as stage:
        stage.start_container("shop", [str(build("counter")), str(tmp_path / "out"), "5"], address="10.77.0.61")
        there = move(stage, stage.a, stage.b, tmp_path)
        assert re.search(r"^1 processes can go, \d+ files are the same there$", there, re.MULTILINE)
        assert re.search(r"^round 1: \d+ KiB, \d+ ms if stopped now$", there, re.MULTILINE)
        assert re.search(rf"^pid \d+ on {stage.b.label}, down for \d+\.\d ms\nexit 0$", there, re.MULTILINE)
        assert "no container 'shop'" in move(stage, stage.a, stage.b, tmp_path)
        assert move(stage, stage.b, stage.a, tmp_path).endswith("exit 0")
        ticks = [line for line in (tmp_path / "out").read_text().splitlines() if line.startswith("tick ")]
        assert [int(line.split()[1]) for line in ticks] == list(range(1, len(ticks) + 1))
