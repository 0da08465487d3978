"""Fixtures for everybody."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from migrator.testing.hosts import TwoHosts


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    """Hosts `a` and `b` and a `client` on one LAN (10.77.0.0/24), each a network namespace. Needs root."""
    with TwoHosts(tag="t") as hosts:
        yield hosts
