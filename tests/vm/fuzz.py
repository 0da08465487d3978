"""`make fuzz-kernel`: hostile images for restart(), in a guest with KASAN and lockdep.

    python -m tests.vm.fuzz [SECONDS [SEED]]

Real images are made first, by the calls and by the user engine; `ckptfuzz` then changes them and restarts what comes
out (kernel-patches/tools/ckptfuzz.c). A splat in the kernel's log ends it with an error.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

from tests.vm import image
from tests.vm.lab import Lab
from tests.vm.machine import CommandFailed, Machine
from tests.vm.program import Program

TOOLS = image.ROOT / "build" / "guest"
SEEDS = (("counter", ()), ("memory", (1, 1, "all")), ("threads", (4,)), ("signals", ()), ("fds", ()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile images for restart() under KASAN and lockdep.")
    parser.add_argument("seconds", type=int, nargs="?", default=600)
    parser.add_argument("seed", type=int, nargs="?", default=random.randrange(1 << 31))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as folder:
        print(fuzz(Lab(Path(folder), memory_mib=2048), arguments.seconds, arguments.seed))


def fuzz(lab: Lab, seconds: int, seed: int) -> str:
    """Fuzz in a guest for a while; what ckptfuzz counted. Raises KernelSplat, MachineLost."""
    # A kernel with KASAN takes minutes for what another does in seconds.
    with lab.guest("release", name="seeds") as guest:
        images = seed_images(guest)
    counted = ""
    with lab.guest("debug") as guest:
        for path, content in images.items():
            guest.put(path, content)
        for part in range(0, seconds, 60):
            length = min(60, seconds - part)
            done = guest.run(f"{TOOLS}/ckptfuzz {length} {seed + part} {' '.join(images)}", seconds=length + 120)
            counted += done.stdout
            guest.check_console()
    return counted


def seed_images(guest: Machine) -> dict[str, bytes]:
    """Images of real programs by their paths: by checkpoint() where it takes them, and by the user engine."""
    images = {}
    for name, arguments in SEEDS:
        with Program(guest, name, *arguments) as program:
            path = f"/tmp/kernel-{name}.image"
            guest.run(f"kill -STOP {program.pid}; sleep 0.2")
            if guest.run(f"{TOOLS}/ckpt {program.pid} > {path}", status=None).status == 0:
                images[path] = guest.get(path)
            guest.run(f"kill -CONT {program.pid}")
            path = f"/tmp/user-{name}.image"
            guest.run(f"migrator checkpoint {program.pid} -o {path}")
            images[path] = guest.get(path)
    if not any("/kernel-" in path for path in images):
        raise CommandFailed("checkpoint() takes none of the programs to start from")
    return images


if __name__ == "__main__":
    main()
