"""A host with a disk of its own, on a machine that shares its file systems with all hosts of a test."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

from migrator.testing.hosts import Host


class OtherDisk:
    """The mount namespace of a host, with a tmpfs over `folder`. Kept by a process that sleeps."""

    def __init__(self, host: Host, folder: Path) -> None:
        script = f"mount -t tmpfs none {folder} && echo ready && exec sleep infinity"
        self._keeper = subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stdout.readline() == b"ready\n"
        self.root = Path(f"/proc/{self._keeper.pid}/root")
        enter = ["nsenter", f"--net={host.netns_path}", f"--mount=/proc/{self._keeper.pid}/ns/mnt"]

        def argv(command: Sequence[str]) -> list[str]:
            return [*enter, *command]

        host._argv = argv  # type: ignore[method-assign]

    def close(self) -> None:
        self._keeper.kill()
        self._keeper.communicate()
