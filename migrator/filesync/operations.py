"""Operations for the destination, put into messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from migrator.filesync.content import path_of
from migrator.protocol.trees import Put, TreeOp, TreeOps, Write

_BATCH = 512 << 10  # bytes of one message, about
_BATCH_OPS = 1000


class Operations:
    """The operations of tree `number`, in their order. `tell` is called with bytes of files as they are added."""

    def __init__(self, number: int, tell: Callable[[int], None]) -> None:
        self._number = number
        self._tell = tell
        self._ops: list[TreeOp] = []
        self._size = 0
        self._aside = 0

    def do(self, op: TreeOp) -> Iterator[TreeOps]:
        """Add one; yields a message when there is enough for it."""
        data = len(op.data) if isinstance(op, Put | Write) else 0
        cost = data + (len(path_of(op)) + 100)
        if self._ops and (self._size + cost > _BATCH or len(self._ops) >= _BATCH_OPS):
            yield from self.flush()
        self._ops.append(op)
        self._size += cost
        self._tell(data)

    def flush(self) -> Iterator[TreeOps]:
        """The message with the rest, if there is any."""
        if self._ops:
            ops, self._ops, self._size = self._ops, [], 0
            yield TreeOps(self._number, ops)

    def next_aside(self) -> int:
        """A number, never used before, for what is moved aside."""
        self._aside += 1
        return self._aside
