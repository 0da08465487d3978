"""A wait with a limit may become longer by a migration, and never shorter."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.user.dump import restart_blocks
from migrator.engine.user.dump.restart_blocks import RestartBlocks

_TID, _CPU = 4000, 0
_MS = 1_000_000


@dataclass
class Machine:
    """One processor, whose scheduler's clock stands still while the hypervisor takes the processor away."""

    now: int = 10**12
    stolen: int = 0
    ran: int = 0  # of the task, by the scheduler's clock

    def pass_by(self, ns: int, stolen: int = 0) -> None:
        self.now += ns + stolen
        self.stolen += stolen

    def last_ran(self, pid: int, tid: int) -> tuple[int, int]:
        return (self.ran if tid == _TID else self.now - self.stolen), 1


def watched(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> RestartBlocks:
    monkeypatch.setattr(restart_blocks, "_last_ran", machine.last_ran)
    monkeypatch.setattr(restart_blocks.time, "monotonic_ns", lambda: machine.now)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {_CPU})
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cpus: None)
    monkeypatch.setattr(restart_blocks.procfs, "stat", lambda pid, tid: [str(_CPU)] * 52)
    line = f"{restart_blocks.arch.NR['poll']} 0x1 0x1 0xfa 0 0 0 0x7000 0x8000"
    monkeypatch.setattr(restart_blocks.procfs, "read_text", lambda path: line)
    return RestartBlocks()


@given(st.lists(st.tuples(st.integers(0, 900 * _MS), st.integers(0, 20 * _MS), st.booleans()), max_size=20))
def test_a_wait_is_never_thought_to_have_begun_before_it_did(steps: list[tuple[int, int, bool]]) -> None:
    machine = Machine()
    with pytest.MonkeyPatch.context() as monkeypatch:
        blocks = watched(machine, monkeypatch)
        began, machine.ran = machine.now, machine.now - machine.stolen
        for passed, stolen, runs in steps:
            machine.pass_by(passed, stolen)
            if runs:
                began, machine.ran = machine.now, machine.now - machine.stolen
            blocks._seen.clear()
            blocks.observe(_TID, _TID)
            assert blocks._seen[_TID].began >= began


def test_what_was_taken_away_since_the_clocks_were_compared_is_not_taken_from_the_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine()
    blocks = watched(machine, monkeypatch)
    machine.ran = machine.now - machine.stolen
    blocks.observe(_TID, _TID)
    machine.pass_by(300 * _MS, stolen=4 * _MS)
    began, machine.ran = machine.now, machine.now - machine.stolen
    machine.pass_by(10 * _MS)
    blocks._seen.clear()
    blocks.observe(_TID, _TID)
    assert blocks._seen[_TID].began == began
