"""Keeping the interpreter from getting in the way while the workload stands still.

Two things of CPython cost milliseconds at a bad moment: a collection of the cyclic garbage collector, and the
5 ms for which a busy thread may keep the others waiting for the interpreter lock. A third is the scheduler:
on a busy host every step would wait its turn. All are dealt with once for the process, however many
migrations are in that phase at the same time.
"""

from __future__ import annotations

import gc
import sys
import threading
import time

from migrator.linux import urgency

_SWITCH_SECONDS = 0.0001
_WAY_SECONDS = 0.00025  # as long as it takes to send a message
_lock = threading.Lock()
_count = 0
_before = 0.005


def prepare() -> None:
    """Collect garbage, and let later collections pass over all that is there now. Takes up to 0.1 s in which
    no thread does anything else: to be called before anything has begun."""
    gc.collect()
    gc.freeze()


def yield_processor() -> None:
    """Let another thread have the interpreter that was just woken by what this one did, and is more urgent."""
    time.sleep(_WAY_SECONDS)


class LatencyGuard:
    """From `enter()` to `leave()` no collection, quick turns, and no waiting for others. `leave()` may be called
    without `enter()`, and twice. Any thread may do either."""

    def __init__(self) -> None:
        self._inside = False

    def enter(self) -> None:
        global _count, _before
        with _lock:
            if self._inside:
                return
            self._inside = True
            _count += 1
            if _count == 1:
                _before = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
                gc.disable()
                urgency.raise_all()

    def leave(self) -> None:
        global _count
        with _lock:
            if not self._inside:
                return
            self._inside = False
            _count -= 1
            if _count == 0:
                sys.setswitchinterval(_before)
                gc.enable()
                gc.unfreeze()
                urgency.lower_all()
