"""What moves that have ended teach about those to come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.cost import predict
from policies.experience import BYTES, DOWNTIME, NONE, Ended, Experience, Factors
from policies.model import Host, Resources, Workload

MIB = float(1 << 20)
HOST = Host(name="a", capacity=Resources(4.0, 1e10, 1e8))


def ended(name: str, bytes: float, downtime: float, used: Factors = NONE) -> Ended:
    """Of a workload for which 100 bytes and 1 s were predicted without any experience."""
    return Ended(
        workload=name,
        predicted_bytes=100.0 * used.bytes,
        predicted_downtime=1.0 * used.downtime,
        bytes=bytes,
        downtime=downtime,
        used=used,
    )


def test_the_second_move_is_predicted_by_what_the_first_one_sent() -> None:
    known = Experience()
    first = Workload(name="w", host="a", used=Resources(memory=100 * MIB))
    plain = predict(first, HOST, HOST)
    known.learn(
        Ended(
            workload="w",
            predicted_bytes=plain.bytes,
            predicted_downtime=plain.downtime,
            bytes=2 * MIB,
            downtime=2 * plain.downtime,
        )
    )
    second = Workload(name="w", host="a", used=Resources(memory=100 * MIB), factors=known.factors("w"))
    cost = predict(second, HOST, HOST)
    assert plain.bytes >= 100 * MIB
    assert cost.bytes < plain.bytes and cost.downtime == pytest.approx(2 * plain.downtime)
    assert cost.seconds < plain.seconds and cost.factors == second.factors
    for _ in range(8):
        factors = known.factors("w")
        known.learn(ended("w", 2.0, 2.0, factors))
    assert known.factors("w").bytes == pytest.approx(0.02, rel=0.05)


def test_a_worse_outcome_is_believed_at_once_and_a_better_one_by_and_by() -> None:
    known = Experience()
    known.learn(ended("w", 100.0, 1.0))
    known.learn(ended("w", 400.0, 3.0))
    assert known.factors("w") == Factors(pytest.approx(4.0), pytest.approx(3.0))  # type: ignore[arg-type]
    known.learn(ended("w", 100.0, 3.0))
    assert known.factors("w").bytes == pytest.approx(2.0)  # half of the way from 4 to 1


def test_one_that_was_never_moved_is_like_the_others_in_the_end() -> None:
    known = Experience()
    assert known.factors("new") == NONE
    for number in range(40):
        known.learn(ended(f"w{number}", 10.0, 1.0))
    assert known.factors("new").bytes == pytest.approx(0.1, rel=0.1)
    assert known.factors("w3").downtime == pytest.approx(1.0)


@pytest.mark.parametrize(("bytes", "downtime"), [(0.0, 0.0), (float("nan"), -1.0)])
def test_what_was_not_measured_teaches_nothing(bytes: float, downtime: float) -> None:
    known = Experience()
    known.learn(ended("w", bytes, downtime))
    assert known.factors("w") == NONE and known.factors("other") == NONE


@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.floats(0.0, 1e15), st.floats(0.0, 1e6), st.floats(0.0, 1e15)), max_size=30
    )
)
def test_factors_stay_within_their_bounds_whatever_was_seen(moves: list[tuple[str, float, float, float]]) -> None:
    known = Experience()
    for name, sent, downtime, predicted in moves:
        known.learn(
            Ended(
                workload=name,
                predicted_bytes=predicted,
                predicted_downtime=predicted,
                bytes=sent,
                downtime=downtime,
                used=known.factors(name),
            )
        )
    for name in "abcd":
        factors = known.factors(name)
        assert BYTES[0] * 0.999 <= factors.bytes <= BYTES[1] * 1.001
        assert DOWNTIME[0] * 0.999 <= factors.downtime <= DOWNTIME[1] * 1.001
