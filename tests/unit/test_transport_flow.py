"""Credit, rate and cap, with the time given by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import TransportError
from transport.flow import FLOOR, QUEUE_SECONDS, ReceiveWindow, RoundTrip, SendWindow, TokenBucket

MIB = 1 << 20


def run(window: SendWindow, *, rate: float, round_trip: float, seconds: float, backlog: bool = False) -> float:
    """Let a link of `rate` bytes/s take what the window lets out; returns bytes/s achieved."""
    now = done = 0.0
    queue: list[float] = []  # when each block of 64 KiB will have been granted
    free = 0.0
    while now < seconds:
        while window.has_room(65536, round_trip, now):
            window.sent(65536, now)
            free = max(free, now) + 65536 / rate
            queue.append(free + round_trip)
        now = queue.pop(0)
        window.granted(65536, now, backlog=backlog)
        done += 65536
    return done / now


@pytest.mark.parametrize("rate", [1e6, 12.5e6, 125e6, 1e9])
def test_the_measured_rate_is_that_of_the_link(rate: float) -> None:
    window = SendWindow(8 * MIB)
    run(window, rate=rate, round_trip=0.0005, seconds=2.0)
    assert window.rate == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize("round_trip", [0.0002, 0.01, 0.1])
def test_the_link_is_used_in_full_as_far_as_the_window_allows(round_trip: float) -> None:
    achieved = run(SendWindow(8 * MIB), rate=50e6, round_trip=round_trip, seconds=5.0)
    assert achieved > 0.8 * min(50e6, 8 * MIB / round_trip)


def test_no_more_is_in_flight_than_a_message_can_wait_for() -> None:
    window = SendWindow(8 * MIB)
    run(window, rate=12.5e6, round_trip=0.001, seconds=2.0)
    assert window.limit(0.001) < 2 * 12.5e6 * (QUEUE_SECONDS + 0.001)


def test_one_block_may_always_be_sent_when_nothing_is_in_flight() -> None:
    window = SendWindow(5 * MIB)
    run(window, rate=1e6, round_trip=0.0, seconds=2.0)
    window.granted(window.in_flight, 3.0)
    assert window.limit(0.0) == FLOOR
    assert window.has_room(4 * MIB, 0.0, 3.0)
    window.sent(4 * MIB, 0.0)
    assert not window.has_room(1, 0.0, 3.0)


def test_a_link_that_idles_is_not_taken_for_a_slow_one() -> None:
    window = SendWindow(8 * MIB)
    run(window, rate=100e6, round_trip=0.001, seconds=2.0)
    window.granted(window.in_flight, 2.01)
    before = window.rate
    for second in range(10, 20):
        window.sent(2 * MIB, second)
        window.granted(2 * MIB, second + 0.9)
    assert window.rate == before


def test_before_the_link_was_pressed_the_rate_is_a_lower_bound() -> None:
    window = SendWindow(8 * MIB)
    for second in (1, 2, 3):
        window.sent(MIB, second)
        window.granted(MIB, second + 0.1 * second)
    assert window.rate == pytest.approx(MIB / 0.1)


def test_little_data_gives_an_estimate_too() -> None:
    window = SendWindow(8 * MIB)
    assert window.estimate == 0.0
    window.sent(MIB, 0.0)
    window.granted(MIB // 2, 0.01)
    assert window.estimate == pytest.approx(MIB / 2 / 0.01)


def test_grants_in_lumps_do_not_make_the_link_look_faster() -> None:
    window = SendWindow(8 * MIB)
    for _ in range(16):
        window.sent(65536, 0.0)
    window.granted(512 << 10, 0.1)
    window.granted(512 << 10, 0.1001)
    assert window.rate == pytest.approx(MIB / 0.1, rel=0.01)


def test_a_slow_sender_is_not_taken_for_a_slow_link() -> None:
    window = SendWindow(8 * MIB)
    run(window, rate=200e6, round_trip=0.001, seconds=2.0)
    window.granted(window.in_flight, 2.1)
    now, before = 3.0, window.rate
    for _ in range(100):  # sends until there is no room, and then is busy for a long time
        while window.has_room(MIB, 0.001, now):
            window.sent(MIB, now)
        window.granted(MIB, now + 0.005)
        now += 0.1
        window.granted(window.in_flight, now)
        now += 0.1
    assert window.rate > 0.9 * before


def test_a_slow_receiver_is_not_taken_for_a_slow_link() -> None:
    for backlog, capacity in ((False, pytest.approx(50e6, rel=0.15)), (True, 0.0)):
        window = SendWindow(8 * MIB)
        run(window, rate=50e6, round_trip=0.001, seconds=2.0, backlog=backlog)
        assert window.rate == pytest.approx(50e6, rel=0.15)
        assert window.capacity == capacity


def test_credit_for_what_was_never_sent_is_refused() -> None:
    window = SendWindow(8 * MIB)
    window.sent(100, 0.0)
    with pytest.raises(TransportError):
        window.granted(101, 1.0)


def test_a_peer_that_ignores_its_credit_is_caught() -> None:
    window = ReceiveWindow(1000)
    window.received(1000)
    with pytest.raises(TransportError):
        window.received(1)


@given(sizes=st.lists(st.integers(1, MIB), max_size=50))
def test_every_byte_consumed_is_granted_once_and_at_the_latest_when_idle(sizes: list[int]) -> None:
    window = ReceiveWindow(64 * MIB)
    granted = 0
    for size in sizes:
        window.received(size)
    for n, size in enumerate(sizes):
        granted += window.consumed(size, idle=n == len(sizes) - 1)
    assert granted == sum(sizes)
    assert window.outstanding == 0


@given(sizes=st.lists(st.integers(1, 100_000), min_size=20, max_size=200))
def test_a_cap_holds_over_any_length_of_time(sizes: list[int]) -> None:
    bucket = TokenBucket(1e6, burst=10_000)
    now = 0.0
    for size in sizes:
        now += bucket.delay(now)
        assert bucket.delay(now) < 1e-9
        bucket.take(size)
    assert sum(sizes) <= 1e6 * now + 10_000 + max(sizes) + 1


def test_time_without_traffic_is_not_saved_up_beyond_the_burst() -> None:
    bucket = TokenBucket(1000.0, burst=100)
    bucket.delay(0.0)
    bucket.delay(3600.0)
    bucket.take(1100)
    assert bucket.delay(3600.0) == pytest.approx(1.0)


def test_a_cap_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="cap"):
        TokenBucket(0)


def test_the_round_trip_is_the_least_ever_seen_whatever_the_load() -> None:
    trips = RoundTrip()
    assert trips.least == 0.0
    for seconds in (0.3, 0.001, *[0.5] * 100):
        trips.add(seconds)
    assert trips.least == 0.001
    assert trips.last == 0.5
