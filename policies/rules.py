"""Rules that `simulate` can replay a day under: none at all, and ours."""

from __future__ import annotations

from collections.abc import Sequence

from .balance import HOLD, SETTINGS, Settings, balance
from .model import Cluster
from .plan import Move


class Nothing:
    """Leaves everything where it is."""

    name = "nothing"

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        return ()


class Ours:
    """`balance.balance`, with what it remembers."""

    def __init__(self, settings: Settings = SETTINGS, name: str = "migrator") -> None:
        self.name = name
        self._settings = settings
        self._hold = HOLD

    def plan(self, cluster: Cluster) -> Sequence[Move]:
        plan, self._hold = balance(cluster, self._hold, self._settings)
        return plan.moves
