"""The stop rule: within the max downtime, no longer than it helps, never past the timeout."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.engine.base import Round
from migrator.session.convergence import (
    HOPELESS_ROUNDS,
    HOPELESS_SECONDS,
    MAX_ROUNDS,
    Conditions,
    NextStep,
    decide,
    least_throughput,
    measured_throughput,
    predicted_downtime,
    residual_pages,
)

MS = 1_000_000
LINK = Conditions(throughput=400e6, rtt=0.0002)


def rounds(*sizes: tuple[int, float], remaining: int = -1) -> list[Round]:
    """Rounds of (pages, milliseconds)."""
    made, now = [], 0
    for number, (pages, ms) in enumerate(sizes, 1):
        end = now + int(ms * MS)
        made.append(Round(number, pages, 0, pages * 4100, now, end, 0.0, remaining))
        now = end
    return made


def steady(rate: float, throughput: float, total: int, count: int) -> list[Round]:
    """Rounds of a workload of `total` pages that dirties `rate` pages/s; the link takes `throughput`."""
    made, now, pages = [], 0.0, float(total)
    for number in range(1, count + 1):
        seconds = max(pages / throughput, 0.0005)
        made.append(Round(number, int(pages), 0, int(pages) * 4100, int(now * 1e9), int((now + seconds) * 1e9), rate))
        now += seconds
        pages = min(rate * seconds, total)
    return made


def test_nothing_is_known_after_one_round_so_everything_may_be_dirty() -> None:
    assert residual_pages(rounds((1000, 10))) == 1000
    assert decide(rounds((100_000, 1000)), LINK).verdict is NextStep.CONTINUE


def test_the_residual_follows_from_the_last_two_rounds() -> None:
    assert residual_pages(rounds((100_000, 1000), (10_000, 100))) == 1000


def test_an_engine_that_knows_what_is_left_is_believed() -> None:
    assert residual_pages(rounds((100_000, 1000), (10_000, 100), remaining=7)) == 7


def test_the_prediction_is_the_sum_of_its_parts() -> None:
    conditions = Conditions(throughput=4096e3, rtt=0.01, standing=0.008)
    assert predicted_downtime(rounds((10, 1), remaining=100), conditions) == pytest.approx(0.003 + 0.1 + 0.005 + 0.015)


def test_it_freezes_as_soon_as_it_fits_the_max_downtime() -> None:
    conditions = Conditions(throughput=400e6, rtt=0.0002, max_downtime=0.020)
    history = steady(rate=12_000, throughput=100_000, total=262_144, count=12)
    verdicts = [decide(history[:n], conditions).verdict for n in range(1, 12)]
    first = verdicts.index(NextStep.FREEZE)
    assert set(verdicts[:first]) == {NextStep.CONTINUE}
    assert decide(history[: first + 1], conditions).predicted_downtime <= 0.020


def test_without_a_max_downtime_it_goes_on_as_long_as_that_helps() -> None:
    history = steady(rate=12_000, throughput=100_000, total=262_144, count=20)
    for n in range(1, 20):
        decision = decide(history[:n], LINK)
        if decision.verdict is NextStep.FREEZE:
            break
    assert 3 <= n <= 8
    assert decision.predicted_downtime < 0.006


def test_a_workload_that_dirties_faster_than_the_link_is_frozen_when_rounds_no_longer_shrink() -> None:
    history = steady(rate=500_000, throughput=100_000, total=262_144, count=10)
    first = next(n for n in range(1, 11) if decide(history[:n], LINK).verdict is NextStep.FREEZE)
    assert first <= 5
    assert "would not leave less" in decide(history[:first], LINK).reason


def test_with_a_max_downtime_such_a_workload_is_given_up_at_the_timeout_with_the_reason() -> None:
    history = steady(rate=500_000, throughput=100_000, total=262_144, count=6)
    within = Conditions(throughput=400e6, rtt=0.0, max_downtime=0.01, elapsed=59, timeout=60)
    assert decide(history, within).verdict is NextStep.CONTINUE
    late = Conditions(throughput=400e6, rtt=0.0, max_downtime=0.01, elapsed=60, timeout=60)
    decision = decide(history, late)
    assert decision.verdict is NextStep.GIVE_UP
    assert "2048 MB/s" in decision.reason and "400 MB/s" in decision.reason


def test_a_max_downtime_that_no_rounds_can_meet_says_so() -> None:
    late = Conditions(throughput=400e6, rtt=0.1, max_downtime=0.05, elapsed=60, timeout=60)
    assert "round trips alone" in decide(rounds((10, 1), (1, 1)), late).reason


def test_what_no_round_can_shorten_is_given_up_soon_and_not_at_the_timeout() -> None:
    idle = rounds((1000, 10), (3, 1), (3, 1))
    after = Conditions(throughput=400e6, rtt=0.0, standing=0.06, max_downtime=0.05, elapsed=5)
    assert decide(idle, dataclasses.replace(after, elapsed=4.9)).verdict is NextStep.CONTINUE
    assert decide(idle[:2], after).verdict is NextStep.CONTINUE
    assert decide(idle, after).verdict is NextStep.GIVE_UP
    assert "alone take 60.0 ms" in decide(idle, after).reason
    assert decide(idle, dataclasses.replace(after, max_downtime=0.06)).verdict is NextStep.CONTINUE  # pages remain


def test_a_few_pages_of_slow_rounds_are_no_slow_link() -> None:
    few = rounds((40, 4), (3, 8), (3, 8))
    assert measured_throughput(few) == 0.0
    assert least_throughput(few) == pytest.approx(41e6)
    assert least_throughput([]) == 0.0


def test_an_idle_workload_is_frozen_after_the_second_round() -> None:
    assert decide(rounds((262_144, 2600), (3, 1)), LINK).verdict is NextStep.FREEZE


def test_the_throughput_is_measured_on_rounds_long_enough_to_tell() -> None:
    assert measured_throughput(rounds((3, 1))) == 0.0
    assert measured_throughput(rounds((10_000, 100), (3, 50))) == pytest.approx(410e6)


def test_the_time_to_look_through_many_mappings_is_no_slow_link() -> None:
    looked = rounds((10_000, 650), (500, 35), (500, 35), (500, 35))
    assert measured_throughput(looked, 0.025) == pytest.approx(205e6)
    assert measured_throughput(looked, 1.0) == pytest.approx(4 * measured_throughput(looked))  # never out of nothing


@given(
    sizes=st.lists(st.tuples(st.integers(0, 10**6), st.floats(0, 1e5)), min_size=1, max_size=40),
    throughput=st.floats(0, 1e10),
    rtt=st.floats(0, 2),
    max_downtime=st.none() | st.floats(0, 10),
    elapsed=st.floats(0, 1000),
)
def test_it_always_ends_by_the_timeout_and_keeps_to_the_max_downtime(
    sizes: list[tuple[int, float]], throughput: float, rtt: float, max_downtime: float | None, elapsed: float
) -> None:
    conditions = Conditions(throughput=throughput, rtt=rtt, max_downtime=max_downtime, elapsed=elapsed, timeout=500)
    decision = decide(rounds(*sizes), conditions)
    assert decision.reason and not math.isnan(decision.predicted_downtime)
    if decision.verdict is NextStep.CONTINUE:
        assert elapsed < 500
        assert max_downtime is not None or len(sizes) < MAX_ROUNDS
    if decision.verdict is NextStep.FREEZE and max_downtime is not None:
        assert decision.predicted_downtime <= max_downtime
    if decision.verdict is NextStep.GIVE_UP:
        assert max_downtime is not None
        hopeless = conditions.standing + 1.5 * rtt > max_downtime and elapsed >= HOPELESS_SECONDS
        assert elapsed >= 500 or (hopeless and len(sizes) >= HOPELESS_ROUNDS)
