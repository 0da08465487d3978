from __future__ import annotations

import fcntl
import os
import resource
import subprocess

from migrator.linux.pidfd import ends


def test_the_end_of_a_process_is_seen_by_any_descriptor() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    process = subprocess.Popen(["sleep", "100"])
    low = os.pidfd_open(process.pid)
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, 1500)
    try:
        assert high >= 1500
        assert not ends(high, 0.0)
        process.kill()
        assert ends(high, None) and ends(low, 30.0)
    finally:
        process.kill()
        process.wait()
        os.close(low)
        os.close(high)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
