"""How far the clock of a stopped tree has run on."""

from __future__ import annotations

import time

import pytest
from image_samples import header

from migrator.engine.user.restore import clocks
from migrator.engine.user.restore.clocks import Offsets, since_stop

SECOND = 10**9


@pytest.fixture(autouse=True)
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "monotonic_ns", lambda: 500 * SECOND)
    monkeypatch.setattr(clocks, "clock_offsets", lambda pid: (0, 0))


@pytest.mark.parametrize(
    ("monotonic", "offsets", "passed"),
    [
        (496 * SECOND, None, 1 * SECOND),  # a host whose clock is the source's: 4 s since the header, 3 until the stop
        (40 * SECOND, Offsets(-456 * SECOND, 0), 1 * SECOND),  # one that booted earlier
        (9000 * SECOND, Offsets(8504 * SECOND, 0), 1 * SECOND),  # one that booted later
        (499 * SECOND, None, 0),  # clocks that differ a little never make a wait longer
    ],
)
def test_a_wait_is_shortened_by_what_its_own_clock_has_run_on(
    monotonic: int, offsets: Offsets | None, passed: int
) -> None:
    saved = header()
    saved.monotonic = monotonic
    assert since_stop(saved, saved.time + 3 * SECOND, offsets) == passed


def test_a_tree_whose_clock_stood_still_has_waits_as_they_were() -> None:
    assert since_stop(header(), 0, None) == 0
