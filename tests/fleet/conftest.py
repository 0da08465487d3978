"""Both stores, for one suite: what one promises, the other does."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from migrator.fleet.store import Store, open_store

Opener = Callable[[], Awaitable[Store]]


@pytest.fixture(params=["sqlite"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a store that is empty."""
    return f"{request.param}:{tmp_path}/fleet.db"


@pytest.fixture
async def opener(store_url: str) -> AsyncIterator[Opener]:
    """Opens the same store again, as another program would."""
    opened = []

    async def again() -> Store:
        store = await open_store(store_url)
        opened.append(store)
        return store

    yield again
    for store in opened:
        await store.close()


@pytest.fixture
async def store(opener: Opener) -> Store:
    return await opener()
