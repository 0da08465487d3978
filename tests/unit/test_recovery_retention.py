"""Journals of many migrations: how many of one peer, and who may ask about them."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.protocol.messages import Discarded
from migrator.protocol.states import Recorded
from migrator.recovery import retention
from migrator.recovery.hooks import Tools
from migrator.recovery.journal import Journal, JournalError, JournalHeader, Role
from migrator.recovery.retention import make_room
from migrator.recovery.settle import answer

MINE, OTHER = "SHA256:mine", "SHA256:other"
ID = "m-00000001"


def begin(directory: Path, migration: str, key: str, state: Recorded | None = None) -> None:
    header = JournalHeader(migration=migration, role=Role.DESTINATION, key=key)
    with Journal.create(directory, header) as journal:
        if state is not None:
            journal.decide(Recorded.DISCARDED)
            journal.record(state)


def ids(directory: Path) -> list[str]:
    return sorted(path.name.split(".")[0] for path in directory.glob("*.journal"))


def test_a_peer_that_asks_about_what_was_never_begun_fills_no_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MOST_OF_ONE_PEER", 10)
    for number in range(50):
        assert isinstance(answer(tmp_path, f"asked-{number:08}", Tools(), MINE), Discarded)
    left = ids(tmp_path)
    assert len(left) <= 10
    assert left[-1] == "asked-00000049"  # the oldest have gone


def test_journals_of_other_peers_and_what_is_not_closed_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MOST_OF_ONE_PEER", 4)
    for number in range(3):
        begin(tmp_path, f"other-{number:08}", OTHER, Recorded.CLOSED)
    begin(tmp_path, "mine-open0001", MINE)
    begin(tmp_path, "mine-resumed1", MINE, Recorded.RESUMED)
    for number in range(20):
        assert isinstance(answer(tmp_path, f"asked-{number:08}", Tools(), MINE), Discarded)
    left = ids(tmp_path)
    assert [name for name in left if not name.startswith("asked")] == [
        "mine-open0001",
        "mine-resumed1",
        "other-00000000",
        "other-00000001",
        "other-00000002",
    ]
    assert len([name for name in left if name.startswith("asked")]) <= 2


def test_a_peer_with_too_much_that_is_not_settled_gets_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "MOST_OF_ONE_PEER", 3)
    for number in range(3):
        begin(tmp_path, f"mine-{number:08}", MINE)
    with pytest.raises(JournalError, match="3 migrations of this peer are not settled"):
        make_room(tmp_path, MINE)
    make_room(tmp_path, OTHER)


@pytest.mark.parametrize(
    ("begun", "asks", "answered"), [(MINE, MINE, True), (MINE, OTHER, False), ("", OTHER, False), (MINE, "", True)]
)
def test_only_the_peer_that_a_migration_belongs_to_is_answered(
    tmp_path: Path, begun: str, asks: str, answered: bool
) -> None:
    begin(tmp_path, ID, begun)
    if answered:
        assert isinstance(answer(tmp_path, ID, Tools(), asks), Discarded)
    else:
        with pytest.raises(JournalError, match="was not begun here with the key that asks"):
            answer(tmp_path, ID, Tools(), asks)
    with Journal.open(tmp_path / f"{ID}.destination.journal") as journal:
        assert journal.decision is (Recorded.DISCARDED if answered else None)
