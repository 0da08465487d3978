"""The API on one host: checkpoint and restart as coroutines, and what cancelling them leaves."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import Orphan, counter, leftovers, state

import migrator
from migrator.engine.select import select
from migrator.engine.user.descriptors.ahead import Entry
from migrator.engine.user.descriptors.predumped import PredumpedFiles
from migrator.errors import CheckpointFailed
from migrator.linux.cgroup import directory_of
from migrator.testing.examples import example

pytestmark = pytest.mark.root


@pytest.fixture(autouse=True)
def own_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIGRATOR_JOURNAL_DIR", str(tmp_path / "journal"))


async def until(reached: object, seconds: float = 20.0) -> None:
    assert callable(reached)
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 20)


def is_as_before(program: Orphan, home: str | None) -> None:
    program.check_alive_and_progressing()
    assert directory_of(program.pid) == home


async def test_a_process_is_saved_ended_restarted_and_waited_for(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        saved = await migrator.checkpoint(program.pid, tmp_path / "image", after=migrator.AfterCheckpoint.KILL)
        assert (saved.pids, saved.engine, saved.container) == ([program.pid], "user", "")
        assert saved.engine_reason
        program.await_end()
        built: list[int] = []
        copy = await migrator.restart(tmp_path / "image", built=built.append)
        assert copy.pid == program.pid == built[0]
        program.check_alive_and_progressing()
        os.kill(copy.pid, signal.SIGKILL)
        assert await migrator.wait(copy) == 128 + 9
        assert not os.path.exists(copy.cgroup)
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("into", ["file", "descriptor", "end of a file"])
async def test_an_image_that_cannot_be_restarted_costs_the_program_nothing(
    into: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_table = PredumpedFiles.put_table

    def twice(self: PredumpedFiles, objref: int, entries: list[Entry]) -> None:
        put_table(self, objref, [*entries, entries[-1]])

    image = tmp_path / "image"
    image.write_bytes(b"the older one")
    flags = os.O_WRONLY | (os.O_APPEND if into == "end of a file" else 0)
    with (
        counter(tmp_path) as program,
        image.open("rb") as older,
        open(image, "wb", opener=lambda p, _: os.open(p, flags)) as file,
    ):
        home = directory_of(program.pid)
        if into == "descriptor":
            file.seek(13)
        to = image if into == "file" else file.fileno()
        with monkeypatch.context() as wrong:
            wrong.setattr(PredumpedFiles, "put_table", twice)
            with pytest.raises(
                CheckpointFailed, match=r"(image|descriptor \d+): what was written cannot be restarted: .* after fd"
            ):
                await migrator.checkpoint(program.pid, to, after=migrator.AfterCheckpoint.KILL)
        is_as_before(program, home)
        assert older.read(13) == b"the older one"
        await migrator.checkpoint(program.pid, to, after=migrator.AfterCheckpoint.KILL)
        program.await_end()
    assert leftovers(tmp_path) == []


async def test_left_stopped_or_frozen_it_waits_for_sigcont_or_thaw(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        await migrator.checkpoint(program.pid, tmp_path / "image", after=migrator.AfterCheckpoint.STOP)
        assert state(program.pid) == "T"
        os.kill(program.pid, signal.SIGCONT)
        program.check_alive_and_progressing()
        await migrator.checkpoint(program.pid, tmp_path / "image", after=migrator.AfterCheckpoint.KILL)
        program.await_end()
        ticks = program.ticks()
        copy = await migrator.restart(tmp_path / "image", frozen=True)
        await asyncio.sleep(0.1)
        assert program.ticks() == ticks
        await migrator.containers.thaw(copy.pid)
        program.check_alive_and_progressing()
        program.kill()
        await migrator.wait(copy)


async def test_what_is_raised_before_the_copy_runs_leaves_nothing_of_it(tmp_path: Path) -> None:
    def refuse(pid: int) -> None:
        raise migrator.UsageError("not now")

    with counter(tmp_path) as program:
        await migrator.checkpoint(program.pid, tmp_path / "image", after=migrator.AfterCheckpoint.KILL)
        program.await_end()
        with pytest.raises(migrator.UsageError, match="not now"):
            await migrator.restart(tmp_path / "image", built=refuse)
        assert program.is_gone()


async def test_cancelled_while_nobody_reads_the_pipe_the_program_runs_on(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        home = directory_of(program.pid)
        read, write = os.pipe()
        task = asyncio.create_task(migrator.checkpoint(program.pid, write, after=migrator.AfterCheckpoint.KILL))
        await until(lambda: directory_of(program.pid) != home)
        await cancelled(task)
        is_as_before(program, home)
        os.close(read)
        os.close(write)
    assert list((tmp_path / "journal").iterdir()) == []


async def test_cancelled_while_a_fifo_has_no_reader_nothing_is_touched(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with counter(tmp_path) as program:
        task = asyncio.create_task(migrator.checkpoint(program.pid, tmp_path / "fifo"))
        await asyncio.sleep(0.3)
        await cancelled(task)
        program.check_alive_and_progressing()


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.01, 0.03, 0.06, 0.1])
async def test_cancelled_at_any_moment_it_is_saved_whole_or_as_before(tmp_path: Path, delay: float) -> None:
    with counter(tmp_path) as program:
        home = directory_of(program.pid)
        task = asyncio.create_task(migrator.checkpoint(program.pid, tmp_path / "image"))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        is_as_before(program, home)
        if (tmp_path / "image").exists():
            assert migrator.read_info(str(tmp_path / "image")).whole
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("kind", ["pipe", "fifo", "socket"])
async def test_a_restart_that_is_cancelled_while_it_reads_leaves_nothing(tmp_path: Path, kind: str) -> None:
    with counter(tmp_path) as program:
        await migrator.checkpoint(program.pid, tmp_path / "image", after=migrator.AfterCheckpoint.KILL)
        program.await_end()
        whole = (tmp_path / "image").read_bytes()
        given: Path | int
        if kind == "fifo":
            given = tmp_path / "fifo"
            os.mkfifo(given)
        elif kind == "pipe":
            given, write = os.pipe()
        else:
            import socket

            ours, theirs = socket.socketpair()
            given, write = ours.detach(), theirs.detach()
        task = asyncio.create_task(migrator.restart(given))
        if kind == "fifo":
            await asyncio.sleep(0.1)
            write = os.open(tmp_path / "fifo", os.O_WRONLY)
        await asyncio.to_thread(os.write, write, whole[:-8])
        await until(lambda: not program.is_gone())  # the copy stands, and lacks only its trailer
        await cancelled(task)
        program.await_end()
        os.close(write)
        if isinstance(given, int):
            os.close(given)


async def test_a_copy_in_a_pipe_whose_original_ends_later_is_read_first(tmp_path: Path) -> None:
    told: list[bool] = []
    with counter(tmp_path) as program:
        read, write = os.pipe()
        saving = asyncio.create_task(migrator.checkpoint(program.pid, write, after=migrator.AfterCheckpoint.KILL))
        loading = asyncio.create_task(migrator.restart(read, waiting=lambda: told.append(True)))
        await saving
        os.close(write)
        copy = await loading
        os.close(read)
        assert (copy.pid, told) == (program.pid, [True])
        program.check_alive_and_progressing()
        program.kill()
        await migrator.wait(copy)


async def test_the_engine_is_chosen_by_name_and_one_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        saved = await migrator.checkpoint(program.pid, tmp_path / "image", engine="user")
        assert (saved.engine, saved.engine_reason) == ("user", "it was asked for")
        with pytest.raises(migrator.UsageError, match="no engine 'steam'"):
            await migrator.checkpoint(program.pid, tmp_path / "image", engine="steam")


def test_the_program_of_the_document_saves_a_process_and_brings_it_back(tmp_path: Path) -> None:
    with counter(tmp_path) as program:
        done = subprocess.Popen(
            [sys.executable, str(example("api.md", "save.py", tmp_path)), str(program.pid), str(tmp_path / "image")],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert done.stdout is not None
        lines = [done.stdout.readline(), done.stdout.readline()]
        assert lines == [
            f"saved [{program.pid}] with the user engine: {select().reason}\n",
            f"pid {program.pid} runs again\n",
        ]
        program.check_alive_and_progressing()
        program.finish()
        assert done.communicate(timeout=20)[0] == ""
        assert done.returncode == 0
