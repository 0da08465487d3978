"""Whole migrations with a fake engine over a real link: how each ends, and where the workload is then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from migrator import model
from migrator.engine.base import FileFact, Work
from migrator.errors import (
    CheckpointFailed,
    Fate,
    MigrationAborted,
    MigratorError,
    Overrun,
    Refused,
    RestartFailed,
    TransportError,
    Undecided,
)
from migrator.filesync import sync
from migrator.filesync.changes import Mapped
from migrator.model import Outcome
from migrator.protocol import messages as m
from migrator.protocol import trees
from migrator.protocol.states import Recorded
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, Role
from migrator.session import deadlines, prediction, workload
from migrator.session.arrival import Arrival
from migrator.session.destination import DestinationSession
from migrator.session.serve import serve
from migrator.session.settings import DestinationSettings, Prepared, SourceSettings
from migrator.session.source import SourceSession
from migrator.testing.fakeengine import FakeDestination, FakeSource, FakeWorld, Script
from transport.link import Link
from transport.wire import link_pair

ID = "fake-00000001"


@dataclass
class Hosts:
    """Two hosts with a fake workload on the first."""

    path: Path
    world: FakeWorld
    source: Script = field(default_factory=Script)
    destination: Script = field(default_factory=Script)
    events: list[model.Event] = field(default_factory=list)
    servers: list[asyncio.Task[None]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    reachable: bool = True
    engine: FakeSource | None = None

    def settings(self, **changes: Any) -> SourceSettings:
        return replace(SourceSettings(migration=ID, peer="b", journal=self.path / "a", ask_for=2.0), **changes)

    def taking(self) -> DestinationSettings:
        return DestinationSettings(
            host=facts("b"),
            prepare=lambda proposal: Prepared(lambda fd: FakeDestination(self.world, fd, self.destination), "fake"),
            journal=self.path / "b",
            tools=Tools(self.world.groups("destination")),
        )

    async def connect(self) -> Link:
        if not self.reachable:
            raise TransportError("no route to host")
        here, there = await link_pair()
        self.links += [here, there]
        self.servers.append(asyncio.create_task(self._serve(there)))
        return here

    async def _serve(self, link: Link) -> None:
        async with link:
            await serve(link, self.taking())

    async def session(self, reconnect: Callable[[], Awaitable[Link]] | None = None, **changes: Any) -> SourceSession:
        def factory(fd: int) -> FakeSource:
            self.engine = FakeSource(self.world, fd, self.source)
            return self.engine

        return SourceSession(
            self.settings(**changes),
            factory,
            await self.connect(),
            facts("a"),
            reconnect=reconnect or self.connect,
            on_event=self.events.append,
        )

    async def migrate(self, **changes: Any) -> model.MigrationResult:
        return await (await self.session(**changes)).run()

    async def quiet(self) -> None:
        await asyncio.gather(*self.servers)

    def journal(self, role: Role) -> Journal | None:
        return Journal.find(self.path / ("a" if role is Role.SOURCE else "b"), ID, role)


def facts(name: str) -> m.HostFacts:
    return m.HostFacts(name, "6.18", "x86_64", "v", "m", frozenset(), 2696, "fake")


@pytest.fixture
async def hosts(tmp_path: Path) -> AsyncIterator[Hosts]:
    (tmp_path / "world").mkdir()
    made = Hosts(tmp_path, FakeWorld(tmp_path / "world"))
    yield made
    for link in made.links:
        await link.close()
    for server in made.servers:
        server.cancel()


async def test_a_workload_moves_and_both_journals_are_closed(hosts: Hosts) -> None:
    result = await hosts.migrate()
    await hosts.quiet()
    assert result.outcome is Outcome.MIGRATED and result.pid == 4242
    assert hosts.world.check() == ("none", "run")
    for role in Role:
        journal = hosts.journal(role)
        assert journal is not None and journal.state is Recorded.CLOSED
    assert hosts.journal(Role.DESTINATION).decision is Recorded.RUNNING  # type: ignore[union-attr]


async def test_the_timeline_adds_up_to_the_downtime(hosts: Hosts) -> None:
    hosts.source.slow = {"final": 0.02}
    result = await hosts.migrate()
    assert result.timeline is not None
    assert result.downtime >= 0.02
    parts = result.timeline.downtime_parts()
    assert sum(p.seconds for p in parts) == pytest.approx(result.downtime)
    assert {"final", "restore"} <= {p.name for p in parts}


async def test_an_observer_sees_rounds_and_the_end(hosts: Hosts) -> None:
    result = await hosts.migrate()
    rounds = [event for event in hosts.events if isinstance(event, model.RoundDone)]
    assert [event.round.pages for event in rounds] == [1000, 100, 10, *[1] * len(rounds)][: len(rounds)]
    assert rounds[-1].verdict == "freeze"
    assert hosts.events[-1] == model.Ended(ID, model.Where.SOURCE, result)
    assert isinstance(hosts.events[0], model.Started)


async def test_a_dry_run_ends_with_a_report_and_leaves_no_trace(hosts: Hosts) -> None:
    session = await hosts.session(dry_run=True)
    result = await session.run()
    await hosts.quiet()
    assert result.outcome is Outcome.DRY_RUN
    assert session.report is not None and session.report.ok and session.report.rss_bytes == 1 << 20
    assert hosts.engine is not None and "instrument" not in hosts.engine.calls
    assert hosts.journal(Role.SOURCE) is None and hosts.journal(Role.DESTINATION) is None
    assert hosts.world.log == ["source run", "destination none"]


async def test_the_source_is_told_before_the_destination_tidies_up(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(FakeDestination, "tidy", lambda _: order.append("tidy"))
    send = DestinationSession._send

    async def noting(self: DestinationSession, message: m.AnyMessage) -> None:
        await send(self, message)
        order.append(type(message).__name__)

    monkeypatch.setattr(DestinationSession, "_send", noting)
    await hosts.migrate()
    await hosts.quiet()
    assert order[order.index("Running") :][:3] == ["Running", "tidy", "DestinationReport"]
    assert order.count("tidy") == 1


async def test_a_link_that_takes_no_message_does_not_keep_the_destination_from_tidying_up(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    tidied = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(FakeDestination, "tidy", lambda _: loop.call_soon_threadsafe(tidied.set))
    send = DestinationSession._send

    async def stuck(self: DestinationSession, message: m.AnyMessage) -> None:
        if isinstance(message, m.Running):
            await tidied.wait()
        await send(self, message)

    monkeypatch.setattr(DestinationSession, "_send", stuck)
    assert (await hosts.migrate()).outcome is Outcome.MIGRATED


async def test_what_another_agent_needs_to_resume_the_copy_is_durable_before_it_is(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves = [("/run", ".migrator-x", "s", "socket")]
    found = []

    def resume(self: FakeDestination) -> None:
        journal = hosts.journal(Role.DESTINATION)
        assert journal is not None and journal.state is Recorded.RUNNING
        found.append((journal.header.moves, journal.header.cgroup))
        self._world.set("destination", "run")

    monkeypatch.setattr(FakeDestination, "moves", property(lambda _: moves, lambda *_: None), raising=False)
    monkeypatch.setattr(FakeDestination, "resume", resume)
    await hosts.migrate()
    assert found == [(moves, "fake")]


@pytest.mark.parametrize("call", ["survey", "instrument", "round", "freeze", "final", "hold"])
async def test_a_source_that_fails_before_commit_lets_the_workload_run_on(hosts: Hosts, call: str) -> None:
    hosts.source.fail = {call: CheckpointFailed(f"{call} failed")}
    with pytest.raises(CheckpointFailed, match=f"{call} failed") as caught:
        await hosts.migrate()
    await hosts.quiet()
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.check() == ("run", "none")


@pytest.mark.parametrize("call", ["build", "hold"])
async def test_a_destination_that_cannot_build_says_why_and_the_workload_runs_on(hosts: Hosts, call: str) -> None:
    hosts.destination.fail = {call: RestartFailed("pid 7: no such thing here")}
    with pytest.raises(MigratorError, match="no such thing here") as caught:
        await hosts.migrate()
    await hosts.quiet()
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.check() == ("run", "none")


async def test_an_unexpected_exception_is_a_failure_like_any_other(hosts: Hosts) -> None:
    hosts.source.fail = {"final": ZeroDivisionError("oops")}
    with pytest.raises(MigrationAborted, match="ZeroDivisionError"):
        await hosts.migrate()
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")


async def test_a_copy_that_the_engine_cannot_resume_is_thawed_by_its_cgroup(hosts: Hosts) -> None:
    hosts.destination.fail = {"resume": RestartFailed("the engine forgot")}
    assert (await hosts.migrate()).outcome is Outcome.MIGRATED
    assert hosts.world.check() == ("none", "run")


@pytest.mark.parametrize("call", ["survey", "instrument", "round", "freeze", "final", "hold"])
async def test_cancelling_aborts_at_any_step_before_commit(hosts: Hosts, call: str) -> None:
    hosts.source.slow = {call: 0.1}
    task = asyncio.create_task(hosts.migrate())
    while hosts.engine is None or call not in hosts.engine.calls:
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")


async def test_cancelling_after_commit_waits_for_the_answer(hosts: Hosts) -> None:
    hosts.destination.slow = {"hold": 0.2}
    session = await hosts.session()
    task = asyncio.create_task(session.run())
    while session.state.value != "committed":
        await asyncio.sleep(0.001)
    task.cancel()
    assert (await task).outcome is Outcome.MIGRATED
    assert any(isinstance(event, model.Waiting) for event in hosts.events)
    assert hosts.world.check() == ("none", "run")


@pytest.mark.parametrize("call", ["round", "final"])
async def test_a_link_lost_before_commit_thaws(hosts: Hosts, call: str) -> None:
    hosts.source.slow = {call: 0.1}
    task = asyncio.create_task(hosts.migrate())
    while hosts.engine is None or call not in hosts.engine.calls:
        await asyncio.sleep(0.001)
    hosts.links[1].fail(TransportError("cable cut"))
    with pytest.raises(TransportError) as caught:
        await task
    await hosts.quiet()
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.check() == ("run", "none")


@pytest.fixture
def resume_on_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the network could not be prepared: then it may take long, and others are heard meanwhile."""
    never = property(lambda session: False, lambda session, value: None)
    monkeypatch.setattr(Arrival, "prepared", never, raising=False)


@pytest.mark.usefixtures("resume_on_thread")
async def test_a_link_lost_after_commit_is_made_again_and_the_answer_asked_for(hosts: Hosts) -> None:
    hosts.destination.slow = {"resume": 0.2}
    session = await hosts.session()
    task = asyncio.create_task(session.run())
    while session.state.value != "committed":
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.05)
    hosts.links[0].fail(TransportError("cable cut"))
    assert (await task).outcome is Outcome.MIGRATED
    assert hosts.world.check() == ("none", "run")
    assert len(hosts.servers) > 1


async def test_a_destination_gone_for_good_after_commit_leaves_the_copy_frozen_and_says_what_to_do(
    hosts: Hosts,
) -> None:
    hosts.destination.slow = {"hold": 0.2}
    session = await hosts.session(ask_for=0.3)
    task = asyncio.create_task(session.run())
    while session.state.value != "committed":
        await asyncio.sleep(0.001)
    hosts.reachable = False
    hosts.links[0].fail(TransportError("cable cut"))
    with pytest.raises(Undecided) as caught:
        await task
    assert caught.value.fate is Fate.FROZEN
    assert ID in caught.value.message and "--here" in caught.value.hint and "--away" in caught.value.hint
    assert hosts.world.state("source") == "held"
    journal = hosts.journal(Role.SOURCE)
    assert journal is not None and journal.state is Recorded.COMMITTING
    assert hosts.events[-1].result.outcome is Outcome.UNDECIDED  # type: ignore[union-attr]


async def test_a_destination_that_is_not_ready_in_time_is_given_up(hosts: Hosts) -> None:
    hosts.destination.slow = {"build": 0.5}
    with pytest.raises(MigrationAborted, match="was not ready within"):
        await hosts.migrate(freeze_limit=0.1)
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")


async def test_a_stop_that_gets_too_long_for_the_max_downtime_ends_before_commit(hosts: Hosts) -> None:
    hosts.destination.slow = {"build": 0.5}
    with pytest.raises(Overrun, match="over the max downtime of"):
        await hosts.migrate(max_downtime=0.05, thaw_overrun=True)
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")
    assert "destination resume" not in " ".join(hosts.world.log)
    later = prediction.load(hosts.path / "a", "b")
    assert later.seconds(Work(1, 1)) > prediction.Costs().seconds(Work(1, 1))  # the next time it knows better


async def test_what_comes_ready_too_late_is_not_told_to_run(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts.destination.slow = {"build": 0.1}
    monkeypatch.setattr("migrator.session.deadlines.Deadlines._watch", lambda *_: None)
    with pytest.raises(Overrun):
        await hosts.migrate(max_downtime=0.05, thaw_overrun=True)
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")


async def test_a_stop_over_the_max_downtime_that_goes_on_says_so(hosts: Hosts) -> None:
    hosts.destination.slow = {"build": 0.2}
    result = await hosts.migrate(max_downtime=0.05)
    await hosts.quiet()
    assert result.outcome is Outcome.MIGRATED
    assert any("is over the max downtime of 50.0 ms" in warning for warning in result.warnings)
    assert result.prediction_error == result.downtime - result.predicted_downtime > 0.1


async def test_a_max_downtime_that_cannot_be_met_ends_with_the_reason_at_the_timeout(hosts: Hosts) -> None:
    hosts.source.rounds = [2000]
    with pytest.raises(MigrationAborted, match="max downtime"):
        await hosts.migrate(max_downtime=0.0001, timeout=0.3)
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")
    assert "source stop" not in " ".join(hosts.world.log)


async def test_a_file_that_differs_is_refused_before_anything_is_done(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "other").write_text("other contents")
    hosts.source.files = [FileFact(str(tmp_path / "other"), 10, 0o100644, 1, "", False)]
    with pytest.raises(Refused, match="other: ") as caught:
        await hosts.migrate()
    await hosts.quiet()
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.log == ["source run", "destination none"]


async def test_a_file_that_was_deleted_since_the_survey_is_nothing_to_refuse_for(hosts: Hosts, tmp_path: Path) -> None:
    hosts.source.files = [FileFact(str(tmp_path / "gone"), 10, 0o100644, 1, "", False)]
    await hosts.migrate()
    await hosts.quiet()
    assert hosts.world.check() == ("none", "run")


async def test_a_pid_that_is_taken_is_refused_with_a_remedy(hosts: Hosts) -> None:
    hosts.source.wanted_pids = [os.getpid()]
    with pytest.raises(Refused, match=rf"pid {os.getpid()}: is taken on b .*container"):
        await hosts.migrate()


async def test_a_host_that_cannot_prepare_refuses(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(proposal: m.Propose) -> Prepared:
        raise Refused(["container web exists already"], hint="remove it")

    monkeypatch.setattr(Hosts, "taking", lambda self: replace(TAKING(self), prepare=refuse))
    with pytest.raises(Refused, match="container web exists already"):
        await hosts.migrate()


TAKING = Hosts.taking


async def test_a_migration_that_is_known_cannot_be_begun_again(hosts: Hosts) -> None:
    await hosts.migrate()
    with pytest.raises(MigrationAborted, match="already known"):
        await hosts.migrate()


async def test_a_peer_that_talks_nonsense_is_a_clean_abort(hosts: Hosts) -> None:
    hosts.source.slow = {"round": 0.2}
    task = asyncio.create_task(hosts.migrate())
    while hosts.engine is None or "round" not in hosts.engine.calls:
        await asyncio.sleep(0.001)
    await hosts.links[1].send(b"\xc1 nonsense")
    with pytest.raises(m.MessageError) as caught:
        await task
    await hosts.quiet()
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.check() == ("run", "none")


@pytest.mark.parametrize("asked", ["copy_files", "log"])
async def test_files_are_carried_along_with_what_changed_until_the_freeze(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    """All of them if that is wanted; the log of a container in any case."""
    data, root = tmp_path / "data", tmp_path / "root-of-b"
    data.write_text("before\n")
    status = data.stat()
    hosts.source.files = [FileFact(str(data), status.st_size, status.st_mode, status.st_mtime_ns, "", True)]
    freeze = FakeSource.freeze

    def write_and_freeze(self: FakeSource) -> None:
        with data.open("a") as file:
            file.write("after\n")
        freeze(self)

    monkeypatch.setattr(FakeSource, "freeze", write_and_freeze)
    monkeypatch.setattr(sync, "mapped_files", lambda pids: Mapped())  # the fake engine's pids are nobody's
    log = str(data) if asked == "log" else ""
    here = {"root_of": lambda proposal: str(root), "log_of": lambda proposal: log}
    monkeypatch.setattr(Hosts, "taking", lambda self: replace(TAKING(self), **here))
    await hosts.migrate(copy_files=asked == "copy_files", log=log)
    assert (root / str(data).lstrip("/")).read_text() == "before\nafter\n"
    assert hosts.world.check() == ("none", "run")
    assert model.Transferred(ID, "files", 7, 0) in hosts.events


async def test_no_file_but_the_log_of_a_container_comes_along_unasked(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("log", "data"):
        (tmp_path / name).write_text(name)
    root = tmp_path / "root-of-b"
    files = [tmp_path / "log", tmp_path / "data"]
    hosts.source.files = [
        FileFact(str(f), f.stat().st_size, f.stat().st_mode, f.stat().st_mtime_ns, "", False) for f in files
    ]
    here = {"root_of": lambda proposal: str(root), "log_of": lambda proposal: str(tmp_path / "log")}
    monkeypatch.setattr(Hosts, "taking", lambda self: replace(TAKING(self), **here))
    with pytest.raises(Refused) as caught:
        await hosts.migrate(log=str(tmp_path / "log"))
    assert len(caught.value.reasons) == 1 and str(tmp_path / "data") in caught.value.reasons[0]
    assert not root.exists()
    assert hosts.world.check() == ("run", "none")


@pytest.mark.root
@pytest.mark.parametrize("fails", [False, True], ids=["migrated", "aborted"])
async def test_a_tree_is_carried_along_with_what_changed_until_the_freeze(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    top, root = tmp_path / "data", tmp_path / "root-of-b"
    there = root / str(top).lstrip("/")
    there.mkdir(parents=True)
    top.mkdir()
    (there / "mine").write_text("mine")
    (top / "first").write_text("first")
    freeze = FakeSource.freeze

    def change_and_freeze(self: FakeSource) -> None:
        (top / "first").rename(top / "second")
        (top / "third").write_text("third")
        freeze(self)

    monkeypatch.setattr(FakeSource, "freeze", change_and_freeze)
    monkeypatch.setattr(sync, "mapped_files", lambda pids: Mapped())  # the fake engine's pids are nobody's
    monkeypatch.setattr(Hosts, "taking", lambda self: replace(TAKING(self), root_of=lambda proposal: str(root)))
    if fails:
        hosts.destination.fail = {"build": RestartFailed("no")}
    changes: dict[str, Any] = {"copy_files": True, "trees": (trees.SyncTree(str(top)),)}
    if fails:
        with pytest.raises(MigrationAborted):
            await hosts.migrate(**changes)
    else:
        await hosts.migrate(**changes)
    await hosts.quiet()
    assert hosts.world.check() == (("run", "none") if fails else ("none", "run"))
    notes = [event.text for event in hosts.events if isinstance(event, model.Noted)]
    assert f"1 (5 B) differ or are missing on b and will be copied: {top}/first" in notes[0]
    assert f"1 are on b only and will be set aside there: {top}/mine" in notes[1]
    found = {path.name: path.read_text() for path in there.iterdir()}
    left = [path for path in there.parent.iterdir() if path != there]
    if fails:
        assert found["mine"] == "mine" and not left
    else:
        assert found == {"second": "first", "third": "third"}
        assert [path.read_text() for path in left[0].glob("aside/*")] == ["mine"]


@pytest.mark.parametrize("left, more", [(300, 1), (20, 0), (9000, 0)])
async def test_where_it_is_worth_while_one_more_round_goes_just_before_the_freeze(
    hosts: Hosts, left: int, more: int
) -> None:
    """Nobody waits for it, and it is told when there is time again: with the last word, or after it."""
    hosts.source.rounds = [left]
    result = await hosts.migrate()
    rounds = [event.round for event in hosts.events if isinstance(event, model.RoundDone)]
    waited = [event for event in hosts.events if isinstance(event, model.RoundDone) and event.verdict == "freeze"]
    assert len(waited) == 1 and rounds == result.rounds
    assert len(rounds) - waited[0].round.number == more
    assert result.stream_bytes >= sum(r.bytes for r in rounds)


async def test_a_cold_migration_makes_no_rounds(hosts: Hosts) -> None:
    result = await hosts.migrate(cold=True)
    assert result.outcome is Outcome.MIGRATED and result.rounds == []
    assert hosts.engine is not None and "round" not in hosts.engine.calls


async def test_a_round_that_never_ends_is_given_up_after_the_timeout(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ROUND_GRACE", 0.1)
    hosts.source.slow = {"round": 3.0}
    with pytest.raises(MigrationAborted, match="in the middle of a round"):
        await hosts.migrate(timeout=1.0)
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")


async def test_a_destination_that_takes_nothing_is_given_up_before_anything_is_frozen(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "_STALLED", 0.2)
    monkeypatch.setattr(workload, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(Link, "in_flight", 4096)
    monkeypatch.setattr(workload.WorkloadThread, "standing", lambda self, number: None)
    with pytest.raises(MigrationAborted, match="has taken nothing for"):
        await hosts.migrate()
    await hosts.quiet()
    assert "source stop" not in " ".join(hosts.world.log)


async def test_a_destination_that_takes_all_and_builds_nothing_is_given_up_before_anything_is_frozen(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workload, "_STANDING_SECONDS", 0.2)
    monkeypatch.setattr(workload, "_LOOK_EVERY", 0.05)
    monkeypatch.setattr(workload.WorkloadThread, "standing", lambda self, number: None)
    with pytest.raises(MigrationAborted, match="has not built up round 1"):
        await hosts.migrate()
    await hosts.quiet()
    assert "source stop" not in " ".join(hosts.world.log)


@pytest.mark.usefixtures("resume_on_thread")
async def test_a_destination_that_is_silent_after_commit_is_asked_over_a_new_link(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deadlines, "ANSWER_SECONDS", 0.05)
    hosts.destination.slow = {"resume": 0.4}
    assert (await hosts.migrate()).outcome is Outcome.MIGRATED
    await hosts.quiet()
    assert len(hosts.servers) > 1
    assert hosts.world.check() == ("none", "run")
    journal = hosts.journal(Role.DESTINATION)
    assert journal is not None and journal.settled and journal.decision is Recorded.RUNNING


async def test_a_copy_that_cannot_be_held_after_it_was_promised_is_discarded_and_the_source_runs_on(
    hosts: Hosts,
) -> None:
    hosts.destination.slow = {"hold": 0.1}
    hosts.destination.fail = {"hold": RestartFailed("tid 7 ended")}
    with pytest.raises(MigrationAborted, match="tid 7 ended") as caught:
        await hosts.migrate()
    assert caught.value.fate is Fate.SOURCE
    await hosts.quiet()
    assert hosts.world.check() == ("run", "none")
    journal = hosts.journal(Role.DESTINATION)
    assert journal is not None and journal.decision is Recorded.DISCARDED and journal.settled


async def test_an_agent_that_is_stopped_discards_what_was_not_decided(hosts: Hosts) -> None:
    hosts.source.slow = {"round": 0.2}
    task = asyncio.create_task(hosts.migrate())
    while hosts.engine is None or "round" not in hosts.engine.calls:
        await asyncio.sleep(0.001)
    hosts.servers[0].cancel()
    with pytest.raises(MigratorError, match="being stopped") as caught:
        await task
    assert caught.value.fate is Fate.SOURCE
    assert hosts.world.check() == ("run", "none")
    journal = hosts.journal(Role.DESTINATION)
    assert journal is not None and journal.decision is Recorded.DISCARDED and journal.settled
