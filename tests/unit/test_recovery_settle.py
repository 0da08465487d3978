"""Settling: who is asked, who is thawed, who is killed, and what is left to an operator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from migrator.errors import Fate, TransportError, UsageError
from migrator.linux import procfs
from migrator.protocol.messages import Discarded, Running
from migrator.protocol.states import Recorded
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, JournalHeader, Role, boot_id
from migrator.recovery.settle import Settlement, answer, override, settle_all
from migrator.testing.fakeengine import FakeGroup, FakeWorld

ID = "settle-0001"


class Host:
    """One host with a held copy of a workload and a journal."""

    def __init__(self, path: Path, role: Role) -> None:
        self.path, self.role = path, role
        (path / "world").mkdir()
        self.world = FakeWorld(path / "world")
        self.world.set(role.value, "held")
        self.asked: list[str] = []
        self.taken_down: list[str] = []
        self.reopened: list[str] = []
        self.answer: Recorded | None = None
        self.tools = Tools(self.world.groups(role.value), self)

    def take_locks(self, facts: JournalHeader, seconds: float) -> list[str]:
        return []

    def reopen(self, facts: JournalHeader) -> None:
        self.reopened.append(facts.container)

    def remove(self, facts: JournalHeader) -> None:
        self.taken_down.append(facts.container)

    def journal(
        self,
        *states: Recorded,
        boot: str = "",
        pids: list[tuple[int, int]] | None = None,
        origins: list[tuple[int, str]] | None = None,
    ) -> None:
        facts = JournalHeader(
            migration=ID,
            role=self.role,
            peer="root@b",
            cgroup="fake",
            container="web",
            boot_id=boot or boot_id(),
            pids=pids or [],
            origins=origins or [],
        )
        with Journal.create(self.path / "journal", facts) as journal:
            for state in states:
                journal.record(state)

    async def ask(self, facts: JournalHeader) -> Recorded:
        self.asked.append(facts.peer)
        if self.answer is None:
            raise TransportError("no route to host")
        return self.answer

    async def settle(self) -> list[Settlement]:
        return await settle_all(self.path / "journal", self.tools, self.ask)

    @property
    def copy(self) -> str:
        return self.world.state(self.role.value)


@pytest.fixture
def source(tmp_path: Path) -> Host:
    return Host(tmp_path, Role.SOURCE)


@pytest.fixture
def destination(tmp_path: Path) -> Host:
    return Host(tmp_path, Role.DESTINATION)


async def test_a_source_before_commit_is_thawed_without_asking(source: Host) -> None:
    source.journal()
    (one,) = await source.settle()
    assert (one.fate, source.copy, source.asked) == (Fate.SOURCE, "run", [])
    assert source.reopened == ["web"]


@pytest.mark.parametrize(
    ("answer", "fate", "copy"),
    [(Recorded.RUNNING, Fate.DESTINATION, "none"), (Recorded.DISCARDED, Fate.SOURCE, "run")],
)
async def test_a_source_that_may_have_committed_asks(source: Host, answer: Recorded, fate: Fate, copy: str) -> None:
    source.journal(Recorded.COMMITTING)
    source.answer = answer
    (one,) = await source.settle()
    assert (one.fate, source.copy, source.asked) == (fate, copy, ["root@b"])
    assert source.taken_down == (["web"] if copy == "none" else [])
    assert await source.settle() == []


async def test_a_subtree_goes_back_to_the_cgroups_it_came_from(source: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[str, Mapping[int, str]]] = []
    monkeypatch.setattr(FakeGroup, "move_back", lambda self, origins: sent.append((source.copy, origins)))
    source.journal(origins=[(7, "/sys/fs/cgroup/a"), (8, "/sys/fs/cgroup/b")])
    await source.settle()
    assert sent == [("run", {7: "/sys/fs/cgroup/a", 8: "/sys/fs/cgroup/b"})]


async def test_a_subtree_that_never_came_to_its_cgroup_is_not_missed(
    source: Host, caplog: pytest.LogCaptureFixture
) -> None:
    source.world.set("source", "none")  # of the cgroup
    source.journal(pids=[(os.getpid(), procfs.start_time(os.getpid()))], origins=[(os.getpid(), "/sys/fs/cgroup")])
    (one,) = await source.settle()
    assert one.fate is Fate.SOURCE
    assert "gone" not in caplog.text


async def test_a_source_whose_peer_is_silent_stays_frozen_until_it_is_not(source: Host) -> None:
    source.journal(Recorded.COMMITTING)
    for _ in range(3):
        (one,) = await source.settle()
        assert one.fate is Fate.FROZEN and ID in one.detail and "container web" in one.detail
        assert source.copy == "held"
    source.answer = Recorded.DISCARDED
    await source.settle()
    assert source.copy == "run"


@pytest.mark.parametrize(("here", "copy"), [(True, "run"), (False, "none")])
async def test_an_operator_decides_where_nobody_else_can(source: Host, here: bool, copy: str) -> None:
    source.journal(Recorded.COMMITTING)
    fate = override(source.path / "journal", ID, here=here, tools=source.tools)
    assert (fate is Fate.SOURCE) == here
    assert source.copy == copy
    assert await source.settle() == []


@pytest.mark.parametrize("states", [(), (Recorded.HERE,), (Recorded.AWAY, Recorded.CLOSED)])
def test_an_operator_cannot_decide_what_is_decided(source: Host, states: tuple[Recorded, ...]) -> None:
    source.journal(*states)
    with pytest.raises(UsageError, match="awaits no decision"):
        override(source.path / "journal", ID, here=True, tools=source.tools)
    with pytest.raises(UsageError, match="never the source"):
        override(source.path / "journal", "other-0001", here=True, tools=source.tools)


async def test_a_pid_that_means_another_task_now_is_not_touched(source: Host) -> None:
    source.journal(Recorded.COMMITTING, Recorded.AWAY, pids=[(1, 999_999_999)])
    (one,) = await source.settle()
    assert one.fate is Fate.DESTINATION
    assert source.copy == "held"


async def test_after_a_reboot_there_is_nothing_to_thaw_or_kill(source: Host) -> None:
    source.journal(Recorded.COMMITTING, boot="another boot")
    source.answer = Recorded.RUNNING
    (one,) = await source.settle()
    assert one.fate is Fate.DESTINATION
    assert source.copy == "held"  # not ours: it came after the reboot


@pytest.mark.parametrize(
    ("states", "copy"),
    [
        ((), "none"),
        ((Recorded.DISCARDED,), "none"),
        ((Recorded.RUNNING,), "run"),
        ((Recorded.RUNNING, Recorded.DISCARDED), "run"),
        ((Recorded.DISCARDED, Recorded.RUNNING), "none"),
        ((Recorded.RUNNING, Recorded.RESUMED), "held"),  # somebody else has frozen it since
    ],
)
async def test_a_destination_settles_by_its_first_decision(
    destination: Host, states: tuple[Recorded, ...], copy: str
) -> None:
    destination.journal(*states)
    await destination.settle()
    assert destination.copy == copy
    assert await destination.settle() == []


@pytest.mark.parametrize(
    ("states", "kind"),
    [((), Discarded), ((Recorded.RUNNING,), Running), ((Recorded.RUNNING, Recorded.RESUMED), Running)],
)
def test_an_answer_is_decided_and_durable_before_it_is_given(
    destination: Host, states: tuple[Recorded, ...], kind: type
) -> None:
    destination.journal(*states)
    assert isinstance(answer(destination.path / "journal", ID, destination.tools), kind)
    journal = Journal.find(destination.path / "journal", ID, Role.DESTINATION)
    assert journal is not None and journal.settled
    assert journal.decision is (Recorded.RUNNING if kind is Running else Recorded.DISCARDED)
    assert isinstance(answer(destination.path / "journal", ID, destination.tools), kind)


def test_a_migration_that_nobody_has_heard_of_is_discarded_for_ever(destination: Host) -> None:
    assert isinstance(answer(destination.path / "journal", "never-0001", destination.tools), Discarded)
    journal = Journal.find(destination.path / "journal", "never-0001", Role.DESTINATION)
    assert journal is not None and journal.decide(Recorded.RUNNING) is Recorded.DISCARDED
    assert destination.copy == "held"


def test_a_living_agent_is_left_to_act_upon_what_was_answered_for_it(destination: Host) -> None:
    facts = JournalHeader(migration=ID, role=Role.DESTINATION, cgroup="fake")
    with Journal.create(destination.path / "journal", facts) as owner:
        assert isinstance(answer(destination.path / "journal", ID, destination.tools), Discarded)
        assert destination.copy == "held"  # killing it is the owner's business
        assert owner.decide(Recorded.RUNNING) is Recorded.DISCARDED


async def test_one_that_cannot_be_settled_does_not_keep_the_others(
    source: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.journal()
    other = JournalHeader(migration="aaaa-0001", role=Role.SOURCE, cgroup="fake")
    Journal.create(source.path / "journal", other).close()

    calls = iter([OSError(5, "Input/output error")])

    def broken(facts: JournalHeader) -> None:
        if (error := next(calls, None)) is not None:
            raise error

    monkeypatch.setattr(source, "reopen", broken)
    first, second = await source.settle()
    assert (first.fate, second.fate) == (Fate.FROZEN, Fate.SOURCE)
    assert "Input/output error" in first.detail
