"""What can be asked for. Durations are seconds, sizes are bytes, rates are bytes per second."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MigrateSettings:
    """How a workload is to be moved.

    max_downtime:  the longest stop that its users may feel; None for the shortest that can be had
    on_overrun:    where the stop gets longer than `max_downtime` by more than a quarter of it and 20 ms, before COMMIT:
                   "abort" lets the workload run on and tries again, twice at most; "continue" goes on, and says so
    timeout:       how long pre-copy may go on before the migration is given up
    bandwidth:     cap on what is sent before the freeze, memory and files; 0.0 for none
    cold:          no pre-copy: stop, copy, restart
    copy_files:    carry along files that are missing or other there
    copy_paths:    files and directories to carry along whole, as the workload sees them; implies `copy_files`
    engine:        the name of the one that saves here; "" for the first that refuses nothing of it
    migration:     its id, if it has one already; "" for a new one
    fleet, token:  of the controller that wants it, which both hosts check; 0 where a person does
    verify:        save the copy again before it runs, while all is stopped, and give up if it is not what was saved
    """

    max_downtime: float | None = None
    on_overrun: Literal["abort", "continue"] = "abort"
    timeout: float = 600.0
    bandwidth: float = 0.0
    cold: bool = False
    copy_files: bool = False
    copy_paths: tuple[str, ...] = ()
    engine: str = ""
    migration: str = ""
    fleet: str = ""
    token: int = 0
    verify: bool = False
