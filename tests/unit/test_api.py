"""The package as other programs see it."""

from __future__ import annotations

import ast
import asyncio
import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import migrator
from migrator import model
from migrator.api import image
from migrator.api.output_file import OutputFile
from migrator.api.settings import MigrateSettings
from migrator.api.stream import Stream
from migrator.api.tasks import to_the_end
from migrator.engine.base import Round
from migrator.errors import UsageError
from migrator.runtime.thread import OwnThread


def test_importing_it_loads_nothing_that_is_not_asked_for() -> None:
    script = "import sys; before = set(sys.modules); import migrator; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"asyncssh", "rich", "typer", "pyroute2", "asyncio", "migrator.session"} & set(done.stdout.split())


def test_every_public_name_is_there_and_known_to_type_checkers() -> None:
    source = ast.parse(Path(str(migrator.__file__)).read_text())
    (typed,) = (node for node in source.body if isinstance(node, ast.If))
    names = {alias.name for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(migrator.__all__)
    for name in migrator.__all__:
        assert getattr(migrator, name) is not None
    assert set(migrator.__all__) <= set(dir(migrator))
    assert (Path(str(migrator.__file__)).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = migrator.nonsense


def test_what_takes_long_is_a_coroutine_and_what_is_asked_for_has_a_name() -> None:
    for call in (migrator.migrate, migrator.check, migrator.checkpoint, migrator.restart, migrator.wait,
                 migrator.settle, migrator.decide, migrator.containers.run, migrator.containers.stop,
                 migrator.containers.list, migrator.containers.thaw):  # fmt: skip
        assert inspect.iscoroutinefunction(call)
        positional = [p for p in inspect.signature(call).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert len(positional) <= 2, call
    with pytest.raises(TypeError):
        MigrateSettings(0.5)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        MigrateSettings().timeout = 1.0  # type: ignore[misc]


async def test_what_is_decided_is_done_although_whoever_waits_is_cancelled() -> None:
    done: list[int] = []

    async def work() -> int:
        for step in range(3):
            await asyncio.sleep(0.01)
            done.append(step)
        return 7

    task = asyncio.create_task(to_the_end(work()))
    for _ in range(3):
        await asyncio.sleep(0.002)
        task.cancel()
    assert await task == 7
    assert done == [0, 1, 2]


async def test_what_is_done_is_returned_although_it_is_cancelled_while_the_thread_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ending = asyncio.Event()

    async def slow(thread: OwnThread) -> None:
        ending.set()
        await asyncio.sleep(0.05)

    monkeypatch.setattr(OwnThread, "close", slow)
    with open("/dev/null", "wb") as null, Stream(null.fileno(), writing=True) as stream:
        task = asyncio.create_task(image._unless_cut(lambda: 7, stream))
        await ending.wait()
        task.cancel()
        assert await task == 7


def test_a_file_appears_when_it_is_whole_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_text("older")
    with pytest.raises(RuntimeError), OutputFile(path) as out:
        assert out.name == str(path)
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["image"]
    with OutputFile(path) as out:
        assert path.read_text() == "older"
        out.whole()
        assert path.read_text() == ""
    assert [p.name for p in tmp_path.iterdir()] == ["image"]
    with pytest.raises(UsageError, match="Is a directory"):
        OutputFile(tmp_path)


def test_events_and_results_go_to_json() -> None:
    made = Round(number=1, pages=2, zero_pages=0, bytes=8192, start=0, end=10**6, dirty_rate=3.0)
    assert b'"round"' in model.to_json(model.RoundDone("m", made, 0.1, 1.0, "continue", "why"))
    assert b'"Settled"' in model.to_json(model.Settled("m", "detail", "fate"))
