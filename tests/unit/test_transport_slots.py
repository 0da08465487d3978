"""Slots: nobody who cannot log in keeps out somebody who can."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transport.slots import Slots


def silent() -> bool:
    return False


def speaks() -> bool:
    return True


def test_a_crowd_of_one_address_displaces_itself_the_oldest_first() -> None:
    slots: Slots[int] = Slots(logins=8, share=2)
    assert slots.arrived(100, "192.0.2.100", silent) is None
    left = [slots.arrived(number, "192.0.2.1", silent) for number in range(5)]
    assert left == [None, None, 0, 1, 2]
    assert slots.connections() == [100, 3, 4]


def test_who_speaks_stays_and_the_silent_leave() -> None:
    slots: Slots[int] = Slots(logins=8, share=3)
    for number in range(3):
        slots.arrived(number, "192.0.2.1", speaks if number == 0 else silent)
    assert [slots.arrived(number, "192.0.2.1", silent) for number in (3, 4, 5)] == [1, 2, 3]
    assert 0 in slots.connections()


def test_where_all_places_are_taken_the_address_with_most_gives_one() -> None:
    slots: Slots[str] = Slots(logins=4, share=3)
    for name in ("a1", "b1", "b2", "c1"):
        assert slots.arrived(name, f"192.0.2.{ord(name[0])}", silent) is None
    assert slots.arrived("peer", "198.51.100.1", silent) == "b1"
    assert slots.arrived("d1", "192.0.2.4", silent) == "a1"  # one each: the oldest


def test_a_peer_that_speaks_passes_a_crowd_of_many_addresses() -> None:
    slots: Slots[int] = Slots(logins=4, share=2)
    for number in range(4):
        slots.arrived(number, f"192.0.2.{number}", silent)
    assert slots.arrived(100, "198.51.100.1", speaks) == 0
    for number in range(4, 50):
        assert slots.arrived(number, f"192.0.2.{number}", silent) != 100
    assert slots.logged_in(100, "key")


def test_the_newcomer_is_not_the_one_who_leaves() -> None:
    slots: Slots[int] = Slots(logins=2, share=2)
    assert slots.arrived(1, "192.0.2.1", speaks) is None
    assert slots.arrived(2, "192.0.2.2", speaks) is None
    assert slots.arrived(3, "192.0.2.3", silent) == 1


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("192.0.2.1", "192.0.2.2", False),
        ("192.0.2.1", "::ffff:192.0.2.1", True),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2", True),
        ("", "", True),
    ],
)
def test_what_one_party_has_many_addresses_of_shares_its_places(one: str, other: str, same: bool) -> None:
    slots: Slots[int] = Slots(logins=8, share=1)
    slots.arrived(1, one, silent)
    assert slots.arrived(2, other, silent) == (1 if same else None)


def test_links_are_counted_apart_and_by_key() -> None:
    slots: Slots[int] = Slots(logins=2, share=2, links=3, peer_share=2)
    granted = []
    for number, peer in enumerate(["a", "a", "a", "b", "c"]):
        slots.arrived(number, "192.0.2.1", speaks)
        granted.append(slots.logged_in(number, peer))
    assert granted == [True, True, False, True, False]
    assert slots.after_login == 3
    assert slots.before_login == 2  # those without a place are still guests, and leave as such
    slots.left(0)
    slots.left(0)
    assert slots.logged_in(2, "a")
    assert slots.connections() == [4, 1, 3, 2]


@given(
    st.lists(st.tuples(st.sampled_from(["come", "login", "leave"]), st.integers(0, 3), st.booleans()), max_size=80),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_the_bounds_hold_whatever_comes(events: list[tuple[str, int, bool]], logins: int, share: int) -> None:
    slots: Slots[int] = Slots(logins=logins, share=share, links=3, peer_share=2)
    addresses: dict[int, int] = {}
    open_ones: list[int] = []
    for number, (what, which, spoken) in enumerate(events):
        if what == "come":
            leaves = slots.arrived(number, f"192.0.2.{which}", speaks if spoken else silent)
            addresses[number] = which
            open_ones.append(number)
            assert leaves != number or len(open_ones) == 1 or logins == 1 or share == 1
            if leaves is not None:
                assert leaves in open_ones
                open_ones.remove(leaves)
        elif open_ones:
            one = open_ones[which % len(open_ones)]
            if what == "login" and one not in slots._peers:
                slots.logged_in(one, str(which % 2))
            elif what == "leave":
                slots.left(one)
                open_ones.remove(one)
        assert sorted(slots.connections()) == sorted(open_ones)
        assert slots.before_login <= logins
        assert slots.after_login <= 3
        before = [addresses[one] for one in open_ones if one not in slots._peers]
        assert all(before.count(which) <= share for which in before)
