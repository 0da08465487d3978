"""A short run of the fuzzer, always from another seed; `make fuzz-kernel` takes as long as it is told."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.vm.fuzz import fuzz
from tests.vm.lab import Lab


def test_hostile_images_make_no_splat(folder: Path) -> None:
    seconds = int(os.environ.get("MIGRATOR_FUZZ_SECONDS", "600"))
    print(fuzz(Lab(folder, memory_mib=2048), seconds, random.randrange(1 << 31)))
