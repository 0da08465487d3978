"""A journal survives every cut, and its first decision wins whoever writes it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import UsageError
from migrator.protocol.states import Recorded
from migrator.recovery.journal import (
    Journal,
    JournalError,
    JournalHeader,
    JournalRecord,
    Role,
    attended,
    decode_lines,
    encode_line,
    unattended,
)
from migrator.recovery.retention import forget_old

FACTS = JournalHeader(
    migration="web-0001",
    role=Role.DESTINATION,
    peer="root@a",
    pids=[(7, 1234)],
    cgroup="/sys/fs/cgroup/unified/migrator/web",
    container="web",
)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal.create(tmp_path, FACTS) as journal:
        yield journal


def test_what_was_recorded_is_there_after_a_restart(journal: Journal) -> None:
    journal.record(Recorded.COMMITTING, reason="final dump under way")
    with Journal.open(journal.path) as again:
        assert again.header == FACTS
        assert again.state is Recorded.COMMITTING
        assert again.reason == "final dump under way"
        assert not again.settled


def test_later_facts_replace_earlier_ones(journal: Journal) -> None:
    journal.record(Recorded.COMMITTING, header=JournalHeader(migration="web-0001", role=Role.SOURCE, pids=[(8, 9)]))
    assert Journal.open(journal.path).header.pids == [(8, 9)]


def test_the_first_decision_wins_across_two_agents(journal: Journal) -> None:
    with Journal.open(journal.path) as other:
        assert other.decide(Recorded.DISCARDED, reason="asked over a new link") is Recorded.DISCARDED
        assert journal.decide(Recorded.RUNNING) is Recorded.DISCARDED
        assert journal.state is Recorded.DISCARDED


def test_of_two_decisions_written_at_the_same_time_the_first_counts_for_both(journal: Journal) -> None:
    with Journal.open(journal.path) as other:
        # Both have looked before either has written.
        journal.record(Recorded.RUNNING)
        other.record(Recorded.DISCARDED)
        journal.reload()
        other.reload()
        assert journal.decision is other.decision is Recorded.RUNNING
        assert other.state is Recorded.RUNNING


def test_progress_after_a_decision_is_the_state_but_not_the_decision(journal: Journal) -> None:
    journal.decide(Recorded.RUNNING)
    journal.record(Recorded.RESUMED)
    assert (journal.state, journal.decision) == (Recorded.RESUMED, Recorded.RUNNING)
    assert journal.settled


def test_a_migration_known_here_cannot_be_begun_again(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path, FACTS)


WHOLE = b"".join(
    b"\n" + encode_line(JournalRecord(state=state, at=1.0, header=FACTS if state is Recorded.OPEN else None))
    for state in (Recorded.OPEN, Recorded.RUNNING, Recorded.CLOSED)
)


@pytest.mark.parametrize("cut", range(len(WHOLE)))
def test_a_torn_tail_was_never_written_and_does_not_swallow_what_follows(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "web-0001.destination.journal"
    path.write_bytes(WHOLE[:cut])
    with Journal.open(path) as journal:
        before = journal.state
        assert before in (Recorded.OPEN, Recorded.RUNNING, Recorded.CLOSED)
        journal.record(Recorded.CLOSED)
    with Journal.open(path) as journal:
        assert journal.state is Recorded.CLOSED


@given(at=st.integers(0, len(WHOLE) - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_what_a_record_says(at: int, bit: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[at] ^= 1 << bit
    good = list(decode_lines(WHOLE))
    assert all(record in good for record in decode_lines(bytes(damaged)))


@given(st.binary(max_size=200))
def test_garbage_is_an_empty_journal(data: bytes) -> None:
    assert list(decode_lines(data)) == []


def test_only_journals_without_a_living_owner_are_unattended(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from migrator.recovery.journal import *\n"
        "journal = Journal.create(Path(sys.argv[1]), JournalHeader(migration='web-0001', role=Role.SOURCE))\n"
        "print('there', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, cwd=os.getcwd()
    ) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert list(unattended(tmp_path)) == []
        owner.kill()
    (found,) = unattended(tmp_path)
    with found:
        assert found.header.migration == "web-0001"


def test_settled_journals_are_left_alone_and_forgotten_after_a_week(journal: Journal, tmp_path: Path) -> None:
    journal.decide(Recorded.DISCARDED)
    journal.record(Recorded.CLOSED)
    journal.close()
    assert list(unattended(tmp_path)) == []
    assert forget_old(tmp_path, now=time.time() + 86400) == 0
    assert forget_old(tmp_path, now=time.time() + 8 * 86400) == 1
    assert Journal.find(tmp_path, "web-0001", Role.DESTINATION) is None


def test_an_unsettled_journal_is_never_forgotten(journal: Journal, tmp_path: Path) -> None:
    journal.close()
    assert forget_old(tmp_path, now=time.time() + 1e9) == 0


@pytest.mark.parametrize("name", ["", "short", "../../etc/passwd", "a/b-000000", ".hidden-0000", "x" * 65])
def test_an_id_that_is_no_file_name_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Journal.create(tmp_path, JournalHeader(migration=name, role=Role.SOURCE))


def test_a_record_that_does_not_reach_the_disk_is_an_error(tmp_path: Path) -> None:
    journal = Journal(Path("/dev/full"), os.open("/dev/full", os.O_RDWR))
    with pytest.raises(JournalError), journal:
        journal.record(Recorded.COMMITTING)


def test_a_journal_that_cannot_be_created_says_where_to_put_it() -> None:
    with pytest.raises(JournalError) as caught:
        Journal.create(Path("/proc/nowhere"), FACTS)
    assert "MIGRATOR_JOURNAL_DIR" in caught.value.hint


def test_what_a_living_process_attends_to_is_told_from_what_is_open(tmp_path: Path) -> None:
    with Journal.create(tmp_path, JournalHeader(migration="m-12345678", role=Role.SOURCE)) as held:
        assert attended(tmp_path) == ["m-12345678"]
        assert list(unattended(tmp_path)) == []
        held.record(Recorded.CLOSED)
        assert attended(tmp_path) == []
    with Journal.create(tmp_path, JournalHeader(migration="m-87654321", role=Role.SOURCE)):
        pass
    assert attended(tmp_path) == []


def test_a_journal_is_for_root_alone_whatever_the_umask_is(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Journal.create(tmp_path / "made", FACTS).close()
    finally:
        os.umask(before)
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o700
    (path,) = (tmp_path / "made").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
