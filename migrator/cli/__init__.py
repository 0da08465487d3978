"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `migrator` command."""
    from migrator.cli.app import make
    from migrator.cli.output import log_to_stderr, show_crash

    log_to_stderr()
    sys.setswitchinterval(0.0005)  # threads hand over quickly: a freeze must not wait for one that computes
    try:
        make(sys.argv[1:2])()
    except Exception as error:
        show_crash(error)
        sys.exit(1)
