"""Fixtures for everybody."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from migrator.testing.hosts import TwoHosts

# How long an example takes is nothing that a test asserts: the machine may be busy.
hypothesis.settings.register_profile("migrator", deadline=None)
hypothesis.settings.load_profile("migrator")

# A shell starts what runs in its background with SIGINT ignored, and that is inherited by whatever the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest-xdist gives its workers the width of a terminal; what a command prints into a file is as wide as need be.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)


@pytest.fixture
def two_hosts() -> Iterator[TwoHosts]:
    """Hosts `a` and `b` and a `client` on one LAN (10.77.0.0/24), each a network namespace. Needs root."""
    with TwoHosts(tag="t") as hosts:
        yield hosts
