"""What a peer that is allowed to bring workloads can do to the agent and to other peers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import os
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from migrator import host, model
from migrator.engine import base
from migrator.errors import MigrationAborted, TransportError
from migrator.metrics import Metrics
from migrator.protocol import facts, trees
from migrator.protocol import messages as m
from migrator.protocol.states import Recorded
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, JournalHeader, Role
from migrator.session import file_facts
from migrator.session.admission import Admission
from migrator.session.file_facts import collect_files, file_digest
from migrator.session.serve import ask_over, serve
from migrator.session.settings import DestinationSettings, Prepared
from migrator.testing.fakeengine import FakeDestination, FakeWorld, Script
from transport.link import Link
from transport.wire import link_pair

MINE, OTHER = "SHA256:mine", "SHA256:other"
ID = "m-00000001"


def host_facts(name: str) -> m.HostFacts:
    return m.HostFacts(name, "6.18", "x86_64", "v", "m", frozenset(), 2696, "fake")


def proposal(migration: str = ID, files: list[base.FileFact] | None = None, xstate_size: int = 2696) -> m.Propose:
    survey = base.Survey([1], 1, 1 << 20, files or [], frozenset(), xstate_size, "none", 0, [])
    return m.Propose(migration, host_facts("a"), facts.Survey.of(survey))


def fakes(path: Path) -> DestinationSettings:
    (path / "world").mkdir(exist_ok=True)
    world = FakeWorld(path / "world")
    return DestinationSettings(
        host=host_facts("b"),
        prepare=lambda proposal: Prepared(lambda fd: FakeDestination(world, fd, Script()), "fake"),
        journal=path / "journal",
        tools=Tools(world.groups("destination")),
    )


@contextlib.asynccontextmanager
async def served(
    settings: DestinationSettings, key: str = "", on_event: Callable[[model.Event], None] = model.nobody
) -> AsyncIterator[Link]:
    """The peer's end of a link that an agent serves."""
    here, there = await link_pair()
    there.key = key

    async def agent() -> None:
        async with there:
            await serve(there, settings, on_event=on_event)

    task = asyncio.create_task(agent())
    try:
        async with here:
            yield here
    finally:
        await task


async def say(link: Link, *messages: m.AnyMessage) -> None:
    for message in messages:
        await link.send(m.encode(message))


async def heard(link: Link, kind: type[m.AnyMessage]) -> m.AnyMessage:
    while True:
        message = m.decode(await link.receive(10.0))
        if isinstance(message, kind):
            return message


async def begin_and_fail(settings: DestinationSettings, migration: str) -> None:
    """A migration whose stream is garbage."""
    async with served(settings) as link:
        await say(link, m.Hello([m.VERSION]), proposal(migration, xstate_size=settings.host.xstate_size))
        verdict = await heard(link, m.Verdict)
        assert isinstance(verdict, m.Verdict) and not [r for r in verdict.reasons if r.blocking], verdict
        await say(link, m.Begin(migration))
        read_fd, write_fd = os.pipe()
        os.write(write_fd, b"this is no image" * 64)
        os.close(write_fd)
        await link.pump_in(read_fd)
        await heard(link, m.Discarded)


# What is left behind


def traced() -> int:
    """Bytes allocated by all but the measuring of coverage, which keeps some 4 KiB of each thread."""
    gc.collect()
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, "*/coverage/*")])
    return sum(trace.size for trace in snapshot.traces)


@pytest.mark.root
async def test_migrations_that_fail_early_leave_no_memory_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MIGRATOR_STATE_DIR", str(tmp_path / "state"))
    settings = host.destination_settings(journal=tmp_path / "journal")
    for number in range(10):
        await begin_and_fail(settings, f"warm-{number:08}")
    gc.collect()
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    try:
        before = traced()
        for number in range(60):
            await begin_and_fail(settings, f"fail-{number:08}")
        after = traced()
        deadline = time.monotonic() + 30
        while after - before >= 60 * 1024 and time.monotonic() < deadline:  # the last session is closing
            await asyncio.sleep(0.2)
            after = traced()
    finally:
        tracemalloc.stop()
    assert after - before < 60 * 1024, f"{(after - before) / 60:.0f} bytes of each are left"
    assert threading.active_count() <= threads + 2
    assert len(os.listdir("/proc/self/fd")) <= descriptors


# Whose migration it is


async def test_another_peer_neither_hears_of_a_migration_nor_ends_it(tmp_path: Path) -> None:
    settings = fakes(tmp_path)
    Journal.create(settings.journal, JournalHeader(migration=ID, role=Role.DESTINATION, key=MINE)).close()
    for message in (m.Ask(ID), m.Commit(ID), m.Done(ID)):
        async with served(settings, OTHER) as link:
            await say(link, m.Hello([m.VERSION]), message)
            failure = await heard(link, m.Failure)
            assert isinstance(failure, m.Failure) and "was not begun here with the key that asks" in failure.reason
    async with served(settings, OTHER) as link:
        with pytest.raises(TransportError, match="was not begun here"):
            await ask_over(link, ID)
    with Journal.open(settings.journal / f"{ID}.destination.journal") as journal:
        assert journal.state is Recorded.OPEN
    async with served(settings, MINE) as link:
        assert await ask_over(link, ID) is Recorded.DISCARDED


# What it reads


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def fact(path: Path | str, *, size: int = 4096, writable: bool = False, digest: str = "") -> base.FileFact:
    return base.FileFact(str(path), size, 0o100644, 0, "", writable, digest)


@pytest.mark.root
@pytest.mark.parametrize("path", ["/proc/kmsg", "/dev/zero", "/dev/kmsg", "/dev/random"])
def test_files_without_an_end_are_looked_at_and_not_read(path: str) -> None:
    found = collect_files([fact(path, digest="0" * 64)])[path]
    assert found is not None
    nothing = hashlib.sha256().hexdigest()
    assert found.digest in ("", nothing) and file_digest(path) in ("", nothing)


def test_a_fifo_in_the_place_of_a_mapped_file_is_not_opened(fifo: Path) -> None:
    found = collect_files([fact(fifo, digest="0" * 64), fact(fifo)])[str(fifo)]
    assert found is not None and found.mode & 0o170000 == 0o010000
    assert file_digest(str(fifo)) == ""


def test_of_a_huge_file_there_is_no_digest(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert file_digest(str(path)) == ""


async def test_the_reading_of_files_ends_with_the_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()

    def endless(fd: int, size: int, stopped: Callable[[], bool]) -> str:
        reading.set()
        while not stopped():
            time.sleep(0.001)
        raise MigrationAborted("the comparison of files was cancelled")

    monkeypatch.setattr(file_facts, "_digest", endless)
    (tmp_path / "file").write_bytes(b"x")
    asked = proposal(files=[fact(tmp_path / "file", digest="0" * 64)])
    async with served(fakes(tmp_path)) as link:
        await say(link, m.Hello([m.VERSION]), asked)
        await asyncio.to_thread(reading.wait)
        # While one peer keeps its worker busy others are served.
        async with served(fakes(tmp_path)) as other:
            await say(other, m.Hello([m.VERSION]), m.Clock(1))
            await heard(other, m.Clock)
    # Leaving served() has waited for the end of the session.


async def test_a_million_wanted_pids_are_refused_by_the_decoder() -> None:
    survey = facts.Survey([1], 1, 0, [], frozenset(), 0, "none", 0, list(range(1, 1_000_001)))
    with pytest.raises(m.MessageError):
        m.decode(m.encode(m.Propose(ID, host_facts("a"), survey)))


# What it tells


async def test_a_progress_of_negative_bytes_ends_only_its_session(tmp_path: Path) -> None:
    settings, metrics = fakes(tmp_path), Metrics()
    good = facts.Round(1, 1, 0, 1 << 20, 0, 1, 0.0)
    encoded = m.encode(m.Progress(good, 0.1, 1.0, "continue", ""))
    bad = encoded.replace((1 << 20).to_bytes(4, "big"), (-1 & 0xFFFFFFFF).to_bytes(4, "big"))
    bad = bad.replace(b"\xce\xff\xff\xff\xff", b"\xd2\xff\xff\xff\xff")
    assert bad != encoded
    with pytest.raises(m.MessageError):
        m.decode(bad)
    async with served(settings, on_event=metrics) as link:
        await say(link, m.Hello([m.VERSION]), proposal())
        await heard(link, m.Verdict)
        await link.send(bad)
    async with served(settings, on_event=metrics) as link:
        await say(link, m.Hello([m.VERSION]), m.Clock(1))
        await heard(link, m.Clock)


async def test_an_observer_that_fails_changes_nothing(tmp_path: Path) -> None:
    told: list[str] = []

    def broken(event: model.Event) -> None:
        told.append(type(event).__name__)
        raise ZeroDivisionError("an observer")

    async with served(fakes(tmp_path), on_event=broken) as link:
        await say(link, m.Hello([m.VERSION]), proposal())
        await heard(link, m.Verdict)
        await say(link, m.Progress(facts.Round(1, 1, 0, 1, 0, 1, 0.0), 0.1, 1.0, "continue", ""), m.Begin(ID))
        await say(link, m.Abort(ID, "enough"))
        await heard(link, m.Discarded)
    assert {"Started", "RoundDone", "Ended"} <= set(told)


async def test_what_is_judged_is_judged_on_a_thread_of_its_own(tmp_path: Path) -> None:
    threads: list[str] = []

    def root_of(asked: m.Propose) -> str:
        threads.append(threading.current_thread().name)
        return ""

    calls: list[Awaitable[object]] = []
    settings = replace(fakes(tmp_path), root_of=root_of)
    admissions = [Admission(proposal(), settings) for _ in range(2)]
    for admission in admissions:
        calls.append(admission.judge())
    await asyncio.gather(*calls)
    for admission in admissions:
        await admission.close(False)
    assert all(name.startswith("files") for name in threads)


# What it writes


@pytest.mark.root
@pytest.mark.parametrize("case", ["dry run", "refused"])
async def test_a_proposal_that_is_not_accepted_writes_nothing(tmp_path: Path, case: str) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "file").write_text("old")
    asked = msgspec.structs.replace(
        proposal(), trees=[trees.SyncTree(str(top))], copy_files=True, dry_run=case == "dry run"
    )
    if case == "refused":
        asked = msgspec.structs.replace(asked, source=msgspec.structs.replace(asked.source, machine="vax"))
    put = trees.Put(trees.Entry(b"file", 0o100644), b"new")
    async with served(fakes(tmp_path)) as link:
        await say(link, m.Hello([m.VERSION]), asked)
        await heard(link, m.Verdict)
        await say(link, trees.TreeList(0, 0, b"", b"", True, []))
        await heard(link, trees.TreeAnswer)  # comparing is allowed
        await say(link, trees.TreeOps(0, [put]))
    async with served(fakes(tmp_path)) as link:
        await say(link, m.Hello([m.VERSION]), msgspec.structs.replace(asked, migration="m-00000002"))
        await heard(link, m.Verdict)
        await say(link, m.Begin("m-00000002"))
        with contextlib.suppress(TransportError):
            await say(link, trees.TreeOps(0, [put]))
    assert os.listdir(top) == ["file"] and (top / "file").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) in (["top", "world"], ["journal", "top", "world"])
