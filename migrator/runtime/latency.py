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
_MESSAGE_SECONDS = 0.00025  # as long as it takes to send a message
_lock = threading.Lock()
_urgent = 0  # guards that are entered
_frozen = 0  # guards for which garbage was frozen
_before = 0.005


def yield_processor() -> None:
    """Let another thread have the interpreter that was just woken by what this one did, and is more urgent."""
    time.sleep(_MESSAGE_SECONDS)


class LatencyGuard:
    """From `enter()` to `leave()`: no collection, short switch interval, real-time priority. `leave()` undoes
    `prepare()` too; it may be called without either, and twice. Any thread may call any of them."""

    def __init__(self) -> None:
        self._entered = self._prepared = False

    def prepare(self) -> None:
        """Collect garbage, and let later collections pass over all that is there now. Takes up to 0.1 s in which
        no thread does anything else: to be called before anything has begun."""
        global _frozen
        with _lock:
            if not self._prepared:
                self._prepared = True
                _frozen += 1
        gc.collect()
        gc.freeze()

    def enter(self) -> None:
        global _urgent, _before
        with _lock:
            if self._entered:
                return
            self._entered = True
            _urgent += 1
            if _urgent == 1:
                _before = sys.getswitchinterval()
                sys.setswitchinterval(_SWITCH_SECONDS)
                gc.disable()
                urgency.raise_all()

    def leave(self) -> None:
        global _urgent, _frozen
        with _lock:
            if self._entered:
                self._entered = False
                _urgent -= 1
                if _urgent == 0:
                    sys.setswitchinterval(_before)
                    gc.enable()
                    urgency.lower_all()
            if self._prepared:
                self._prepared = False
                _frozen -= 1
                if _frozen == 0:
                    gc.unfreeze()
