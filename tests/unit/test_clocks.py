"""How far the clock of a stopped tree has run on."""

from __future__ import annotations

import os
import time

import pytest
from image_samples import header

from migrator.engine import clocks
from migrator.engine.clocks import Offsets, catch_up, offsets, since_stop
from migrator.errors import RestartFailed

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
        (499 * SECOND, None, -2 * SECOND),  # one that is behind
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


def test_a_clock_that_is_a_little_behind_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    saved = header()
    saved.monotonic = 500 * SECOND - 3 * SECOND + 30_000_000
    catch_up(saved, saved.time + 3 * SECOND, None)
    assert slept == [0.03]
    saved.monotonic -= 40_000_000
    catch_up(saved, saved.time + 3 * SECOND, None)
    assert slept == [0.03]


def test_a_clock_that_is_far_behind_is_refused() -> None:
    saved = header()
    saved.monotonic = 499 * SECOND
    with pytest.raises(RestartFailed, match=r"would go back by 2\.000 s"):
        catch_up(saved, saved.time + 3 * SECOND, None)


class Stream:
    """A pipe: what is read from it may still run elsewhere."""

    def __init__(self) -> None:
        self.fd, self._end = os.pipe()

    def close(self) -> None:
        os.close(self.fd)
        os.close(self._end)


@pytest.mark.parametrize(
    ("ahead", "namespace"),
    [(40_000_000, False), (60_000_000, True), (0, False), (-500_000, False), (-2_000_000, True), (-SECOND, True)],
)
def test_a_host_whose_clock_is_behind_needs_a_time_namespace(
    ahead: int, namespace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = header()
    saved.monotonic = saved.boottime = 500 * SECOND - ahead
    monkeypatch.setattr(time, "time_ns", lambda: saved.time)
    monkeypatch.setattr(time, "clock_gettime_ns", lambda clock: 500 * SECOND)
    stream = Stream()
    found = offsets(saved, stream)  # type: ignore[arg-type]
    stream.close()
    assert (found is not None) == namespace
    if found is not None:
        assert found == Offsets(-ahead, -ahead)
