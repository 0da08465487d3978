"""The command line."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def main() -> NoReturn:
    """Entry point of the `migrator` command."""
    from migrator.cli.app import make
    from migrator.cli.output import log_to_stderr, show_crash

    log_to_stderr()
    sys.setswitchinterval(0.0005)  # threads hand over quickly: a freeze must not wait for one that computes
    try:
        make(sys.argv[1:2])()
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise  # a text, for the interpreter to print
        _leave(end.code or 0)
    except Exception as error:
        show_crash(error)
        _leave(1)
    _leave(0)


def _leave(code: int) -> NoReturn:
    """Exit, and leave it to the kernel to take the process apart: the interpreter takes 0.3 s for that."""
    threading._shutdown()  # type: ignore[attr-defined]  # which ends what waits for work, and awaits all others
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):  # nobody reads any more
            code = code or 1
    os._exit(code)
