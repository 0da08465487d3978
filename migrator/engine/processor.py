"""What the processor of this host is and saves."""

from __future__ import annotations

from migrator.engine.spawn import probe_xstate
from migrator.linux import procfs
from migrator.linux import x86_64 as arch


def cpu_facts() -> dict[str, str]:
    """vendor, model and flags of the first processor, from /proc/cpuinfo."""
    out = {"vendor": "", "model": "", "flags": ""}
    names = {"vendor_id": "vendor", "model name": "model", "flags": "flags"}
    for line in procfs.read_text("/proc/cpuinfo").split("\n"):
        key, _, value = line.partition(":")
        if key.strip() in names:
            out.setdefault(names[key.strip()], "")
            out[names[key.strip()]] = value.strip()
        if not line:
            break
    return out


def xstate_facts() -> tuple[int, int]:
    """(features, size in bytes) of the extended state. Read from a task of our own: all have the same."""
    xstate = probe_xstate()
    return arch.xfeatures(xstate), len(xstate)
