"""What a key may do: receive only, send only, observe only. Every message has its row."""

from __future__ import annotations

import itertools

import pytest
from test_protocol_messages import EVERY, ID

from migrator.errors import UsageError
from migrator.protocol import fleet
from migrator.protocol import messages as m
from migrator.session.serve import ALL_RIGHTS, check_rights
from transport.authorized_keys import RIGHTS

# The right that opens a session with it. All others do nothing outside of one.
NEEDED: dict[type[m.AnyMessage], str] = {
    m.Propose: "receive",
    m.Ask: "receive",
    m.Commit: "receive",
    m.Done: "receive",
    fleet.Observe: "send",  # with a token, which shuts others out; see below
    fleet.WatchDeparture: "observe",
    fleet.Images: "observe",
    fleet.Depart: "send",
    fleet.Save: "send",
    fleet.Revive: "send",
}
SUBSETS = [frozenset(some) for count in range(4) for some in itertools.combinations(sorted(RIGHTS), count)]


def test_the_rights_of_keys_and_those_of_a_session_are_the_same() -> None:
    assert ALL_RIGHTS == RIGHTS


@pytest.mark.parametrize("rights", SUBSETS, ids=lambda rights: "+".join(sorted(rights)) or "none")
@pytest.mark.parametrize("message", [*EVERY, fleet.Observe()], ids=lambda message: type(message).__name__)
def test_each_right_allows_its_own_and_nothing_else(message: m.AnyMessage, rights: frozenset[str]) -> None:
    needed = NEEDED.get(type(message), "")
    if message == fleet.Observe():
        needed = "observe"
    if not needed or needed in rights:
        check_rights(message, rights, "peer")
        return
    with pytest.raises(UsageError, match="has no right") as caught:
        check_rights(message, rights, "peer")
    assert f'"{needed}"' in caught.value.hint


def test_only_looking_does_not_shut_a_controller_out() -> None:
    with pytest.raises(UsageError):
        check_rights(fleet.Observe("f1", (1 << 63) - 1), frozenset({"observe"}), "peer")


def test_a_question_about_a_migration_is_for_those_that_bring_some() -> None:
    for right in ("send", "observe"):
        with pytest.raises(UsageError):
            check_rights(m.Ask(ID), frozenset({right}), "peer")
