"""What check says of a tree that is carried, and of which something stays behind, or will not be quite the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from migrator.engine.base import SourceOptions
from migrator.engine.user.dump.source import UserSource
from migrator.linux.cgroup import hierarchy

pytestmark = pytest.mark.root

PROGRAM = """
import tempfile, time
try:
    open("/proc/self/loginuid", "w").write("4711")
except FileNotFoundError:
    pass  # a kernel without audit
kept = tempfile.TemporaryFile(dir=".")
print(kept.fileno(), flush=True)
time.sleep(60)
"""


def test_check_tells_what_stays_behind(tmp_path: Path) -> None:
    group = hierarchy().mountpoint / f"test-notes-{os.getpid()}"
    group.mkdir()
    out = tmp_path / "out"
    with out.open("w") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stdout
        )
    with child:
        try:
            (group / "cgroup.procs").write_text(str(child.pid))
            while not (number := out.read_text().strip()):
                time.sleep(0.01)
            with UserSource(child.pid, -1, SourceOptions()) as source:
                told = {what: about for about, what in source.survey().notes}
        finally:
            child.kill()
            child.wait()
            group.rmdir()
    login = "the login uid 4711 (audit) will be that of the agent"
    assert told.pop(login, "") == (f"pid {child.pid}" if Path("/proc/self/loginuid").exists() else "")
    (of_cgroup,) = [what for what in told if group.name in what]
    assert of_cgroup.endswith("and its limits do not come along")
    assert told["files without a name: when they were last read is not kept"] == f"pid {child.pid} fd {number}"
