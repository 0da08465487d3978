"""A container that is looked at all the time can be saved all the same: whoever measures gives way."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import migrator
from migrator import container
from migrator.api import containers
from migrator.container import attention

pytestmark = pytest.mark.root

NAME = "looked-at"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[container.Container]:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("MIGRATOR_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))
    made = container.run(container.spec_for(NAME, ["sleep", "1000"], bridge=""))
    yield made
    container.stop(NAME, timeout=0)


async def test_it_is_saved_while_an_observer_measures_it_again_and_again(
    made: container.Container, tmp_path: Path
) -> None:
    over = threading.Event()
    rates: list[float | None] = []

    def observe() -> None:
        while not over.is_set():
            rates.append(containers._measure(NAME, 0.3))

    observer = threading.Thread(target=observe)
    observer.start()
    try:
        while not rates:
            await asyncio.sleep(0.01)
        for number in range(3):
            await migrator.checkpoint(NAME, tmp_path / f"image{number}")
    finally:
        over.set()
        observer.join()
    assert any(rate is not None for rate in rates)


def test_what_is_being_saved_is_not_measured_and_another_one_that_saves_does_not_wait(
    made: container.Container,
) -> None:
    assert containers._measure(NAME, 0.05) is not None
    with attention.saving(made), attention.saving(made):
        assert containers._measure(NAME, 0.05) is None
        assert os.stat(made.lock_file).st_mode & 0o077 == 0, "any user could hold it"
    assert containers._measure(NAME, 0.05) is not None


def test_nothing_of_it_is_left_with_the_container(made: container.Container) -> None:
    with attention.saving(made):
        assert made.lock_file.exists()
    container.stop(NAME, timeout=0)
    assert not made.lock_file.exists()
    made.save()  # for the end of the test
