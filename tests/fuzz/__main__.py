"""`make fuzz`: hostile input for as long as it is told, each kind for the same time.

    python -m tests.fuzz [SECONDS [SEED [KIND…]]]

It prints how many inputs there were and how they ended, and ends with an error if something was found.
"""

from __future__ import annotations

import argparse
import random
import sys

from tests.fuzz import decoder, protocol, restart, ssh

KINDS = {"decoder": decoder.fuzz, "restart": restart.fuzz, "protocol": protocol.fuzz, "ssh": ssh.fuzz}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Hostile input, made from what is valid.")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0, help="for each kind")
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(1 << 31))
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND", help=", ".join(KINDS))
    arguments = parser.parse_args()
    found = 0
    for kind in arguments.kinds:
        counts = KINDS[kind](arguments.seconds, arguments.seed)
        found += len(counts.found)
        print(f"{kind} (seed {arguments.seed}): {counts}", flush=True)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
