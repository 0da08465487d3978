"""Containers by the API: run, list, watch, wait, stop."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from cli import build

import migrator
from migrator import containers
from migrator.api.containers import ContainerSpec

pytestmark = pytest.mark.root

NAME = f"api{os.getpid()}"


@pytest_asyncio.fixture(autouse=True)
async def own_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))
    yield
    for name in containers.names():
        await containers.stop(name)


def spec(*argv: object) -> ContainerSpec:
    return migrator.ContainerSpec(name=NAME, argv=tuple(map(str, argv)), bridge="")


async def test_a_container_is_started_listed_watched_and_stopped(tmp_path: Path) -> None:
    made = await containers.run(spec(build("memory"), tmp_path / "out", 16, 20))
    (row,) = await containers.list()
    assert (row.name, row.state, row.init_pid, row.dirty_bytes_per_second) == (NAME, "running", made.init_pid, None)
    assert containers.names() == [NAME]
    (measured,) = await containers.list(rate=0.2)
    assert measured.dirty_bytes_per_second is not None
    assert measured.dirty_bytes_per_second > 0
    assert row.memory > 0
    states: list[str] = []
    async for rows in containers.watch(every=0.05):
        states.append(rows[0].state if rows else "gone")
        if len(states) == 2:
            await containers.stop(NAME)
        if states[-1] == "gone":
            break
    assert states[:2] == ["running", "running"]
    assert await containers.list() == []
    with pytest.raises(migrator.UsageError, match="no container"):
        await containers.stop(NAME)


async def test_waiting_for_a_container_tells_its_status_and_removes_it() -> None:
    made = await containers.run(spec("sh", "-c", "exit 7"))
    assert await containers.wait(made) == 7
    made = await containers.run(spec("sleep", "100"))
    waiting = asyncio.create_task(containers.wait(made))
    await asyncio.sleep(0.05)
    os.kill(made.init_pid, signal.SIGKILL)
    assert await waiting == 128 + 9
    assert containers.names() == []


async def test_whoever_stops_waiting_stops_nothing() -> None:
    made = await containers.run(spec("sleep", "100"))
    waiting = asyncio.create_task(containers.wait(made))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [row.state for row in await containers.list()] == ["running"]


async def test_a_container_that_ends_while_it_is_measured_has_no_rate() -> None:
    made = await containers.run(spec("sleep", "100"))
    listing = asyncio.create_task(containers.list(rate=1.0))
    await asyncio.sleep(0.2)
    os.kill(made.init_pid, signal.SIGKILL)
    (row,) = await listing
    assert row.dirty_bytes_per_second in (None, 0.0)


async def test_a_saved_container_is_frozen_thawed_and_its_name_is_told(tmp_path: Path) -> None:
    await containers.run(spec(build("counter"), tmp_path / "out", 5))
    saved = await migrator.checkpoint(NAME, tmp_path / "image", after=migrator.AfterCheckpoint.KILL)
    assert saved.container == NAME
    assert containers.names() == []
    copy = await migrator.restart(tmp_path / "image", frozen=True)
    assert copy.container == NAME
    assert [row.state for row in await containers.list()] == ["frozen"]
    with pytest.raises(migrator.UsageError, match="is frozen"):
        await migrator.checkpoint(NAME, tmp_path / "other")
    await containers.thaw(NAME)
    assert [row.state for row in await containers.list()] == ["running"]
    os.kill(copy.pid, signal.SIGKILL)
    assert await migrator.wait(copy) == 128 + 9
    assert containers.names() == []
