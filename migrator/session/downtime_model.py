"""What stopping and restoring takes on this host, learned from its migrations.

The part of the downtime that does not depend on memory grows with the number of tasks and differs much between
hosts. A model says how it grows; one factor, the running average of actual by modelled, fits it to the host. The
factor is kept in a small file beside the journals; without it, or if it is broken, the model stands alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from migrator.model import MigrationResult, Outcome
from migrator.session.convergence import PAGE, ROUND_TRIPS, residual_pages

_NAME = "calibration.json"
_WEIGHT = 0.3
_LEAST, _GREATEST = 0.1, 20.0

# Measured with the user engine on two cores: one process with six threads and thirty descriptors.
_FREEZE, _FREEZE_EACH = 0.004, 0.0004
_RESTORE, _RESTORE_EACH = 0.003, 0.0004


def modelled(tasks: int) -> tuple[float, float]:
    """(seconds to stop and save, seconds to restore and resume) for a number of tasks, without memory."""
    return _FREEZE + _FREEZE_EACH * tasks, _RESTORE + _RESTORE_EACH * tasks


def load(directory: Path) -> float:
    """The factor for this host; 1.0 if nothing was learned yet."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        factor = float(json.loads((directory / _NAME).read_text())["factor"])
        return min(max(factor, _LEAST), _GREATEST)
    return 1.0


def learn(directory: Path, tasks: int, result: MigrationResult) -> float:
    """Take a migration into account; returns the new factor. Where it cannot be kept, that is no error."""
    before = load(directory)
    if result.outcome is not Outcome.MIGRATED or not result.downtime or not result.rounds:
        return before
    memory = residual_pages(result.rounds) * PAGE / result.throughput if result.throughput else 0.0
    phases = result.timeline.phases if result.timeline is not None else []
    files = sum(phase.seconds for phase in phases if phase.name == "changed files")
    actual = max(result.downtime - memory - files - ROUND_TRIPS * result.rtt, 0.0)
    factor = before + _WEIGHT * (actual / sum(modelled(tasks)) - before)
    factor = min(max(factor, _LEAST), _GREATEST)
    with contextlib.suppress(OSError):
        fresh = directory / f".{_NAME}.{os.getpid()}"
        fresh.write_text(json.dumps({"factor": round(factor, 4)}))
        os.replace(fresh, directory / _NAME)
    return factor
