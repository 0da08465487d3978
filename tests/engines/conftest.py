"""Whatever is saved and restored here is looked at a second time before it runs (migrator.image.compare)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.engine.base import DestinationOptions


@pytest.fixture(autouse=True)
def second_look(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    *others, _ = DestinationOptions.__init__.__defaults__ or ()  # `verify` is the last
    monkeypatch.setattr(DestinationOptions.__init__, "__defaults__", (*others, True))
    yield
