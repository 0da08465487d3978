"""Taking hosts in and out of use while others write about them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from migrator.errors import UsageError
from migrator.fleet import records as r
from migrator.fleet.membership import uncordon
from migrator.fleet.state import FleetState, Stored
from migrator.fleet.store import open_store

CORDON = r.Cordon(host="a", mode=r.HostMode.CORDONED, since=1.0)


@pytest.fixture
async def state(tmp_path: Path) -> AsyncIterator[FleetState]:
    store = await open_store(f"sqlite:{tmp_path}/fleet.db")
    yield await FleetState.open(store)
    await store.close()


async def test_a_host_is_given_free_while_a_controller_writes_about_it(
    state: FleetState, monkeypatch: pytest.MonkeyPatch
) -> None:
    await state.cordons.put("a", CORDON)
    read, written = state.cordons.get, []

    async def read_before_it_changes(name: str) -> Stored[r.Cordon] | None:
        found = await read(name)
        if len(written) < 3:  # as a controller that says how the drain goes
            written.append(msgspec.structs.replace(CORDON, reason=f"change {len(written)}"))
            await state.cordons.put("a", written[-1])
        return found

    monkeypatch.setattr(state.cordons, "get", read_before_it_changes)
    assert await uncordon(state, "a") == written[-1]
    assert await read("a") is None
    with pytest.raises(UsageError, match="not cordoned"):
        await uncordon(state, "a")


async def test_what_no_drain_has_moved_is_not_brought_back(state: FleetState) -> None:
    await state.cordons.put("a", CORDON)
    with pytest.raises(UsageError, match="not drained"):
        await uncordon(state, "a", drained=True)
    assert await state.cordons.get("a") is not None
