"""A Python program in a container, moved on one host: what only a container has goes with it.

A test file that imports this runs its tests with directories of their own (`own_directories`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli import MIGRATOR, migrator, started

NAME = f"shm{os.getpid()}"


@pytest.fixture(autouse=True)
def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))
    yield
    subprocess.run([*MIGRATOR, "stop", NAME], capture_output=True, check=False)


def run(folder: Path, script: str, *options: object) -> int:
    """A Python program in a container; returns when it has said that it is ready."""
    program = folder / "program.py"
    program.write_text(script)
    argv = [os.path.realpath(sys.executable), "-u", program, folder]
    done = migrator("run", "-d", "--name", NAME, "--bridge", "", *options, "--", *argv)
    deadline = time.monotonic() + 20
    while "ready" not in log(folder):
        assert time.monotonic() < deadline, log(folder)
        time.sleep(0.01)
    return int(done.stdout)


def log(folder: Path) -> str:
    inside = folder / "root" / str(folder)[1:]  # of a container with a root of its own
    paths = [place / "log" / f"{NAME}.log" for place in (folder, inside)]
    return "".join(path.read_text() for path in paths if path.exists())


def move() -> int:
    """Saved and restarted through a pipe; the copy is looked at before it runs. The new pid of its process 1."""
    save = started("checkpoint", NAME, "--kill", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    load = started("restart", "-d", "--verify", stdin=save.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert save.stdout is not None
    save.stdout.close()
    said, wrong = load.communicate(timeout=60)
    assert (save.wait(), load.returncode) == (0, 0), wrong.decode() + save.stderr.read().decode()  # type: ignore[union-attr]
    return int(said)


def await_ticks(folder: Path, more: int = 3) -> None:
    before, deadline = log(folder).count("tick"), time.monotonic() + 20
    while log(folder).count("tick") < before + more:
        assert time.monotonic() < deadline and "Traceback" not in log(folder), log(folder)
        time.sleep(0.01)
    assert "Traceback" not in log(folder) and "FAIL" not in log(folder), log(folder)


def assert_refused(folder: Path, reason: str) -> None:
    """It is not saved, for this reason, and runs on."""
    done = migrator("checkpoint", NAME, "--kill", "-o", folder / "image", code=3)
    assert reason in done.stderr
    assert json.loads(migrator("ps", "--json").stdout)[0]["state"] == "running"
