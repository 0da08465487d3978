"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `migrator` command."""
    from migrator.cli.app import LOCAL, make

    sys.setswitchinterval(0.0005)  # threads hand over quickly: a freeze must not wait for one that computes
    make(local=sys.argv[1:2] != [] and sys.argv[1] in LOCAL)()
