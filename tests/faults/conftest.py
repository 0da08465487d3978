"""Fixtures of the fault tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fault_agents import Agents


@pytest.fixture
def agents(tmp_path: Path) -> Agents:
    return Agents(tmp_path)
