"""`make fuzz-kernel`: hostile images for restart(), in a guest with KASAN and lockdep.

    python -m tests.vm.fuzz [SECONDS [SEED]]

Real images are made first, by the calls and by the user engine; `ckptfuzz` then changes them and restarts what comes
out (kernel-patches/tools/ckptfuzz.c). A splat in the kernel's log ends it with an error.
"""

from __future__ import annotations

import argparse
import random
import re
import struct
import tempfile
from pathlib import Path

from tests.vm import image
from tests.vm.lab import Lab
from tests.vm.machine import Machine
from tests.vm.program import Program
from tests.vm.test_calls import save

TOOLS = image.ROOT / "build" / "guest"
HEADER_X86 = 2
OPEN = re.compile(rb"/tmp/[a-z]+-[0-9]+\.out[a-z.0-9]*")
SEEDS = (("counter", ()), ("memory", (1, 1, "all")), ("threads", (4,)), ("signals", ()), ("fds", ()))
KERNEL_SEEDS = (*SEEDS, ("terminals", ()))


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
        images = user_images(guest)
    counted = ""
    with lab.guest("debug") as guest:
        images |= kernel_images(guest)
        # Its vdso is another one: an image from elsewhere would be refused by its second record.
        here = header_of(next(content for path, content in images.items() if "/kernel-" in path))
        images = {path: content.replace(header_of(content), here, 1) for path, content in images.items()}
        for path, content in images.items():
            guest.put(path, content)
        # What the programs had open has gone with them; without it no image gets far.
        files = {name.decode() for content in images.values() for name in OPEN.findall(content)}
        guest.run(f"touch {' '.join(sorted(files))}; chmod 666 {' '.join(sorted(files))}")
        for part in range(0, seconds, 60):
            length = min(60, seconds - part)
            done = guest.run(f"{TOOLS}/ckptfuzz {length} {seed + part} {' '.join(images)}", seconds=length + 120)
            counted += done.stdout
            guest.check_console()
    return counted


def kernel_images(guest: Machine) -> dict[str, bytes]:
    """Images of real programs by their paths, by checkpoint()."""
    images = {}
    for name, arguments in KERNEL_SEEDS:
        with Program(guest, name, *arguments) as program:
            path = f"/tmp/kernel-{name}.image"
            save(guest, program.pid, path)
            images[path] = guest.get(path)
    return images


def user_images(guest: Machine) -> dict[str, bytes]:
    """The same by the user engine."""
    images = {}
    for name, arguments in SEEDS:
        with Program(guest, name, *arguments) as program:
            path = f"/tmp/user-{name}.image"
            guest.run(f"migrator checkpoint {program.pid} -o {path}")
            images[path] = guest.get(path)
    return images


def header_of(content: bytes) -> bytes:
    """The record of the architecture, which is the second."""
    start = struct.unpack_from("<i", content, 4)[0]
    kind, length = struct.unpack_from("<ii", content, start)
    assert kind == HEADER_X86
    return content[start : start + length]


if __name__ == "__main__":
    main()
