"""As much of QEMU's machine protocol as a snapshot needs (qemu/docs/interop/qmp-spec)."""

from __future__ import annotations

import json
import socket
import time
from typing import Any


class QmpError(RuntimeError):
    """QEMU refuses a command, or says something that is not the protocol."""


class Qmp:
    """Commands to one QEMU, over a connected socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw", encoding="utf-8", newline="\n")
        json.loads(self._lines.readline())  # the greeting
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """The answer of a command; events in between are dropped."""
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
        raise QmpError(f"{command}: QEMU is gone")

    def save(self, path: str, *, seconds: float = 60.0) -> None:
        """Write the machine's whole state to a file. It stands still afterwards."""
        self.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        self.execute("migrate", uri=f"exec:cat > '{path}'")
        deadline = time.monotonic() + seconds
        while (status := self.execute("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > deadline:
                raise QmpError(f"migrate to {path}: {status}")
            time.sleep(0.02)
